"""The scenes of the Ross benchmark: what is asked is true of what is drawn. The run itself is checked by --quick."""

from __future__ import annotations

import json
from collections import Counter
from types import ModuleType

import numpy as np
import pytest

from tests.benchmarks.opened import opened


@pytest.fixture(scope="module")
def scenes() -> ModuleType:
    return opened("ross", "scenes.py")


def truth(scenes, things, text):
    """The answer by another way: the question is parsed and the things are searched."""
    words = text.rstrip("?").split()
    names = [each.name for each in things]
    if text.startswith("how many"):
        wanted = words[2].removesuffix("s")
        return scenes.NUMBERS[sum(wanted in ("shape", each.shape) for each in things)]
    if text.startswith("is there"):
        return "yes" if " ".join(words[3:]) in names else "no"
    if text.startswith("what color"):
        (found,) = {each.color for each in things if each.shape == words[-1]}
        return found
    if text.startswith("what shape"):
        (found,) = {each.shape for each in things if each.color == words[-1]}
        return found
    first, second = (things[names.index(f"{words[place]} {words[place + 1]}")] for place in (2, -2))
    return "yes" if (first.x < second.x if "left of" in text else first.y < second.y) else "no"


def test_every_question_has_its_true_answer_and_answers_are_mixed(scenes):
    answers = Counter()
    for number in range(300):
        rng = np.random.default_rng(number)
        things = scenes.scene(rng)
        scenes.draw(things, rng)
        for each in scenes.questions(things, rng):
            assert truth(scenes, things, each.text) == each.answer, (things, each)
            answers[each.kind, each.answer] += 1
    for kind in ("count", "presence", "color", "shape", "position"):
        found = [count for (name, _), count in answers.items() if name == kind]
        assert len(found) >= 2 and max(found) < 0.65 * sum(found), (kind, answers)


def test_things_are_drawn_where_they_are_and_do_not_touch(scenes):
    for number in range(50):
        rng = np.random.default_rng(number)
        things = scenes.scene(rng)
        pixels = np.asarray(scenes.draw(things, rng))
        for each in things:
            assert tuple(pixels[each.y + 1, each.x]) == scenes.COLORS[each.color]
        assert len({each.name for each in things}) == len(things)


def test_a_split_is_written_once_and_follows_from_its_seed(scenes, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        scenes.write_split(tmp_path / name, 5, seed)
    texts = [(tmp_path / name / "questions.json").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    asked = scenes.test_samples(tmp_path / "a")
    assert len(asked) == len(json.loads(texts[0])) and {each.kind for each in asked} >= {"tiny count"}
    assert (tmp_path / "a" / "images" / "4.png").exists()
