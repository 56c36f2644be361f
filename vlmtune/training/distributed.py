"""The processes of a launch and what they sum; launches that quietly run something else are refused."""

from __future__ import annotations

import os
import platform
import resource

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType

from vlmtune.config.schema import RunConfig
from vlmtune.errors import TrainingError


def build_accelerator(run: RunConfig, folder: str) -> Accelerator:
    """An Accelerator for this launch; without an accelerator device it runs on the CPU (gloo between ranks).

    Micro-batches are counted by the engine, not by accelerate: their number may differ from step to step. Mixed
    precision is the strategy's (training/strategies.py). Raises TrainingError when the launch asked for a strategy
    or for processes that it did not get.
    """
    if not torch.accelerator.is_available():
        # First, and not as Accelerator(cpu=True): that drops DeepSpeed without a word and runs DDP.
        PartialState(cpu=True)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    accelerator = Accelerator(mixed_precision="no", log_with=list(run.trackers) or None, project_dir=folder)
    _demand_what_was_asked(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # Else from_pretrained would shard what it loads, in a collective, also long after training.
        unset_hf_deepspeed_config()
    return accelerator


def _demand_what_was_asked(accelerator: Accelerator) -> None:
    """accelerate falls back to DDP, or to unrelated single processes, with exit code 0; here that is an error."""
    kind, found = accelerator.distributed_type, accelerator.num_processes
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if found != launched:
        raise TrainingError(
            f"{launched} processes were launched and {found} work together",
            "accelerate launch",
            "Launch with one of recipes/launch/*.yaml, or with torchrun.",
        )
    asked = {
        name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("DEEPSPEED", "FSDP")
    }
    for name, wanted in asked.items():
        if wanted and kind != DistributedType[name]:
            raise TrainingError(
                f"the launch asks for {name} and accelerate set up {kind.value}",
                "accelerate launch",
                "FSDP needs GPUs and at least two processes; for DeepSpeed unset ACCELERATE_USE_CPU.",
            )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise TrainingError("FSDP 1 is not supported", "fsdp_config", "Set fsdp_version: 2.")


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
