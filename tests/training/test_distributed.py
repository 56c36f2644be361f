"""Launches that would quietly run something else."""

from __future__ import annotations

import pytest

from vlmtune.config.schema import RunConfig
from vlmtune.errors import TrainingError
from vlmtune.training.distributed import build_accelerator


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
