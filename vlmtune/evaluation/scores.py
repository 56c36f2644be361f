"""Scores of answers: exact match, VQA soft accuracy, and a block for yes/no questions.

Two answers are the same when they are equal after the normalisation of the VQA evaluation
(visualqa.org/evaluation; arXiv 1505.00468, section 4): lower case, no punctuation, no articles, number words
as digits.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}
_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS_AND_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


@dataclass(frozen=True, slots=True)
class Prediction:
    """A model's answer to the last question of a sample; `error` says why there is none."""

    key: str
    kind: str
    prompt: str
    """The last question, as text."""
    prediction: str
    references: tuple[str, ...]
    """The accepted answers; several may be equal (one per annotator)."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Scores of some questions, as shares from 0 to 1."""

    questions: int
    accuracy: float
    """The answer equals the reference that most annotators gave (exact match)."""
    vqa_accuracy: float | None
    """Soft accuracy over the annotators; None without a question that has several references."""


@dataclass(frozen=True, slots=True)
class YesNo:
    """Questions whose reference is yes or no; `yes` is positive. An answer that is neither is wrong."""

    questions: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    """Share of all questions that were answered yes."""
    unparsed: int
    """Answers that are neither yes nor no."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of a set of predictions."""

    overall: Group
    open: Group | None
    """Questions that are not yes/no questions."""
    yes_no: YesNo | None
    by_dataset: Mapping[str, Group]
    by_kind: Mapping[str, Group]
    errors: int
    """Samples that could not be asked; counted as wrong."""

    def lines(self) -> list[str]:
        """What to print: one line a group."""
        groups = {"overall": self.overall}
        if self.open and self.yes_no:
            groups |= {"open": self.open}
        for title, found in (("dataset", self.by_dataset), ("kind", self.by_kind)):
            if len(found) > 1:
                groups |= {f"{title} {name}": group for name, group in found.items()}
        width = max(map(len, groups))
        lines = [f"{name:<{width}}  {_summary(group)}" for name, group in groups.items()]
        if self.yes_no:
            each = self.yes_no
            lines.append(
                f"yes/no: precision {each.precision:.3f}, recall {each.recall:.3f}, F1 {each.f1:.3f}, "
                f"yes-ratio {each.yes_ratio:.3f}, neither {each.unparsed}"
            )
        if self.errors:
            lines.append(f"{self.errors} samples could not be asked and count as wrong")
        return lines


def _summary(group: Group) -> str:
    soft = "" if group.vqa_accuracy is None else f"  VQA {group.vqa_accuracy:.4f}"
    return f"accuracy {group.accuracy:.4f}{soft}  ({group.questions:,} questions)"


# ---------------------------------------------------------------- one answer


def normalize(answer: str) -> str:
    """The answer as the VQA evaluation compares it.

    A mark goes without a trace if it stands at a space somewhere in the answer (or the answer has digits
    round a comma), else it becomes a space; a period stays before a digit only. The official code restores
    the apostrophe of some 120 words (`dont`); here apostrophes are removed, which makes the same pairs equal.
    """
    text = " ".join(answer.lower().split())
    joined = _DIGITS_AND_COMMA.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        at_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if joined or at_space else " ")
    words = _PERIOD.sub("", cleaned).replace("'", "").replace("’", "").split()
    kept = [word for word in words if word not in _ARTICLES] or words  # a lone `A` names a choice
    return " ".join(_NUMBERS.get(word, word) for word in kept)


def is_exact(prediction: Prediction) -> bool:
    """Whether the normalised answer is that of most references (any of them on a tie)."""
    if prediction.error:
        return False
    counts = Counter(map(normalize, prediction.references))
    most = max(counts.values(), default=0)
    return counts[normalize(prediction.prediction)] == most > 0


def soft_accuracy(prediction: Prediction) -> float:
    """min(1, matches / 3) over all references but one, averaged over the one left out (as VQA v2 does).

    With ten references this is the published metric. With one, nothing is left to match: exact match then.
    """
    if len(prediction.references) < 2:
        return float(is_exact(prediction))
    if prediction.error:
        return 0.0
    answer = normalize(prediction.prediction)
    hits = [normalize(reference) == answer for reference in prediction.references]
    return fmean(min(1.0, (sum(hits) - hit) / 3) for hit in hits)


def parse_yes_no(answer: str) -> str | None:
    """`yes` or `no`: the answer's first word, or the only one of both in it; None when it is neither."""
    words = normalize(answer).split()
    if words and words[0] in ("yes", "no"):
        return words[0]
    found = {"yes", "no"} & set(words)
    return found.pop() if len(found) == 1 else None


def truth(prediction: Prediction) -> str:
    """The normalised reference that most annotators gave (the first on a tie)."""
    counts = Counter(map(normalize, prediction.references))
    return counts.most_common(1)[0][0] if counts else ""


# ---------------------------------------------------------------- many answers


def score(predictions: Sequence[Prediction]) -> Scores:
    """The scores of all predictions, by dataset (the key's part before `#`) and by question kind."""
    closed = [each for each in predictions if truth(each) in ("yes", "no")]
    others = [each for each in predictions if truth(each) not in ("yes", "no")]
    return Scores(
        overall=score_group(predictions),
        open=score_group(others) if others else None,
        yes_no=score_yes_no(closed) if closed else None,
        by_dataset=_grouped(predictions, lambda each: each.key.rpartition("#")[0]),
        by_kind=_grouped(predictions, lambda each: each.kind),
        errors=sum(bool(each.error) for each in predictions),
    )


def _grouped(predictions: Iterable[Prediction], name: Callable[[Prediction], str]) -> dict[str, Group]:
    groups: dict[str, list[Prediction]] = {}
    for each in predictions:
        groups.setdefault(name(each), []).append(each)
    return {key: score_group(groups[key]) for key in sorted(groups)}


def score_group(predictions: Sequence[Prediction]) -> Group:
    """Exact match and, where annotators disagree can be told, soft accuracy; zeros for no question."""
    if not predictions:
        return Group(0, 0.0, None)
    several = any(len(each.references) > 1 for each in predictions)
    soft = fmean(map(soft_accuracy, predictions)) if several else None
    return Group(len(predictions), fmean(map(is_exact, predictions)), soft)


def score_yes_no(predictions: Sequence[Prediction]) -> YesNo:
    """The yes/no block of questions whose reference is yes or no."""
    answers = [None if each.error else parse_yes_no(each.prediction) for each in predictions]
    truths = [truth(each) for each in predictions]
    pairs = Counter(zip(answers, truths, strict=True))
    said_yes = sum(answer == "yes" for answer in answers)
    hits = pairs["yes", "yes"]
    precision = hits / said_yes if said_yes else 0.0
    recall = hits / truths.count("yes") if "yes" in truths else 0.0
    return YesNo(
        questions=len(answers),
        accuracy=(hits + pairs["no", "no"]) / len(answers) if answers else 0.0,
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_ratio=said_yes / len(answers) if answers else 0.0,
        unparsed=answers.count(None),
    )


# ---------------------------------------------------------------- files


def write_results(
    folder: Path, predictions: Iterable[Prediction], scores: Scores, facts: Mapping[str, Any] | None = None
) -> None:
    """Writes predictions.jsonl and metrics.json (with `facts` as given), each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = (asdict(each) | {"correct": is_exact(each)} for each in predictions)
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    _write_whole(folder / "predictions.jsonl", lines)
    metrics = {
        "accuracy": scores.overall.accuracy,
        "accuracy_open": scores.open.accuracy if scores.open else None,
        "vqa_accuracy": scores.overall.vqa_accuracy,
        "questions": scores.overall.questions,
        "errors": scores.errors,
        **(facts or {}),
        "yes_no": asdict(scores.yes_no) if scores.yes_no else None,
        "by_kind": {name: asdict(group) for name, group in scores.by_kind.items()},
        "by_dataset": {name: asdict(group) for name, group in scores.by_dataset.items()},
    }
    _write_whole(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
