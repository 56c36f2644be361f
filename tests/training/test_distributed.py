"""Launches that would quietly run something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmtune.config.schema import RunConfig
from vlmtune.errors import TrainingError
from vlmtune.training.distributed import build_accelerator
from vlmtune.training.strategies import _warn_of_rounding


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WORLD_SIZE", "2", "2 processes were launched and 1 work together"),
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP and accelerate set up NO"),
    ],
)
def test_a_launch_that_is_not_what_it_asked_for_is_refused(monkeypatch, tmp_path, variable, value, message):
    """accelerate ends with exit code 0 on unrelated single processes, or on DDP instead of FSDP."""
    build_accelerator(RunConfig(), str(tmp_path))
    monkeypatch.setenv(variable, value)
    with pytest.raises(TrainingError, match=message):
        build_accelerator(RunConfig(), str(tmp_path))


def test_one_process_needs_nothing(tmp_path):
    accelerator = build_accelerator(RunConfig(), str(tmp_path))
    assert accelerator.num_processes == 1 and accelerator.mixed_precision == "no"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_in_bfloat16_without_masters_is_said(dtype, caplog):
    """At 2e-5 most of Adam's steps are smaller than the spacing of bfloat16."""
    _warn_of_rounding(nn.Linear(2, 2).to(dtype))
    _warn_of_rounding(nn.Linear(2, 2).to(torch.bfloat16).requires_grad_(False))
    assert ("round away" in caplog.text) == (dtype == torch.bfloat16)
