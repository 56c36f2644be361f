"""Whether a question about an easy-VQA picture is well formed, and whether the picture can answer it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

from vlmtune.data.easy_vqa import Facts, facts_of, presupposed
from vlmtune.evaluation.asking import Question


class Judgement(NamedTuple):
    """Counts of questions."""

    questions: int
    well_formed: int
    """Came to their end token, end in `?`, and have one of the dataset's forms."""
    answerable: int
    """Of the well-formed ones, those that take nothing for granted that is false of the picture."""


def judge(questions: Sequence[Question], scene: Facts) -> Judgement:
    """The judgement on what was asked about one picture."""
    granted = [presupposed(each.text) for each in questions if each.ended and each.text.endswith("?")]
    formed = [facts for facts in granted if facts is not None]
    return Judgement(len(questions), len(formed), sum(_holds(facts, scene) for facts in formed))


def truth(pairs: Sequence[tuple[str, str]]) -> Facts:
    """What a picture's own questions and answers prove of it."""
    return reduce(Facts.__and__, (facts_of(*pair) for pair in pairs))


def _holds(granted: Facts, scene: Facts) -> bool:
    both = granted & scene
    return bool(both.colors) and bool(both.shapes)
