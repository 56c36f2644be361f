"""Sample -> Sample functions for training, redrawn each epoch from the sample's own generator.

Whatever a transform does, the images keep their order and the text keeps as many marks as there are images.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from vlmtune.config.plugins import SelfQuestionConfig, ShuffleTurnsConfig, TransformConfig
from vlmtune.config.section import Custom
from vlmtune.errors import RecipeError
from vlmtune.types import IMAGE_MARK, ChatSample, Turn

_LEADING = re.compile(rf"(?:{IMAGE_MARK}\s*)+")
_TRAILING = re.compile(rf"(?:\s*{IMAGE_MARK})+$")


def apply_transforms(
    sample: ChatSample, transforms: Sequence[TransformConfig], rng: np.random.Generator
) -> ChatSample:
    """Returns the sample after every transform in order.

    A dotted `type` is imported as `callable(sample, options: dict, rng) -> sample`; RecipeError without it.
    """
    for transform in transforms:
        match transform:
            case ShuffleTurnsConfig():
                sample = shuffle_turns(sample, rng)
            case SelfQuestionConfig():
                sample = self_question(sample, transform, rng)
            case Custom():
                sample = _custom(transform.type)(sample, dict(transform.model_extra or {}), rng)
    return sample


def shuffle_turns(sample: ChatSample, rng: np.random.Generator) -> ChatSample:
    """Returns the sample with its (user, assistant) exchanges in random order; a system turn stays first.

    Marks that lead or end the first user turn go in front of the new first one. An exchange with marks
    elsewhere (in the middle of a text, in a later turn) keeps its place: its words point at its images.
    """
    head, exchanges, tail = _exchanges(sample.turns)
    if len(exchanges) < 2:
        return sample
    body, marks = _without_marks(exchanges[0][0].text)
    exchanges[0] = (replace(exchanges[0][0], text=body), *exchanges[0][1:])
    free = [place for place, exchange in enumerate(exchanges) if not _has_mark(exchange)]
    moved = list(exchanges)
    for place, origin in zip(free, rng.permutation(free), strict=True):
        moved[place] = exchanges[origin]
    if marks:
        first = moved[0][0]
        moved[0] = (replace(first, text=f"{IMAGE_MARK}\n" * marks + first.text), *moved[0][1:])
    turns = (*head, *(turn for exchange in moved for turn in exchange), *tail)
    # references belong to the last answer, so they go when another one comes last
    kept = sample.references if turns[-1] == sample.turns[-1] else ()
    return replace(sample, turns=turns, references=kept)


def self_question(sample: ChatSample, config: SelfQuestionConfig, rng: np.random.Generator) -> ChatSample:
    """Returns the sample with some of its user turns given to the questioner (SQ-LLaVA, arXiv 2403.11299).

    Without an image there is nothing to ask about: the sample is returned as it is. Marks that lead or end a
    turn stay behind in a user turn of their own, for images are never learned. A turn with marks elsewhere, or
    with nothing but marks, is left to the user. One draw for each turn that may change, whatever comes out.
    """
    if not sample.images:
        return sample
    turns: list[Turn] = []
    seen_user = False
    for turn in sample.turns:
        eligible = turn.role == "user" and (seen_user or config.first_turn)
        seen_user |= turn.role == "user"
        body, marks = _without_marks(turn.text)
        if not eligible or not body.strip() or IMAGE_MARK in body or rng.random() >= config.probability:
            turns.append(turn)
            continue
        if marks:
            turns.append(Turn("user", "\n".join([IMAGE_MARK] * marks)))
        turns.append(Turn("questioner", body))
    return replace(sample, turns=tuple(turns))


def _exchanges(turns: Sequence[Turn]) -> tuple[list[Turn], list[tuple[Turn, ...]], list[Turn]]:
    """Returns what precedes the first user turn, the exchanges, and user turns unanswered at the end.

    An exchange is one or more user turns with all that follows up to the next user turn.
    """
    starts = [
        place
        for place, turn in enumerate(turns)
        if turn.role == "user" and (place == 0 or turns[place - 1].role != "user")
    ]
    groups = [tuple(turns[start:stop]) for start, stop in pairwise([*starts, len(turns)])]
    head = list(turns[: starts[0]]) if starts else list(turns)
    tail = list(groups.pop()) if groups and groups[-1][-1].role == "user" else []
    return head, groups, tail


def _without_marks(text: str) -> tuple[str, int]:
    """Returns the text without leading or trailing marks, and how many; as it is if others are left."""
    end = _LEADING.match(text) or _TRAILING.search(text)
    if end is None:
        return text, 0
    body = text[: end.start()] + text[end.end() :]
    return (text, 0) if IMAGE_MARK in body else (body, end[0].count(IMAGE_MARK))


def _has_mark(exchange: tuple[Turn, ...]) -> bool:
    return any(IMAGE_MARK in turn.text for turn in exchange)


def _custom(path: str) -> Callable[[ChatSample, dict[str, Any], np.random.Generator], ChatSample]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"transform {path} cannot be imported: {error}", remedy="Give the full import path of a function."
        ) from error


__all__ = ["apply_transforms", "self_question", "shuffle_turns"]
