"""Tokenizers trained from scratch, and pretrained ones made ready."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import TEXTS, template_text
from vlmtune.errors import RecipeError
from vlmtune.models.processor import prepare_tokenizer
from vlmtune.models.tokenizer import control_tokens, train_tokenizer

TEMPLATES = ("plain", "vicuna_v1", "chatml", "llama3")
ENDS = {"plain": "</s>", "vicuna_v1": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
VICUNA = train_tokenizer(TEXTS, 512, template_text("vicuna_v1"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_control_tokens_are_single(template: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 512, template_text(template))
    assert tokenizer.eos_token == ENDS[template]
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    for token in (*control_tokens(template_text(template)), ENDS[template], "<image>"):
        assert len(tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]) == 3


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_any_text_survives(text: str) -> None:
    ids = VICUNA(text, add_special_tokens=False)["input_ids"]
    assert VICUNA.decode(ids) == text


def test_words_of_the_template_and_of_the_texts_are_learned_in_place() -> None:
    """` red` with its space is one token, though no text begins with one."""
    tokenizer = train_tokenizer(["red"], 2000, template_text("vicuna_v1"))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red"}, {"role": "assistant", "content": "red"}],
        chat_template=template_text("vicuna_v1"),
    )["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(rendered)
    assert pieces[-2:] == ["Ġred", "</s>"]
    assert pieces[:3] == ["<s>", "A", "Ġchat"]


def test_digits_stand_alone() -> None:
    assert VICUNA.tokenize("2024") == ["2", "0", "2", "4"]


def test_the_same_texts_give_the_same_tokenizer() -> None:
    again = train_tokenizer(iter(TEXTS), 512, template_text("vicuna_v1"))
    assert again.get_vocab() == VICUNA.get_vocab()
    assert again.backend_tokenizer.to_str() == VICUNA.backend_tokenizer.to_str()


def test_no_text_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no text to train"):
        train_tokenizer([], 512, template_text("vicuna_v1"))


def test_comments_in_a_template_write_no_tokens() -> None:
    assert control_tokens("{#- not <|im_start|> -#}<|eot_id|>{{ x }}<|eot_id|></s>") == ["<|eot_id|>", "</s>"]


def test_a_template_of_another_tokenizer_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"writes <\|im_end\|>, <\|im_start\|>, unknown to the tokenizer"):
        prepare_tokenizer(train_tokenizer(TEXTS, 512, ""), template_text("chatml"))


def test_a_missing_pad_token_is_its_own() -> None:
    """Padding with the end token hides whether an answer ended."""
    tokenizer = train_tokenizer(TEXTS, 512, "")
    tokenizer.pad_token = None
    ready = prepare_tokenizer(tokenizer, template_text("vicuna_v1"))
    assert ready.pad_token_id != ready.eos_token_id
    assert ready.padding_side == "left"
