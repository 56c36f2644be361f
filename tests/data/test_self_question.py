"""The turn transform of SQ-LLaVA and its rendering: checks 1 to 4 of the method's specification."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.llama_pieces import llama_pieces
from tests.tiny import tiny_images, tiny_processor
from vlmtune.config.mix import Mix
from vlmtune.config.plugins import SelfQuestionConfig
from vlmtune.config.schema import ChatStreamConfig, HeldOutConfig
from vlmtune.data.loader import ChatData
from vlmtune.data.render import TEMPLATES, Renderer, template_text
from vlmtune.data.transforms import apply_transforms
from vlmtune.models.vision import ImageTokens
from vlmtune.types import IGNORE, IMAGE_MARK, ChatSample, ImageRef, Size, Turn

LEGACY, MODERN = llama_pieces("legacy"), llama_pieces("modern")
ROUNDS = (
    ("What animal is this?", "A dog."),
    ("What color is it?", "Brown."),
    ("Where is it?", "On a couch."),
)


def dialogue(rounds: int, image: bool = True) -> ChatSample:
    turns = [turn for q, a in ROUNDS[:rounds] for turn in (Turn("user", q), Turn("assistant", a))]
    if image:
        turns[0] = Turn("user", f"{IMAGE_MARK}\n{turns[0].text}")
    return ChatSample("s#0", (ImageRef("x.png"),) * image, tuple(turns))


def asked(
    sample: ChatSample, probability: float = 1.0, seed: int = 0, first_turn: bool = False
) -> ChatSample:
    config = SelfQuestionConfig(type="self_question", probability=probability, first_turn=first_turn)
    return apply_transforms(sample, [config], np.random.default_rng(seed))


def roles(sample: ChatSample) -> str:
    return "".join(turn.role[0] for turn in sample.turns)


def rendered(sample: ChatSample, template: str = "vicuna_v1_sq", tokenizer: Any = LEGACY, per_image: int = 1):
    renderer = Renderer(tokenizer, ImageTokens(per_image), template_text(template))
    return renderer.render(sample, [Size(8, 8)] * len(sample.images))


def spans(sample: ChatSample, tokenizer: Any = LEGACY) -> list[tuple[int, int]]:
    """The learned runs, counted from the piece that begins the first USER."""
    made = rendered(sample, tokenizer=tokenizer)
    start = next(
        i for i, token in enumerate(made.input_ids) if tokenizer.convert_ids_to_tokens(token) == "▁US"
    )
    learned = [i - start for i, label in enumerate(made.labels) if label != IGNORE]
    runs = groupby(enumerate(learned), key=lambda pair: pair[1] - pair[0])
    return [(run[0][1], run[-1][1]) for run in (list(run) for _, run in runs)]


def texts(sample: ChatSample, tokenizer: Any) -> list[str]:
    made = rendered(sample, tokenizer=tokenizer)
    runs = groupby(made.labels, key=lambda label: label != IGNORE)
    return [tokenizer.decode(list(run)) for learned, run in runs if learned]


# ---------------------------------------------------------------- check 1


def test_check_1_the_worked_example_token_by_token():
    """The offsets of the released code, run with its own tokenizer (specification, section 2)."""
    questioned, plain = asked(dialogue(2)), asked(dialogue(2), probability=0)
    assert roles(questioned) == "uaqa" and roles(plain) == "uaua"
    assert spans(questioned) == [(17, 20), (24, 29), (36, 38)]
    assert spans(plain) == [(17, 20), (34, 36)]
    made = rendered(questioned)
    pieces = LEGACY.convert_ids_to_tokens(made.input_ids)
    expected = (
        "▁US ER : ▁ <image> ▁ \n What ▁animal ▁is ▁this ? ▁A SS IST ANT : ▁A ▁dog . </s> "
        "▁V USER : ▁What ▁color ▁is ▁it ? </s> ▁ ▁A SS IST ANT : ▁Brown . </s>"
    )
    assert pieces[-39:] == expected.split(" ")


@pytest.mark.parametrize("tokenizer", [LEGACY, MODERN], ids=["legacy", "modern"])
def test_check_1_the_learned_text_with_old_and_new_tokenizers(tokenizer: Any):
    """Re-tokenising pieces is right for the legacy tokenizer only; the template's marks are right for both."""
    assert texts(asked(dialogue(2)), tokenizer) == ["A dog.</s>", "What color is it?</s>", "Brown.</s>"]
    assert texts(dialogue(2), tokenizer) == ["A dog.</s>", "Brown.</s>"]
    short = rendered(asked(dialogue(2)), tokenizer=tokenizer)
    long = rendered(asked(dialogue(2)), tokenizer=tokenizer, per_image=576)
    assert len(long.input_ids) == len(short.input_ids) + 575 and long.labels[-14:] == short.labels[-14:]


def test_check_1_a_users_words_are_never_taken_for_structure():
    """The released code supervises a user's text that holds ` ASSISTANT: ` (26 labels instead of 7)."""
    sly = replace(
        dialogue(2),
        turns=(*dialogue(2).turns[:2], Turn("user", "Say ASSISTANT: no VUSER: x"), dialogue(2).turns[3]),
    )
    assert texts(sly, LEGACY) == ["A dog.</s>", "Brown.</s>"]


@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_every_template_renders_the_questioner(template: str):
    tokenizer = tiny_processor(template).tokenizer
    sample = asked(dialogue(3), first_turn=True)
    made = Renderer(tokenizer, ImageTokens(3), template_text(template)).render(sample, [Size(8, 8)])
    decoded = tokenizer.decode([label for label in made.labels if label != IGNORE], skip_special_tokens=True)
    words = " ".join(turn.text for turn in sample.turns if turn.role != "user")
    assert "".join(decoded.split()) == "".join(words.split())
    assert made.input_ids.count(tokenizer.convert_tokens_to_ids(IMAGE_MARK)) == 3


@pytest.mark.parametrize("template", ["vicuna_v1_sq", "vicuna_v1", "brief", "chatml", "llama3"])
@pytest.mark.parametrize("first_turn", [False, True])
def test_the_prompt_to_ask_is_what_stood_before_a_learned_question(template: str, first_turn: bool):
    """PITFALLS 18, for questions: nothing between `VUSER:` and the first token to come, in training and after."""
    tokenizer = tiny_processor(template).tokenizer
    renderer = Renderer(tokenizer, ImageTokens(3), template_text(template))
    sample, sizes = asked(dialogue(2), first_turn=first_turn), [Size(8, 8)]
    place = roles(sample).index("q")
    prompt = renderer.question_prompt(replace(sample, turns=sample.turns[:place]), sizes)
    made = renderer.render(sample, sizes)
    assert made.input_ids[: len(prompt)] == prompt
    before = [label for label in made.labels[: len(prompt)] if label != IGNORE]
    assert len(before) == sum(label != IGNORE for label in made.labels[: len(prompt)])
    assert made.labels[len(prompt)] == made.input_ids[len(prompt)]


def test_the_prompt_to_ask_ends_with_the_three_pieces_of_the_role():
    """`... 2, 478, 11889, 29901` in the released demo: no trailing space."""
    renderer = Renderer(LEGACY, ImageTokens(1), template_text("vicuna_v1_sq"))
    prompt = renderer.question_prompt(dialogue(1), [Size(8, 8)])
    assert LEGACY.convert_ids_to_tokens(prompt[-4:]) == ["</s>", "▁V", "USER", ":"]


def test_the_system_text_follows_the_vicuna_one_without_a_space():
    vicuna, ours = (template_text(name).split('"A chat between')[1] for name in ("vicuna_v1", "vicuna_v1_sq"))
    stem = vicuna.split(' " -}}')[0]
    assert ours.startswith(stem) and ours[len(stem)] not in ' "'


# ---------------------------------------------------------------- check 2


def test_check_2_never_the_first_turn_and_never_without_an_image():
    single = asked(dialogue(1))
    assert roles(single) == "ua" and texts(single, LEGACY) == ["A dog.</s>"]
    assert sum(label != IGNORE for label in rendered(single).labels) == 4
    wordless = asked(dialogue(2, image=False))
    assert roles(wordless) == "uaua"
    assert sum(label != IGNORE for label in rendered(wordless).labels) == 7
    for sample in (single, wordless):
        assert "VUSER" not in LEGACY.decode(rendered(sample).input_ids)
    three = asked(dialogue(3))
    assert roles(three) == "uaqaqa"
    assert sum(label != IGNORE for label in rendered(three).labels) == 24
    mixed = replace(three, turns=(*three.turns[:4], Turn("user", ROUNDS[2][0]), three.turns[5]))
    assert sum(label != IGNORE for label in rendered(mixed).labels) == 19


def test_the_first_turn_of_the_user_not_of_the_conversation_is_kept():
    led = replace(dialogue(1), turns=(Turn("system", "s"), Turn("assistant", "hi"), *dialogue(2).turns))
    assert roles(asked(led)) == "sauaqa"


def test_the_first_turn_leaves_its_image_with_the_user():
    """Our extension: images are never learned, so the mark stays behind in a turn of its own."""
    first = asked(dialogue(2), first_turn=True)
    assert roles(first) == "uqaqa" and first.turns[0].text == IMAGE_MARK and first.image_marks == 1
    assert texts(first, LEGACY)[0] == "What animal is this?</s>"
    assert roles(asked(dialogue(1, image=False), first_turn=True)) == "ua"


def test_words_that_point_at_an_image_stay_the_users():
    sample = dialogue(1)
    more = (Turn("user", f"Is {IMAGE_MARK} like it?"), Turn("assistant", "No."))
    bare = (Turn("user", f"{IMAGE_MARK}\n"), Turn("assistant", "A cat."))
    behind = (Turn("user", f"And this?\n{IMAGE_MARK}"), Turn("assistant", "A cat."))
    images = sample.images * 4
    moved = asked(replace(sample, images=images, turns=(*sample.turns, *more, *bare, *behind)))
    assert roles(moved) == "uauauauqa" and moved.image_marks == 4


# ---------------------------------------------------------------- check 3


def test_check_3_half_of_the_turns():
    rng = np.random.default_rng(0)
    config = SelfQuestionConfig(type="self_question")
    drawn = [roles(apply_transforms(dialogue(3), [config], rng)) for _ in range(10_000)]
    share = sum(row.count("q") for row in drawn) / 20_000
    assert 0.489 <= share <= 0.511
    both = sum(row == "uaqaqa" for row in drawn) / 10_000
    assert 0.237 <= both <= 0.263  # the turns of one sample are drawn apart


def test_check_3_drawn_anew_each_epoch_and_the_same_from_the_same_seed(tmp_path: Path):
    (name,) = tiny_images(tmp_path, 1)
    words = [turn for i in range(12) for turn in (("human", f"q{i}"), ("gpt", f"a{i}"))]
    talk = [{"from": who, "value": f"{IMAGE_MARK}\n{text}" if text == "q0" else text} for who, text in words]
    (tmp_path / "chat.json").write_text(json.dumps([{"image": name, "conversations": talk}]))
    mix = Mix.model_validate(
        {"sources": [{"name": "one", "format": "llava_json", "path": str(tmp_path / "chat.json")}]}
    )
    stream = ChatStreamConfig.model_validate(
        {
            "mix": "",
            "batch_size": 1,
            "transforms": [{"type": "self_question"}],
            "workers": 0,
        }
    )
    processor = tiny_processor("vicuna_v1_sq")

    def labels(seed: int, step: int) -> list[int]:
        held_out = HeldOutConfig(fraction=0)
        data = ChatData(stream, mix, tmp_path, processor, ImageTokens(16), held_out, seed, tmp_path / "cache")
        (batch,) = data.step(step, 0, 1)
        return batch.labels[0].tolist()

    assert labels(0, 0) == labels(0, 0) != labels(0, 1)  # a step is an epoch here
    assert labels(0, 0) != labels(1, 0)


# ---------------------------------------------------------------- check 4


@pytest.mark.parametrize("tokenizer", [LEGACY, MODERN], ids=["legacy", "modern"])
def test_check_4_probability_zero_is_plain_tuning(tokenizer: Any):
    talk = asked(dialogue(3), probability=0)
    assert talk == dialogue(3)
    text = template_text("vicuna_v1_sq").split('{{- "')[1].split(' " -}}')[0]
    same_words = replace(talk, turns=(Turn("system", text), *talk.turns))
    assert rendered(talk, "vicuna_v1_sq", tokenizer) == rendered(same_words, "vicuna_v1", tokenizer)
    assert rendered(talk, "vicuna_v1_sq", tokenizer) != rendered(talk, "vicuna_v1", tokenizer)


# ---------------------------------------------------------------- any conversation

words = st.lists(
    st.sampled_from([IMAGE_MARK, f"{IMAGE_MARK}\n", f"\n{IMAGE_MARK}", "a", " ", "b\n"]), max_size=4
)
turns = st.tuples(st.sampled_from(["user", "assistant", "system"]), words.map("".join))


@settings(deadline=None, max_examples=200)
@given(st.lists(turns, max_size=9), st.booleans(), st.integers(0, 99))
def test_marks_images_words_and_answers_are_kept(given_turns: list[Any], first_turn: bool, seed: int):
    made = tuple(Turn(role, text) for role, text in given_turns)
    count = sum(turn.text.count(IMAGE_MARK) for turn in made)
    sample = ChatSample("k#0", tuple(ImageRef(f"{i}.png") for i in range(count)), made)
    moved = asked(sample, 0.5, seed, first_turn)
    assert moved.image_marks == sample.image_marks and moved.images == sample.images
    assert [turn for turn in moved.turns if turn.role not in ("user", "questioner")] == [
        turn for turn in made if turn.role != "user"
    ]
    bare = ["".join(turn.text.replace(IMAGE_MARK, "") for turn in each.turns) for each in (moved, sample)]
    assert "".join(bare[0].split()) == "".join(bare[1].split())
    assert all(
        turn.text.strip() and IMAGE_MARK not in turn.text for turn in moved.turns if turn.role == "questioner"
    )
    assert asked(sample, 0.5, seed, first_turn) == moved
