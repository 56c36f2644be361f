"""Simulated batches are the loader's; ranks that would wait for each other are found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlmtune.config.schema import ChatStreamConfig
from vlmtune.planning.batches import Micro, Schedule, Shape, as_batch, simulate
from vlmtune.planning.lengths import LLAVA_665K, stated

STREAM = ChatStreamConfig(mix="mix.yaml", batch_size=128, max_length=2048, micro_tokens=4096)
LENGTHS = stated(STREAM, 576, LLAVA_665K, "no mix")


def test_the_stated_lengths_are_those_measured_on_llava_665k() -> None:
    assert LENGTHS.tokens.mean() == pytest.approx(854, rel=0.01)
    assert LENGTHS.images.mean() == pytest.approx(624_610 / 665_298, abs=1e-3)
    assert LENGTHS.tokens.max() <= 2048
    assert np.all(LENGTHS.tokens[LENGTHS.images == 1] > 576)
    assert LENGTHS.supervised.sum() / LENGTHS.tokens.sum() == pytest.approx(0.17, abs=0.03)


@pytest.mark.parametrize(("world", "packing"), [(1, "isolated"), (8, "isolated"), (3, "none")])
def test_every_sample_is_on_one_rank_and_no_micro_batch_exceeds_the_budget(world: int, packing: str) -> None:
    stream = STREAM.model_copy(update={"packing": packing})
    schedule = simulate(LENGTHS, stream, world)
    count = len(schedule.steps) * stream.batch_size
    rows = schedule.ranks()
    assert [row.rank for row in rows] == [*range(world)]
    assert sum(row.tokens for row in rows) == LENGTHS.tokens[:count].sum()
    assert sum(row.images for row in rows) == LENGTHS.images[:count].sum()
    assert max(micro.computed for micro in schedule.micros) <= stream.micro_tokens
    assert not schedule.hangs()
    padded = [row.padding for row in rows]
    assert max(padded) == 0 if packing == "isolated" else 0 < max(padded) < 0.2
    assert 0 <= schedule.imbalance < 0.1


def test_the_busiest_rank_is_measured() -> None:
    long, short = (Micro((Shape(tokens, 1, 1),), "isolated") for tokens in (30, 10))
    schedule = Schedule((((long,), (short,)),), 2)
    assert schedule.imbalance == pytest.approx(0.5)
    assert schedule.worst(0.0) is long


def test_ranks_that_call_different_modules_are_reported() -> None:
    picture, words = (Micro((Shape(20, images, 1),), "isolated") for images in (1, 0))
    even = Schedule((((picture,), (words,)),), 2)
    assert not even.hangs(), "a blank image keeps text-only ranks in step"
    assert even.ranks()[1].blank == 1
    uneven = Schedule((((picture, words), (words, words)), ((picture, words), (words,))), 2)
    (fault,) = uneven.hangs()
    assert "step 2: rank 1 runs 1 micro-batches" in str(fault)


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_a_micro_batch_becomes_a_batch_of_its_shape(packing: str) -> None:
    from tests.tiny import tiny_config
    from vlmtune.planning.bases import model_config

    config = model_config(tiny_config(), Path())
    micro = Micro((Shape(50, 1, 20), Shape(30, 0, 10)), packing)
    batch = as_batch(micro, config)
    assert batch.input_ids.numel() == micro.computed == (80 if packing == "isolated" else 100)
    assert int((batch.input_ids == config.image_token_id).sum()) == 16
    assert int((batch.labels != -100).sum()) == micro.supervised == 30
    assert batch.pixel_values.shape == (1, 3, 32, 32)
    attended = 50**2 + 30**2 if packing == "isolated" else 2 * 50**2
    assert micro.squares == attended


def test_an_empty_micro_batch_is_one_token() -> None:
    empty = Micro((), "isolated")
    assert (empty.tokens, empty.computed, empty.images) == (0, 1, 0)
    assert empty.calls(1) == ("language",)
    assert empty.calls(2) == ("vision", "projector", "language")
    assert replace(empty, packing="none").computed == 1
