"""easy-VQA: 64 x 64 pictures of one coloured shape with questions, from its PyPI package.

Captions are derived from the split's own questions and answers and from nothing else, so that training on
them uses no label the question task does not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any, final

from vlmtune.config.mix import EasyVqaSource
from vlmtune.data.caching import digest
from vlmtune.errors import DataError
from vlmtune.types import IMAGE_MARK, ChatSample, ImageRef, Turn

COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})
CAPTION_PROMPT = "describe the image."

_THING = rf"(?:(?P<color>{'|'.join(sorted(COLORS))}) shape|(?P<shape>{'|'.join(sorted(SHAPES))}))"
_PRESENCE = [
    re.compile(pattern)
    for pattern in (
        rf"is there(?P<no> not)? an? {_THING}(?: in the image)?\?",
        rf"does the image(?P<no> not)? contain an? {_THING}\?",
        rf"is (?:an?|(?P<no>no)) {_THING} present\?",
    )
]
_COLOR_OF = re.compile(rf"what (?:is the color of|color is) the (?:shape|{_THING})\?")
_SHAPE_OF = re.compile(
    rf"what (?:is the {_THING}|shape does the image contain|shape is in the image|shape is present)\?"
)


@final
@dataclass(frozen=True)
class Facts:
    """The colours and shapes an image can still have; the true ones are always among them."""

    colors: frozenset[str] = COLORS
    shapes: frozenset[str] = SHAPES

    @property
    def complete(self) -> bool:
        """Whether both colour and shape are proved."""
        return len(self.colors) == len(self.shapes) == 1

    def __and__(self, other: Facts) -> Facts:
        return Facts(self.colors & other.colors, self.shapes & other.shapes)


def facts_of(question: str, answer: str) -> Facts:
    """Returns what one question with its answer tells; a colour or shape an open question presupposes counts.

    Raises DataError for a question or an answer that is none of the dataset's.
    """
    for pattern in _PRESENCE:
        if (match := pattern.fullmatch(question)) and answer in ("yes", "no"):
            return _presence(match, present=(answer == "yes") != (match["no"] is not None))
    if (match := _COLOR_OF.fullmatch(question)) and answer in COLORS:
        return _presence(match, present=True) & Facts(colors=frozenset({answer}))
    if (match := _SHAPE_OF.fullmatch(question)) and answer in SHAPES:
        return _presence(match, present=True) & Facts(shapes=frozenset({answer}))
    raise DataError(
        f"not an easy-VQA question with its answer: {question!r}, {answer!r}", remedy="Install easy-vqa==1.0."
    )


def presupposed(question: str) -> Facts | None:
    """Returns what a question takes for granted of its image; None if it has none of the dataset's forms."""
    if any(pattern.fullmatch(question) for pattern in _PRESENCE):
        return Facts()
    match = _COLOR_OF.fullmatch(question) or _SHAPE_OF.fullmatch(question)
    return None if match is None else _presence(match, present=True)


def caption_of(facts: Facts) -> str | None:
    """Returns "a blue circle", "a blue shape" or "a circle": what is proved; None if nothing is."""
    color, shape = _only(facts.colors), _only(facts.shapes)
    if color is None and shape is None:
        return None
    return " ".join(word for word in ("a", color, shape or "shape") if word)


@final
@dataclass(frozen=True)
class EasyVqaSample:
    """One image and what is asked about it: (question, answer) pairs."""

    image: int
    pairs: tuple[tuple[str, str], ...]


@final
@dataclass(frozen=True)
class EasyVqa:
    """The samples of one split and task."""

    name: str
    fingerprint: str
    samples: tuple[EasyVqaSample, ...]
    root: Path

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> ChatSample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample = self.samples[index]
        turns = [
            turn
            for question, answer in sample.pairs
            for turn in (Turn("user", question), Turn("assistant", answer))
        ]
        turns[0] = Turn("user", f"{IMAGE_MARK}\n{turns[0].text}")
        image = ImageRef(f"{sample.image}.png", self.root)
        return ChatSample(f"{self.name}#{index}", (image,), tuple(turns), _kind(turns[-1].text))


def open_easy_vqa(config: EasyVqaSource) -> EasyVqa:
    """Returns the samples of a split. Raises DataError if the package is missing."""
    package = _package()
    train = config.split == "train"
    questions = package.get_train_questions() if train else package.get_test_questions()
    paths = package.get_train_image_paths() if train else package.get_test_image_paths()
    samples = _samples(list(zip(*questions, strict=True)), config)
    root = Path(next(iter(paths.values()))).parent
    return EasyVqa(config.name, digest(config.name, samples), samples, root)


def _package() -> Any:
    try:
        import easy_vqa
    except ImportError:
        raise DataError(
            "easy_vqa needs the easy-vqa package", remedy='Install it: pip install "vlmtune[demo]".'
        ) from None
    return easy_vqa


def _samples(rows: list[tuple[str, str, int]], config: EasyVqaSource) -> tuple[EasyVqaSample, ...]:
    """Returns the task's samples of (question, answer, image) rows, which stand together by image."""
    if config.task == "question":
        return tuple(EasyVqaSample(image, ((question, answer),)) for question, answer, image in rows)
    made = []
    for image, group in groupby(rows, key=lambda row: row[2]):
        pairs = tuple((question, answer) for question, answer, _ in group)
        made += [EasyVqaSample(image, part) for part in _parts(pairs, config)]
    return tuple(made)


def _parts(pairs: tuple[tuple[str, str], ...], config: EasyVqaSource) -> list[tuple[tuple[str, str], ...]]:
    """Returns the conversations about one image: `turns` questions each, or a caption if one is proved."""
    if config.task == "caption":
        caption = _caption(pairs, config.complete)
        return [caption] if caption else []
    # Strides, not runs: neighbours in the file are of one kind.
    parts = -(-len(pairs) // (config.turns or len(pairs)))
    return [pairs[start::parts] for start in range(parts)]


def _caption(pairs: tuple[tuple[str, str], ...], complete: bool) -> tuple[tuple[str, str], ...]:
    """Returns the caption as a question and its answer; nothing if the answers do not prove (enough of) one."""
    facts = reduce(Facts.__and__, (facts_of(*pair) for pair in pairs))
    caption = caption_of(facts)
    return () if caption is None or (complete and not facts.complete) else ((CAPTION_PROMPT, caption),)


def _presence(match: re.Match[str], present: bool) -> Facts:
    colors = COLORS if match["color"] is None else frozenset({match["color"]})
    shapes = SHAPES if match["shape"] is None else frozenset({match["shape"]})
    if present:
        return Facts(colors, shapes)
    return Facts(COLORS - colors or COLORS, SHAPES - shapes or SHAPES)


def _only(values: frozenset[str]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    if answer in COLORS:
        return "color"
    return "shape" if answer in SHAPES else "caption"


__all__ = ["EasyVqa", "Facts", "caption_of", "facts_of", "open_easy_vqa", "presupposed"]
