"""Scores against the naive forms of their definitions."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.evaluation.scores import (
    Prediction,
    is_exact,
    normalize,
    parse_yes_no,
    score,
    score_yes_no,
    soft_accuracy,
    write_results,
)


def make(answer: str, *references: str, key: str = "set#0", kind: str = "", error: str = "") -> Prediction:
    return Prediction(key, kind, "what?", answer, references, error)


# ---------------------------------------------------------------- normalisation


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Red.", "red"),
        (" A  red\tcircle\n", "red circle"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("black/white", "black white"),
        ("yes, it is", "yes it is"),
        ("T-shirt", "t shirt"),
        ("well - maybe", "well maybe"),
        ("don't", "dont"),
        ("dont", "dont"),
        ("A", "a"),
        ("A.", "a"),
        ("the", "the"),
        ("", ""),
        ("?", ""),
    ],
)
def test_normalize(answer: str, normal: str) -> None:
    assert normalize(answer) == normal


def official(answer: str) -> str:
    """The published evaluation, step by step, without its table of contractions."""
    text = answer.lower().replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in [*";/[]", '"', *"{}()=+", "\\", *"_-><@`,?!"]:
        if (mark + " " in text or " " + mark in text) or re.search(r"(\d)(,)(\d)", text) is not None:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.sub(r"(?!<=\d)(\.)(?!\d)", "", out)
    numbers = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
    words = [numbers.get(word, word) for word in out.split()]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.sampled_from(["a", "The", "red", "two", "1", "x", " ", ",", ".", "-", "/", "?", "(", "3"]),
        max_size=8,
    )
)
def test_normalize_is_the_official_form(pieces: list[str]) -> None:
    answer = " ".join("".join(pieces).split())
    if official(answer):
        assert normalize(answer) == official(answer)


# ---------------------------------------------------------------- one answer


WORDS = st.sampled_from(["x", "red", "blue", "Red."])


def naive_soft(answer: str, references: tuple[str, ...]) -> float:
    """The mean over every choice of all references but one of min(1, matches / 3)."""
    subsets = list(combinations([normalize(each) for each in references], len(references) - 1))
    return sum(min(1, subset.count(normalize(answer)) / 3) for subset in subsets) / len(subsets)


@settings(deadline=None, max_examples=100)
@given(WORDS, st.lists(WORDS, min_size=2, max_size=10))
def test_soft_accuracy_is_the_mean_over_left_out_annotators(answer: str, references: list[str]) -> None:
    expected = naive_soft(answer, tuple(references))
    assert soft_accuracy(make(answer, *references)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_soft_accuracy_of_ten_annotators(matches: int, accuracy: float) -> None:
    references = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert soft_accuracy(make("red", *references)) == pytest.approx(accuracy)


def test_exact_match_takes_the_answer_of_most() -> None:
    references = ("red", "Red.", "blue")
    assert is_exact(make("the red", *references))
    assert not is_exact(make("blue", *references))
    assert is_exact(make("blue", "red", "blue"))  # a tie
    assert not is_exact(make("red", "red", error="no picture"))
    assert not is_exact(make(""))
    assert not is_exact(make("B", "A"))


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("Yes.", "yes"),
        ("no, there is not", "no"),
        ("yes and no", "yes"),
        ("There is no dog", "no"),
        ("either yes or no", None),
        ("a dog", None),
        ("nobody", None),
        ("", None),
    ],
)
def test_parse_yes_no(answer: str, parsed: str | None) -> None:
    assert parse_yes_no(answer) == parsed


# ---------------------------------------------------------------- many answers

ANSWERS = st.sampled_from(["yes", "No.", "perhaps"])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(ANSWERS, st.sampled_from(["yes", "no"])), min_size=1, max_size=12))
def test_yes_no_block(pairs: list[tuple[str, str]]) -> None:
    block = score_yes_no([make(answer, reference) for answer, reference in pairs])
    said = [(answer.lower().strip("."), reference) for answer, reference in pairs]
    positives = [pair for pair in said if pair[1] == "yes"]
    claims = [pair for pair in said if pair[0] == "yes"]
    hits = said.count(("yes", "yes"))
    assert block.accuracy == pytest.approx(sum(a == b for a, b in said) / len(said))
    assert block.precision == pytest.approx(hits / len(claims) if claims else 0)
    assert block.recall == pytest.approx(hits / len(positives) if positives else 0)
    assert block.f1 == pytest.approx(2 * hits / (len(claims) + len(positives)) if hits else 0)
    assert block.yes_ratio == pytest.approx(len(claims) / len(said))
    assert block.unparsed == sum(answer == "perhaps" for answer, _ in said)


SET = (
    make("red", "red", key="a#0", kind="color"),
    make("blue", "red", key="a#1", kind="color"),
    make("yes", "yes", key="a#2", kind="yes/no"),
    make("no", "yes", key="b#x#3", kind="yes/no"),
    make("circle", "circle", key="b#x#4", kind="shape", error="cut off"),
)


def test_groups() -> None:
    scores = score(SET)
    assert (scores.overall.questions, scores.overall.accuracy) == (5, pytest.approx(0.4))
    assert scores.open is not None
    assert (scores.open.questions, scores.open.accuracy) == (3, pytest.approx(1 / 3))
    assert {name: group.accuracy for name, group in scores.by_kind.items()} == {
        "color": 0.5,
        "shape": 0.0,
        "yes/no": 0.5,
    }
    assert {name: group.questions for name, group in scores.by_dataset.items()} == {"a": 3, "b#x": 2}
    assert scores.errors == 1
    assert scores.overall.vqa_accuracy is None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(SET), max_size=12), st.randoms())
def test_scores_do_not_depend_on_the_order(predictions: list[Prediction], random) -> None:
    shuffled = list(predictions)
    random.shuffle(shuffled)
    first, second = score(predictions), score(shuffled)
    assert first.by_kind == pytest.approx(second.by_kind)
    assert first.yes_no == second.yes_no
    kinds = first.by_kind.values()
    total = sum(group.questions * group.accuracy for group in kinds)
    assert total == pytest.approx(first.overall.accuracy * len(predictions))


def test_lines_and_files(tmp_path: Path) -> None:
    scores = score(SET)
    assert scores.lines()[0].startswith("overall")
    assert scores.lines()[-1] == "1 samples could not be asked and count as wrong"
    write_results(tmp_path, SET, scores, {"train_seconds": 12.5})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["accuracy"], metrics["accuracy_open"]) == (0.4, pytest.approx(1 / 3))
    assert (metrics["questions"], metrics["train_seconds"]) == (5, 12.5)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [each.key for each in SET]
    assert [row["correct"] for row in rows] == [True, False, True, False, False]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "predictions.jsonl"}


def test_no_prediction_at_all(tmp_path: Path) -> None:
    scores = score([])
    assert scores.overall.questions == 0
    write_results(tmp_path, [], scores)
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy_open"] is None
    assert scores.lines()
