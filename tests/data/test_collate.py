from __future__ import annotations

import pytest
import torch

from vlmtune.data.collate import bad_slot, collate
from vlmtune.types import IGNORE, Encoded


def encoded(key: str, length: int, images: int = 0) -> Encoded:
    """Ids 10, 11, ...; all but the first two learned; image i holds the value i + 1."""
    ids = torch.arange(10, 10 + length)
    labels = torch.where(torch.arange(length) < 2, IGNORE, ids)
    pixels = torch.stack([torch.full((3, 2, 2), i + 1.0) for i in range(images)]) if images else None
    return Encoded(key, ids, labels, pixels)


def test_isolated_row_restarts_positions_and_carries_no_mask():
    batch = collate([encoded("a#0", 4), encoded("a#1", 3)], "isolated")
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 10, 11, 12]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 12, 13, IGNORE, IGNORE, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.attention_mask is None
    assert batch.pixel_values is None
    assert (batch.keys, batch.bad) == (("a#0", "a#1"), ())


def test_padded_rows_are_right_padded():
    batch = collate([encoded("a#0", 4), encoded("a#1", 3)], "none", pad=7)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13], [10, 11, 12, 7]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 12, 13], [IGNORE, IGNORE, 12, IGNORE]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.cu_seqlens is None


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_first_token_of_a_sample_is_never_learned_from_the_one_before(packing):
    whole = Encoded("a#0", torch.tensor([5, 6]), torch.tensor([5, 6]), None)
    batch = collate([whole, whole], packing)
    assert batch.labels.flatten().tolist() == [IGNORE, 6, IGNORE, 6]
    assert whole.labels.tolist() == [5, 6], "the sample itself is left alone"


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_pixels_stand_in_order_of_appearance(packing):
    batch = collate([encoded("a", 3, images=2), encoded("b", 3), encoded("c", 3, images=1)], packing)
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_bad_slot_keeps_its_place_and_weighs_nothing(packing):
    batch = collate([encoded("a#0", 3), bad_slot("a#1", "missing", pad=9)], packing)
    assert batch.keys == ("a#0", "a#1")
    assert batch.bad == (("a#1", "missing"),)
    assert int((batch.labels != IGNORE).sum()) == 1
    assert batch.input_ids.flatten()[3] == 9


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_no_sample_is_one_pad_token(packing):
    batch = collate([], packing, pad=9)
    assert batch.input_ids.tolist() == [[9]]
    assert batch.labels.tolist() == [[IGNORE]]
    assert batch.keys == batch.bad == ()
    assert (batch.cu_seqlens.tolist() if packing == "isolated" else batch.attention_mask.tolist()) in (
        [0, 1],
        [[1]],
    )
