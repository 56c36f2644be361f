"""What `vlmtune doctor` says: versions, devices, and what is on, what is off and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

import psutil

_CORE = ("vlmtune", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "pillow")
_OPTIONAL = {
    "easy-vqa": "the demo; pip install 'vlmtune[demo]'",
    "datasets": "format: hf_dataset; pip install 'vlmtune[datasets]'",
    "flash-attn": "attention: flash_attention_2 on a CUDA GPU; pip install 'vlmtune[flash]'",
    "tensorboard": "run.trackers: [tensorboard]; pip install 'vlmtune[track]'",
    "wandb": "run.trackers: [wandb]; pip install 'vlmtune[track]'",
    "trackio": "run.trackers: [trackio]; pip install 'vlmtune[track]'",
}


def lines() -> Iterator[str]:
    """The report, line by line."""
    import torch

    from vlmtune.models.attention import choose_attention

    memory = psutil.virtual_memory().total / 2**30
    yield f"python {platform.python_version()} on {platform.machine()}, {psutil.cpu_count()} cores, {memory:.0f} GiB"
    for name in _CORE:
        yield f"  {name:<14} {_version(name)}"
    yield "devices"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        yield f"  cuda:{index}         {card.name}, {card.total_memory / 2**30:.0f} GiB, {bf16}"
    if not torch.cuda.is_available():
        yield f"  cpu            no GPU found; torch uses {torch.get_num_threads()} threads"
    name, why = choose_attention("auto")
    yield f"attention        {name}: {why}"
    yield "optional"
    for package, use in _OPTIONAL.items():
        found = _version(package)
        yield f"  {package:<14} {found or 'off'}: {use if not found else use.partition(';')[0]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
