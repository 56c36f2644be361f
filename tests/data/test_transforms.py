from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.config.plugins import ShuffleTurnsConfig
from vlmtune.config.section import Custom
from vlmtune.data.transforms import apply_transforms
from vlmtune.errors import RecipeError
from vlmtune.types import ChatSample, ImageRef, Turn

SHUFFLE = ShuffleTurnsConfig(type="shuffle_turns")


def sample(*texts: str, images: int | None = None, system: str | None = None) -> ChatSample:
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    if system is not None:
        turns.insert(0, Turn("system", system))
    count = sum(text.count("<image>") for text in texts) if images is None else images
    return ChatSample("k#0", tuple(ImageRef(f"{i}.png") for i in range(count)), tuple(turns))


def shuffled(given_sample: ChatSample, seed: int = 0) -> ChatSample:
    return apply_transforms(given_sample, [SHUFFLE], np.random.default_rng(seed))


def texts(of: ChatSample) -> list[str]:
    return [turn.text for turn in of.turns]


def test_pairs_move_together_and_the_mark_and_the_system_turn_stay_first() -> None:
    talk = sample("<image>\nq1", "a1", "q2", "a2", "q3", "a3", system="s")
    seen = Counter()
    for seed in range(60):
        moved = texts(shuffled(talk, seed))
        assert moved[0] == "s" and moved[1].startswith("<image>\nq")
        plain = [text.removeprefix("<image>\n") for text in moved[1:]]
        assert all(question[1] == answer[1] for question, answer in zip(plain[::2], plain[1::2], strict=True))
        seen[tuple(plain)] += 1
    assert len(seen) == 6 and "".join(texts(talk)).count("<image>") == 1


def test_a_trailing_mark_goes_in_front_as_llava_puts_it() -> None:
    moved = texts(shuffled(sample("q1\n<image>", "a1", "q2", "a2"), seed=1))
    assert moved in (["<image>\nq1", "a1", "q2", "a2"], ["<image>\nq2", "a2", "q1", "a1"])


def test_turns_whose_words_point_at_their_images_keep_their_place() -> None:
    talk = sample("is <image> like <image>?", "a1", "q2", "a2", "and <image>?", "a3", "q4", "a4")
    orders = {tuple(texts(shuffled(talk, seed))) for seed in range(20)}
    assert orders == {
        tuple(texts(talk)),
        ("is <image> like <image>?", "a1", "q4", "a4", "and <image>?", "a3", "q2", "a2"),
    }


def test_later_images_do_not_hold_back_the_turns_before_them() -> None:
    talk = sample("<image>\nq1", "a1", "q2", "a2", "and <image>?", "a3")
    orders = {tuple(texts(shuffled(talk, seed))) for seed in range(20)}
    assert orders == {tuple(texts(talk)), ("<image>\nq2", "a2", "q1", "a1", "and <image>?", "a3")}
    between = sample("<image> or <image>", "a1", "q2", "a2")
    assert {tuple(texts(shuffled(between, seed))) for seed in range(9)} == {tuple(texts(between))}


def test_short_and_odd_conversations_lose_nothing() -> None:
    for talk in (sample(), sample("q"), sample("<image>\nq", "a"), sample("q", "a", system="s")):
        assert shuffled(talk) == talk
    open_end = sample("q1", "a1", "q2", "a2", "q3")
    assert {texts(shuffled(open_end, seed))[-1] for seed in range(9)} == {"q3"}
    double = replace(
        open_end, turns=tuple(Turn(role, role) for role in ("assistant", "user", "user", "assistant"))
    )
    assert shuffled(double) == double


def test_references_stay_only_with_their_answer() -> None:
    talk = replace(sample("q1", "a1", "q2", "a2"), references=("a2", "two"))
    for seed in range(10):
        moved = shuffled(talk, seed)
        assert moved.references == (talk.references if texts(moved)[-1] == "a2" else ())


pieces = st.lists(st.sampled_from(["<image>", "<image>\n", "\n<image>", "a", " ", "b\n"]), max_size=4).map(
    "".join
)


@settings(deadline=None, max_examples=200)
@given(st.lists(pieces, max_size=9), st.booleans(), st.integers(0, 99))
def test_marks_images_and_turns_are_kept(words: list[str], system: bool, seed: int) -> None:
    talk = sample(*words, system="s" if system else None)
    moved = shuffled(talk, seed)
    assert moved.image_marks == talk.image_marks and moved.images == talk.images and moved.key == talk.key
    assert [turn.role for turn in moved.turns] == [turn.role for turn in talk.turns]

    def bare(of: ChatSample) -> Counter[str]:
        return Counter(turn.text.replace("<image>", "").strip() for turn in of.turns)

    assert bare(moved) == bare(talk)
    assert shuffled(talk, seed) == moved


def add_word(given_sample: ChatSample, options: dict[str, Any], rng: np.random.Generator) -> ChatSample:
    last = given_sample.turns[-1]
    new = replace(last, text=f"{last.text} {options['word']} {rng.integers(9)}")
    return replace(given_sample, turns=(*given_sample.turns[:-1], new))


def test_a_dotted_type_is_imported_and_gets_its_options_and_the_generator() -> None:
    custom = Custom.model_validate({"type": f"{__name__}.add_word", "word": "really"})
    first, again = (
        apply_transforms(sample("q", "a"), [SHUFFLE, custom], np.random.default_rng(3)) for _ in range(2)
    )
    assert first == again and first.turns[-1].text.startswith("a really ")
    for missing in (f"{__name__}.nothing", "no_such_package.f"):
        with pytest.raises(RecipeError, match=f"transform {missing} cannot be imported"):
            apply_transforms(sample("q", "a"), [Custom(type=missing)], np.random.default_rng(0))


def test_no_transform_changes_nothing() -> None:
    talk = sample("q", "a")
    assert apply_transforms(talk, [], np.random.default_rng(0)) is talk
