"""What `vlmtune doctor` says: machine, versions, and what is on, what is off, why, and what turns it on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_CORE = ("vlmtune", "torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "pillow")
_ATTENTION = ("flash_attention_2", "flash_attention_3", "flex_attention", "sdpa", "eager")
_OPTIONAL = {
    # package: (what it is for, extra of ours that brings it)
    "deepspeed": ("recipes/launch/zero*.yaml", "deepspeed"),
    "bitsandbytes": ("tuning mode qlora, optim.type adamw_8bit", "quant"),
    "liger-kernel": ("run.liger", "liger"),
    "flash-attn": ("model.attention flash_attention_2", "flash"),
    "gguf": ("language models from .gguf files", "gguf"),
    "diffusers": ("objective reconstruction with target vae", "ross"),
    "datasets": ("sources of format hf_dataset", "datasets"),
    "easy-vqa": ("the demo", "demo"),
    "tensorboard": ("run.trackers tensorboard", "track"),
    "wandb": ("run.trackers wandb", "track"),
    "trackio": ("run.trackers trackio", "track"),
}
_FREE = 50
"""GiB of disk below which a run of a 7B model may not find room for its checkpoints."""


@dataclass(frozen=True)
class Finding:
    """One thing that is on or off; `remedy` is what turns it on, if anything does."""

    name: str
    on: bool
    why: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy and not self.on else ""
        return f"  {self.name:<18} {'on ' if self.on else 'off'} {self.why}{remedy}"


def lines() -> Iterator[str]:
    """The report, line by line."""
    yield from _machine()
    yield "versions"
    for name in _CORE:
        yield f"  {name:<18} {_version(name) or 'missing'}"
    yield "devices"
    yield from _devices()
    yield "attention"
    yield from map(str, attention())
    yield "kernels"
    yield from map(str, kernels())
    yield "optional"
    yield from map(str, optional())
    yield "launch"
    yield from _launch()


def attention() -> list[Finding]:
    """Each implementation of model.attention, and the one that auto means."""
    from vlmtune.models.attention import REMEDIES, choose_attention, obstacle

    found = []
    for name in _ATTENTION:
        why = obstacle(name)
        found.append(Finding(name, not why, why or "runs here", REMEDIES.get(name, "")))
    chosen, why = choose_attention("auto")
    return [*found, Finding("auto", True, f"is {chosen}: {why}")]


def kernels() -> list[Finding]:
    """Liger's kernels, and the compilers of torch.compile and of DeepSpeed's CPU Adam."""
    from vlmtune.models.kernels import liger_obstacle

    why = liger_obstacle("llama")
    compiler = shutil.which("g++") or shutil.which("clang++")
    missing = [name for name, path in (("g++", compiler), ("ninja", shutil.which("ninja"))) if not path]
    compiles = f"no {' and no '.join(missing)}" if missing else "g++ and ninja are there"
    return [
        Finding(
            "run.liger", not why, why or "runs here", "pip install 'vlmtune[liger]' on a machine with a GPU"
        ),
        Finding("run.compile", compiler is not None, compiler or "no C++ compiler", "install g++"),
        Finding("CPU Adam", not missing, f"optimizer on the host: {compiles}", "install g++ and ninja"),
    ]


def optional() -> list[Finding]:
    """Packages that only some recipes need."""
    found = []
    for package, (use, extra) in _OPTIONAL.items():
        version = _version(package)
        found.append(
            Finding(package, bool(version), f"{version} {use}".strip(), f"pip install 'vlmtune[{extra}]'")
        )
    torchvision = _version("torchvision")
    return [
        *found,
        Finding("torchvision", bool(torchvision), f"{torchvision} images go through PIL without it".strip()),
    ]


def _machine() -> Iterator[str]:
    memory, gib = psutil.virtual_memory(), 2**30
    yield f"python {platform.python_version()} on {platform.platform()}"
    yield f"  {'processor':<18} {psutil.cpu_count()} cores"
    yield f"  {'memory':<18} {memory.available / gib:.0f} of {memory.total / gib:.0f} GiB free"
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for name, folder in (("disk, here", Path.cwd()), ("disk, hub cache", cache)):
        free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free / gib
        short = "" if free > _FREE else "; a 7B checkpoint with its optimizer state takes up to 80"
        yield f"  {name:<18} {free:.0f} GiB free in {folder}{short}"


def _devices() -> Iterator[str]:
    import torch

    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: set run.precision=fp32"
        yield f"  {f'cuda:{index}':<18} {card.name}, {card.total_memory / 2**30:.0f} GiB, {bf16}"
    if not torch.cuda.is_available():
        yield f"  {'cpu':<18} no GPU found; torch uses {torch.get_num_threads()} threads"


def _launch() -> Iterator[str]:
    """What `accelerate launch` without --config_file would do, and what this process was launched as."""
    import torch
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    world = os.environ.get("WORLD_SIZE")
    yield f"  {'this process':<18} {f'one of {world}' if world else 'launched alone: trains on one device'}"
    if Path(default_config_file).is_file():
        config = load_config_from_file(None)
        found = f"{config.distributed_type}, {config.num_processes} processes ({default_config_file})"
    else:
        file = "zero2.yaml" if torch.cuda.device_count() > 1 else "ddp.yaml --num_processes 1"
        found = f"no default config: name one, accelerate launch --config_file recipes/launch/{file}"
    yield f"  {'accelerate':<18} {found}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
