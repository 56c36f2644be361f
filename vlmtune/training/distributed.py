"""The few collective operations of a step, and what a process knows of its machine."""

from __future__ import annotations

import platform
import resource

import torch
from accelerate import Accelerator

from vlmtune.config.schema import RunConfig


def build_accelerator(run: RunConfig, folder: str) -> Accelerator:
    """An Accelerator for this launch; without an accelerator device it runs on the CPU (gloo between ranks).

    Micro-batches are counted by the engine, not by accelerate: their number may differ from step to step.
    """
    on_cpu = not torch.accelerator.is_available()
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if run.precision == "bf16" else "no",
        log_with=list(run.trackers) or None,
        project_dir=folder,
    )


def sum_over_ranks(accelerator: Accelerator, values: dict[str, float]) -> dict[str, float]:
    """Each value summed over all ranks, in one collective. All ranks pass the same names."""
    if accelerator.num_processes == 1:
        return values
    names = sorted(values)
    packed = torch.tensor(
        [float(values[name]) for name in names], dtype=torch.float64, device=accelerator.device
    )
    total = accelerator.reduce(packed, reduction="sum")
    return dict(zip(names, total.tolist(), strict=True))


def peak_memory_gb(device: torch.device) -> float:
    """The most memory used so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
