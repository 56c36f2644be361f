"""ChatSample -> token ids and labels, through the chat template's own {% generation %} marks.

What is learned is never found by tokenising pieces and adding up lengths (LLaVA#1166). The template marks it
in the rendered text, the tokenizer's offsets carry the marks to tokens, and the tokens are decoded again and
compared. We read the marks from `render_jinja_template`, the first half of `apply_chat_template`: the mask
that its second half returns is silently empty when offsets leave out blanks (ByteLevel, trim_offsets).
"""

from __future__ import annotations

import difflib
import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from vlmtune.errors import DataError, RecipeError
from vlmtune.types import IGNORE, IMAGE_MARK, ChatSample, Size, Turn

TEMPLATES = Path(__file__).parent / "chat_templates"
_ANSWERING = ("assistant", "questioner")


def template_text(name_or_path: str) -> str:
    """The text of one of our templates (by name) or of a .jinja file (by path)."""
    if name_or_path.endswith(".jinja"):
        path = Path(name_or_path)
        if not path.is_file():
            raise RecipeError("there is no such chat template file", name_or_path)
        return path.read_text(encoding="utf-8")
    path = TEMPLATES / f"{name_or_path}.jinja"
    names = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))
    if name_or_path not in names:
        nearest = difflib.get_close_matches(name_or_path, names, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        choices = f"{hint}choices: {', '.join(names)}, or a path ending in .jinja"
        raise RecipeError(f"unknown chat template {name_or_path!r}; {choices}")
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids with every image expanded to its tokens, and unshifted labels (IGNORE: not learned)."""

    input_ids: list[int]
    labels: list[int]


class _Span(NamedTuple):
    """The characters [start, stop) that the template marks for `turn`."""

    turn: Turn
    start: int
    stop: int


@dataclass(frozen=True)
class Renderer:
    """Renders samples for one tokenizer, chat template and image token count; pickles.

    `template` None is the tokenizer's own. What is learned: the template gets each turn's `supervised`
    and ours mark accordingly. A template that ignores it marks every answer; then the spans of answers that
    are not supervised are left out, and a supervised turn of another role is an error.
    """

    tokenizer: PreTrainedTokenizerBase
    image_tokens: Callable[[int, int], int]
    template: str | None = None

    def __post_init__(self) -> None:
        where = self.tokenizer.name_or_path
        if not self.tokenizer.is_fast:
            raise DataError(
                "the tokenizer gives no character offsets", where, "Use a fast tokenizer (tokenizer.json)."
            )
        if IMAGE_MARK not in self.tokenizer.added_tokens_encoder:
            raise DataError(f"the tokenizer has no {IMAGE_MARK} token", where, "Add it as a special token.")
        if not self.template_text:
            raise DataError("the tokenizer has no chat template", where, "Name one in model.template.")

    @cached_property
    def template_text(self) -> str:
        """The Jinja source in force."""
        return (self.tokenizer.chat_template or "") if self.template is None else self.template

    @cached_property
    def image_token_id(self) -> int:
        """The id that stands for one image feature."""
        return self.tokenizer.added_tokens_encoder[IMAGE_MARK]

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Matches what no turn may hold: special tokens, and other added tokens that the template writes."""
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special or token.content in self.template_text}
        tokens = {token for token in tokens if token.strip()} - {IMAGE_MARK}
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    def render(self, sample: ChatSample, sizes: Sequence[Size]) -> Rendered:
        """The sample's ids and labels; the first token is never a label, since nothing predicts it.

        DataError with the sample's key: marks and images differ in number, an answer is empty, a turn's text
        holds a control token, a learned turn an image, or the labels do not decode to the answers.
        """
        ids, labels = self._tokens(sample, sizes)
        return Rendered(self._expand(ids, ids, sizes), self._expand(labels, ids, sizes))

    def length(self, sample: ChatSample, sizes: Sequence[Size]) -> int:
        """Tokens of the rendered sample, after the same checks as `render`."""
        ids, _ = self._tokens(sample, sizes)
        return len(ids) + sum(self.image_tokens(*size) - 1 for size in sizes)

    def prompt(self, sample: ChatSample, sizes: Sequence[Size]) -> list[int]:
        """The ids up to and with the header of the last assistant turn: a prefix of `render`'s.

        Earlier turns are kept; a sample without an assistant turn is all prompt.
        """
        answers = [index for index, turn in enumerate(sample.turns) if turn.role == "assistant"]
        turns = sample.turns[: answers[-1]] if answers else sample.turns
        self._check_text(sample, sizes)
        text, _ = self._apply_template(replace(sample, turns=turns), add_generation_prompt=True)
        ids = self._encode(text).ids
        images = ids.count(self.image_token_id)
        if sum(turn.text.count(IMAGE_MARK) for turn in turns) != images:
            raise DataError("the chat template does not keep every image of the prompt", sample.key)
        return self._expand(ids, ids, sizes[:images])

    def question_prompt(self, sample: ChatSample, sizes: Sequence[Size]) -> list[int]:
        """The ids of the sample up to and with the header of a questioner turn after its last turn.

        A prefix of `render`'s for the sample with that turn. DataError if the template has no such turn.
        """
        asked = replace(sample, turns=(*sample.turns, Turn("questioner", "?")))
        self._check_text(sample, sizes)
        text, marks = self._apply_template(asked, add_generation_prompt=False)
        ids = self._encode(text[: self._learned_spans(asked, marks)[-1].start]).ids
        if ids.count(self.image_token_id) != len(sample.images):
            raise DataError("the chat template does not keep every image of the prompt", sample.key)
        return self._expand(ids, ids, sizes)

    def shorten(self, sample: ChatSample, sizes: Sequence[Size], max_length: int) -> ChatSample | None:
        """The sample with as many of its first question-answer pairs as fit; None if not even the first does.

        Images of dropped turns go with them (the rest are the first ones, as before); none is ever cut.
        """
        stops = [index + 1 for index, turn in enumerate(sample.turns) if turn.role == "assistant"]
        prefixes = [_first_turns(sample, stop) for stop in stops]
        prefixes = [prefix for prefix in prefixes if any(turn.is_supervised for turn in prefix.turns)]
        kept = bisect_right(prefixes, max_length, key=lambda s: self.length(s, sizes[: len(s.images)]))
        return prefixes[kept - 1] if kept else None

    # ------------------------------------------------------------ text

    def _check_text(self, sample: ChatSample, sizes: Sequence[Size]) -> None:
        if sample.image_marks != len(sample.images):
            raise DataError(
                f"{sample.image_marks} {IMAGE_MARK} marks for {len(sample.images)} images",
                sample.key,
                "Write one mark where each image goes.",
            )
        assert len(sizes) == len(sample.images)
        for turn in sample.turns:
            if found := self._control_tokens.search(turn.text):
                raise DataError(
                    f"the {turn.role} turn contains the control token {found[0]!r}",
                    sample.key,
                    "Remove it: the model would take text for structure.",
                )

    def _check_answers(self, sample: ChatSample) -> None:
        learned = [turn for turn in sample.turns if turn.is_supervised]
        if not learned:
            raise DataError("no turn is supervised", sample.key, "Leave it out, or supervise an answer.")
        for turn in learned:
            if not turn.text.strip():
                raise DataError(f"a supervised {turn.role} turn is empty", sample.key)
            if IMAGE_MARK in turn.text:
                raise DataError(f"a supervised {turn.role} turn holds an image", sample.key)

    def _apply_template(
        self, sample: ChatSample, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        messages = [_message(turn) for turn in sample.turns]
        try:
            texts, spans = render_jinja_template(
                [messages],
                chat_template=self.template_text,
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses it: {error}", sample.key) from error
        return texts[0], spans[0]

    def _learned_spans(self, sample: ChatSample, marks: list[tuple[int, int]]) -> list[_Span]:
        """The marked characters of each supervised turn; the marks come in the order of the turns."""
        learned = [turn for turn in sample.turns if turn.is_supervised]
        answers = [turn for turn in sample.turns if turn.role in _ANSWERING]
        if len(marks) == len(learned):
            turns = learned
        elif len(marks) == len(answers) and all(turn.role in _ANSWERING for turn in learned):
            turns = answers
        else:
            raise DataError(
                f"the chat template marks {len(marks)} spans for {len(learned)} supervised turns",
                sample.key,
                "It needs {% generation %} round what is learned, user turns with supervised=true included.",
            )
        return [_Span(turn, *mark) for turn, mark in zip(turns, marks, strict=True) if turn.is_supervised]

    # ------------------------------------------------------------ tokens

    def _encode(self, text: str) -> Encoding:
        # The template writes bos itself. verbose off: too long samples are the loader's business.
        return self.tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]

    def _tokens(self, sample: ChatSample, sizes: Sequence[Size]) -> tuple[list[int], list[int]]:
        """Ids and labels with one token per image."""
        self._check_text(sample, sizes)
        self._check_answers(sample)
        text, marks = self._apply_template(sample, add_generation_prompt=False)
        encoding = self._encode(text)
        ids = encoding.ids
        if ids.count(self.image_token_id) != len(sample.images):
            raise DataError("the chat template does not keep every image", sample.key)
        labels = [IGNORE] * len(ids)
        for span in self._learned_spans(sample, marks):
            first, last = self._token_range(encoding, text, span, sample.key)
            labels[first:last] = ids[first:last]
        labels[0] = IGNORE
        return ids, labels

    def _token_range(self, encoding: Encoding, text: str, span: _Span, key: str) -> tuple[int, int]:
        """The tokens [first, last) that decode to exactly the span, which holds exactly the turn's text.

        Exactly: the span is blanks, the text without its outer blanks, then special tokens and blanks; the
        decoded tokens equal it up to the tokenizer's own normalisation and one leading space (which decoders
        in SentencePiece's manner drop).
        """
        ids = encoding.ids
        written = text[span.start : span.stop]
        before, _, after = written.partition(span.turn.text.strip())
        if before.strip() or self._control_tokens.sub("", after).strip():
            raise DataError(
                f"the chat template marks {written!r} for the turn {span.turn.text!r}",
                key,
                "Its {% generation %} marks must hold the text and its end token only.",
            )
        first = _token_from(encoding, span.start, len(text), len(ids))
        last = _token_from(encoding, span.stop, len(text), len(ids))
        # Where offsets leave out blanks, a token that is all blank belongs to no character: try both ways.
        firsts = (first,) if encoding.char_to_token(span.start) is not None else (first - 1, first)
        for start, stop in itertools.product(firsts, (last, last - 1)):
            if self._same(self._decode(ids[start:stop]), written):
                return start, stop
        raise DataError(
            f"the supervised tokens decode to {self._decode(ids[first:last])!r}, the answer is {written!r}",
            key,
            "The tokenizer joins the answer with its surroundings, or cannot write it.",
        )

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _same(self, decoded: str, written: str) -> bool:
        if decoded in (written, written.removeprefix(" ")):
            return True
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if normalizer is None:
            return False
        return normalizer.normalize_str(decoded.strip(" ")) == normalizer.normalize_str(written.strip(" "))

    def _expand(self, values: list[int], ids: list[int], sizes: Sequence[Size]) -> list[int]:
        """`values` with the one at each image token of `ids` repeated once per feature of that image."""
        if not sizes:
            return list(values)
        expanded: list[int] = []
        done = 0
        for size in sizes:
            place = ids.index(self.image_token_id, done)
            expanded += values[done:place]
            expanded += [values[place]] * self.image_tokens(*size)
            done = place + 1
        return expanded + values[done:]


def _message(turn: Turn) -> dict[str, str | bool]:
    message: dict[str, str | bool] = {"role": turn.role, "content": turn.text}
    return message if turn.supervised is None else {**message, "supervised": turn.supervised}


def _first_turns(sample: ChatSample, stop: int) -> ChatSample:
    turns = sample.turns[:stop]
    images = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    return replace(sample, turns=turns, images=sample.images[:images])


def _token_from(encoding: Encoding, start: int, stop: int, past: int) -> int:
    """The first token of the first character from `start` on that belongs to a token; `past` if none does."""
    found = (encoding.char_to_token(place) for place in range(start, stop))
    return next((token for token in found if token is not None), past)
