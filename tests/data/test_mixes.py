from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.config.mix import ChatJsonlSource, Mix
from vlmtune.config.schema import HeldOutConfig
from vlmtune.data.mixes import MixOrder, epoch_amounts, split_held_out
from vlmtune.errors import DataError

pairs = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 30)), min_size=1, max_size=4).filter(
    lambda each: any(amount for _, amount in each)
)


def order(each: list[tuple[int, int]], seed: int = 0) -> MixOrder:
    return MixOrder([size for size, _ in each], [amount for _, amount in each], seed)


def source(name: str, **amount: float) -> ChatJsonlSource:
    return ChatJsonlSource(name=name, format="chat_jsonl", path="x.jsonl", **amount)


@settings(deadline=None, max_examples=100)
@given(pairs, st.integers(0, 5), st.integers(0, 3))
def test_any_mix_of_any_sizes_has_exactly_its_amounts_in_every_epoch(
    each: list[tuple[int, int]], number: int, seed: int
) -> None:
    """PITFALLS 8: one-modality or one-element sources crash elsewhere."""
    made = order(each, seed).epoch(number)
    assert made.shape == (sum(amount for _, amount in each), 2) and made.dtype == np.int64
    drawn = Counter(made[:, 0].tolist())
    for index, (size, amount) in enumerate(each):
        rows = made[made[:, 0] == index, 1]
        assert drawn[index] == amount
        assert not amount or (rows.min() >= 0 and rows.max() < size)
        if amount == size:
            assert sorted(rows) == list(range(size))


@settings(deadline=None, max_examples=60)
@given(pairs, st.integers(1, 7))
def test_every_row_is_drawn_equally_often_give_or_take_one(each: list[tuple[int, int]], epochs: int) -> None:
    mix = order(each)
    drawn = Counter(tuple(pair) for number in range(epochs) for pair in mix.epoch(number).tolist())
    for index, (size, amount) in enumerate(each):
        counts = [drawn[index, row] for row in range(size)]
        assert sum(counts) == epochs * amount and max(counts) - min(counts) <= 1


@settings(deadline=None, max_examples=60)
@given(pairs, st.integers(0, 100))
def test_any_position_is_sought_without_what_came_before(each: list[tuple[int, int]], position: int) -> None:
    """PITFALLS 21: a resume replays nothing and repeats nothing."""
    fresh, played = order(each), order(each)
    number, place = divmod(position, played.epoch_size)
    through = np.concatenate([played.epoch(k) for k in range(number + 1)])
    assert fresh.at(position) == tuple(through[position])
    assert fresh.at(position) == tuple(fresh.epoch(number)[place])


def test_epochs_and_seeds_differ_and_the_same_seed_does_not() -> None:
    each = [(50, 50), (20, 10)]
    epochs = [order(each, seed).epoch(number).tobytes() for seed in (0, 1) for number in (0, 1)]
    assert len(set(epochs)) == 4
    assert order(each, 1).epoch(1).tobytes() == epochs[3]
    slots = [order(each).epoch(number)[:, 0].tolist() for number in (0, 1)]
    assert slots[0] != slots[1] and slots[0] != sorted(slots[0])


def test_sources_of_one_size_are_drawn_in_orders_of_their_own() -> None:
    made = order([(40, 10), (40, 10)]).epoch(0)
    assert set(made[made[:, 0] == 0, 1].tolist()) != set(made[made[:, 0] == 1, 1].tolist())


def test_an_epoch_is_read_only_and_seeking_far_is_quick() -> None:
    mix = order([(300_000, 300_000)])
    with pytest.raises(ValueError, match="read-only"):
        mix.epoch(0)[0] = 1
    start = time.perf_counter()
    mix.at(300_000 * 1_000_000 + 5)
    assert time.perf_counter() - start < 5  # a replay of a million epochs takes hours


@pytest.mark.parametrize(("sizes", "amounts"), [([0], [1]), ([3], [1, 1])])
def test_nothing_is_drawn_from_nothing(sizes: list[int], amounts: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot draw"):
        MixOrder(sizes, amounts, 0)


def test_amounts_come_from_weight_count_or_size() -> None:
    mix = Mix(sources=(source("a"), source("b", weight=0.5), source("c", count=7), source("d", weight=0.01)))
    assert epoch_amounts(mix, [10, 9, 3, 20]) == (10, 4, 7, 1)
    with pytest.raises(DataError, match="b, d: no sample"):
        epoch_amounts(mix, [10, 0, 3, 0])


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 400), st.floats(0, 0.49), st.integers(1, 50))
def test_held_out_rows_and_the_others_share_nothing_and_miss_nothing(
    size: int, fraction: float, most: int
) -> None:
    train, held = split_held_out(size, "a", HeldOutConfig(fraction=fraction, most=most))
    assert sorted([*train, *held]) == list(range(size))
    assert len(held) <= min(most, fraction * size + 1e-6) and (not size or len(train))
    assert list(train) == sorted(train) and list(held) == sorted(held)


def test_held_out_rows_depend_on_the_name_and_are_spread() -> None:
    config = HeldOutConfig(fraction=0.29, most=1000)
    rows = [split_held_out(1000, name, config)[1].tolist() for name in ("a", "a", "b")]
    assert rows[0] == rows[1] != rows[2] and len(rows[0]) == 290
    assert max(rows[0]) > 900 and min(rows[0]) < 100
    assert split_held_out(100, "a", config)[1].size == 29
    assert split_held_out(1000, "a", HeldOutConfig(fraction=0))[1].size == 0
    assert split_held_out(1, "a", config)[0].tolist() == [0]
