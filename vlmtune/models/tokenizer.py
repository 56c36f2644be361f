"""A tokenizer trained from scratch, for models that have no pretrained one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlmtune.errors import RecipeError
from vlmtune.types import IMAGE_MARK

PAD = "<pad>"
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_CONTROL_TOKEN = re.compile(r"<\|[\w/]+\|>|</?s>")
_BOS_AND_EOS = {
    "<|im_end|>": ("<|im_start|>", "<|im_end|>"),
    "<|eot_id|>": ("<|begin_of_text|>", "<|eot_id|>"),
    "": ("<s>", "</s>"),
}
_PLACE = "\ue000"
"""A private character that stands for a turn's text."""


def control_tokens(template: str) -> list[str]:
    """The control tokens that a chat template writes, such as `<|im_start|>`, in order."""
    return list(dict.fromkeys(_CONTROL_TOKEN.findall(_COMMENT.sub("", template))))


def train_tokenizer(texts: Iterable[str], vocab_size: int, template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens; the same texts give the same tokenizer.

    Every control token of the chat template is one token, as are padding and the image mark. It learns each
    text as it will stand in the template, the template's own words included. Digits stand alone, so that
    numbers which the texts lack read like those they have. Raises RecipeError when there are no texts.
    """
    control = control_tokens(template)
    bos, eos = next(pair for end, pair in _BOS_AND_EOS.items() if end in control or not end)
    special = list(dict.fromkeys([PAD, bos, eos, *control, IMAGE_MARK]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    ids = {"bos_token": bos, "eos_token": eos, "pad_token": PAD}
    frame = PreTrainedTokenizerFast(tokenizer_object=bpe, **ids).apply_chat_template(
        [{"role": role, "content": _PLACE} for role in ("user", "assistant")],
        chat_template=template,
        tokenize=False,
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_framed(texts, frame, special), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, padding_side="left", clean_up_tokenization_spaces=False, **ids
    )


def _framed(texts: Iterable[str], frame: str, special: list[str]) -> Iterator[str]:
    """Each text in its place in the frame, without control tokens: those are never cut, so never learned."""
    control = re.compile("|".join(map(re.escape, special)))
    empty = True
    for text in texts:
        empty = False
        yield control.sub("", frame.replace(_PLACE, text))
    if empty:
        raise RecipeError(
            "there is no text to train a tokenizer on",
            where="model.language.tokenizer",
            remedy="Check the mix, or name a pretrained tokenizer.",
        )
