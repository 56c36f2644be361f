"""The optimizer's state in one file or in many: read whole, or refused."""

from __future__ import annotations

import pytest
import torch

from vlmtune.errors import CheckpointError
from vlmtune.training.checkpoint import Moments, save_moments
from vlmtune.training.parallel import Piece

WEIGHT = torch.arange(15.0).reshape(5, 3)
BIAS = torch.arange(4.0)


def piece(tensor: torch.Tensor, start: int, stop: int) -> Piece:
    return Piece(tensor.flatten()[start:stop], start, tuple(tensor.shape))


def shared(folder, cuts, total=2):
    """Two files: the weight cut at `cuts` (which need not fall on rows), the bias and a counter on either rank."""
    stop, start = cuts
    parts = (
        {"m:weight": piece(WEIGHT, 0, stop), "step:weight": Piece(torch.tensor(7.0), 0, ())},
        {"m:weight": piece(WEIGHT, start, 15), "m:bias": Piece(BIAS, 0, (4,))},
    )
    for rank, pieces in enumerate(parts, 1):
        save_moments(folder / f"optimizer-0000{rank}-of-0000{total}.safetensors", pieces)


def test_pieces_of_all_ranks_are_read_as_whole_tensors(tmp_path):
    shared(tmp_path, (7, 7))
    with Moments(tmp_path) as moments:
        assert set(moments) == {"m:weight", "m:bias", "step:weight"} and len(moments) == 3
        assert torch.equal(moments["m:weight"], WEIGHT)
        assert torch.equal(moments["m:bias"], BIAS)
        assert moments["step:weight"] == 7 and moments["step:weight"].ndim == 0


def test_one_file_of_whole_tensors(tmp_path):
    save_moments(tmp_path / "optimizer.safetensors", {"m:weight": Piece(WEIGHT, 0, (5, 3))})
    with Moments(tmp_path) as moments:
        assert torch.equal(moments["m:weight"], WEIGHT)


@pytest.mark.parametrize("cuts", [(7, 8), (8, 7), (7, 14)])
def test_pieces_with_a_gap_or_an_overlap_are_refused(tmp_path, cuts):
    shared(tmp_path, cuts)
    with Moments(tmp_path) as moments, pytest.raises(CheckpointError, match="pieces of m:weight"):
        moments["m:weight"]


def test_a_missing_file_is_named(tmp_path):
    shared(tmp_path, (7, 7), total=3)
    with pytest.raises(CheckpointError, match="2 of 3 files"):
        Moments(tmp_path)
    with pytest.raises(CheckpointError, match="0 of 1 files"):
        Moments(tmp_path / "nowhere")
