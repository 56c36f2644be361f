"""The SQ-LLaVA benchmark: its arms differ as they say, its checker knows the dataset, its means are means."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.benchmarks.opened import opened
from vlmtune.data.easy_vqa import Facts, presupposed
from vlmtune.evaluation.asking import Question


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return opened("sq_llava", "run.py")


@pytest.fixture(scope="module")
def asking() -> ModuleType:
    return opened("sq_llava", "asking.py")


def test_arms_differ_in_what_they_change_and_in_nothing_else(bench: ModuleType, tmp_path: Path):
    options = argparse.Namespace(work=tmp_path, steps=7)
    recipes = {arm: bench.arm_recipe(arm, 2, tmp_path, options).model_dump() for arm in bench.ARMS}
    assert list(recipes) == ["control", "sq", "prototypes", "sq_prototypes", "all"]
    asks = {arm: each["data"]["chat"].pop("transforms") for arm, each in recipes.items()}
    projectors = {arm: each["model"].pop("projector")["type"] for arm, each in recipes.items()}
    towers = {arm: each["tuning"].pop("vision")["mode"] for arm, each in recipes.items()}
    assert [arm for arm, made in asks.items() if made] == ["sq", "sq_prototypes", "all"]
    assert {arm for arm, kind in projectors.items() if kind == "clustering"} == {
        "prototypes",
        "sq_prototypes",
        "all",
    }
    assert towers == dict.fromkeys(recipes, "frozen") | {"all": "lora"}
    for each in recipes.values():
        assert each["run"].pop("dir") and each["run"]["seed"] == 2 and each["schedule"]["steps"] == 7
    assert all(each == recipes["control"] for each in recipes.values())


@pytest.mark.parametrize(
    ("question", "granted"),
    [
        ("is there a blue shape?", Facts()),
        ("does the image not contain a circle?", Facts()),
        ("what color is the shape?", Facts()),
        ("what color is the triangle?", Facts(shapes=frozenset({"triangle"}))),
        ("what is the blue shape?", Facts(colors=frozenset({"blue"}))),
        ("what shape no circle in the?", None),
        ("is there a blue shape", None),
    ],
)
def test_what_a_question_takes_for_granted(question: str, granted: Facts | None):
    assert presupposed(question) == granted


def test_questions_are_judged_by_form_and_by_the_scene(asking: ModuleType):
    scene = asking.truth([("what color is the shape?", "blue"), ("what shape is present?", "circle")])
    asked = [
        Question("what color is the circle?", True),
        Question("what color is the triangle?", True),
        Question("what is the blue shape?", True),
        Question("is there a red shape?", True),
        Question("is there a red shape?", False),
        Question("what what?", True),
    ]
    assert asking.judge(asked, scene) == (6, 4, 3)


def test_every_test_question_is_well_formed_and_answerable(asking: ModuleType):
    talks = asking.test_set("conversation")
    truths = asking.truths_of(talks)
    for row in range(0, len(talks), 50):
        sample = talks[row]
        questions = [Question(q, True) for q, _ in talks.samples[row].pairs]
        assert asking.judge(questions, truths[sample.images[0].name]) == (len(questions),) * 3


def test_means_and_standard_errors(bench: ModuleType):
    def seed(value: float) -> dict[str, Any]:
        names = ("accuracy", "accuracy_open", "question_nll", "answer_nll", "shuffle_gap")
        return dict.fromkeys(names, value) | {"asked": {"well_formed": value, "answerable": value}}

    made = bench.summary([seed(1.0), seed(2.0), seed(6.0)], bench.numbers)
    assert made["mean"]["accuracy"] == 3.0
    assert made["standard_error"]["accuracy"] == pytest.approx((7 / 3) ** 0.5)
    assert bench.summary([seed(1.0)], bench.numbers)["standard_error"]["accuracy"] is None
    head, _, row = bench.table_lines({"arms": {"sq": made}})
    assert head.startswith("| arm | answer accuracy |") and "3.000 ± 1.528" in row
