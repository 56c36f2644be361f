"""A model folder read without loading it: its config as a model without weights, its tensors one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlavaConfig

from vlmtune.errors import CheckpointError
from vlmtune.export.folder import read_json
from vlmtune.export.weights import file_tensors
from vlmtune.models.checkpoint import load_config
from vlmtune.models.vlm import VLM, VLMConfig

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_COMPUTED = ("position_ids", "inv_freq")
"""Buffers that old versions saved, and that every version computes."""
_SHARDED = {
    ".metadata": "python -m torch.distributed.checkpoint.format_utils dcp_to_torch",
    "latest": "python zero_to_fp32.py --safe_serialization",
}
"""A file that marks the shards of a distributed run (FSDP, ZeRO), and the program that gathers them."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its shape and type as a meta tensor, and how to read it."""

    meta: Tensor
    read: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A folder: its model without weights (on the meta device), and its tensors by the names of a stock file."""

    path: Path
    model: VLM
    tensors: Mapping[str, Stored]


def open_stored(path: Path) -> StoredModel:
    """The model of an export, a step folder or a downloaded folder.

    Raises CheckpointError when it holds adapters, shards, or not exactly the tensors of its config.
    """
    folder = path / "model" if (path / "model" / "config.json").is_file() else path
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", str(path), "Download a hub model first.")
    _demand_whole(path, folder)
    config = load_config(folder, str(folder))
    if not isinstance(config, LlavaConfig):
        raise CheckpointError(f"the model is a {config.model_type!r}", str(folder), "Give llava folders.")
    if not isinstance(config, VLMConfig):
        config = VLMConfig(**{key: value for key, value in config.to_dict().items() if key != "model_type"})
    with torch.device("meta"):
        model = VLM(config)
    expected = file_tensors(model)
    nested = any(name.startswith("vision_tower.vision_model.") for name in expected)
    found = {stock_name(name, nested): tensor for name, tensor in stored_tensors(folder).items()}
    # A step of the projector `linear` lacks the second layer, an identity, that its export has.
    implied = {name: tensor for name, tensor in expected.items() if tensor.device.type != "meta"}
    tensors = {name: Stored(tensor, lambda tensor=tensor: tensor) for name, tensor in implied.items()}
    tensors |= found
    faults = differences(expected, {name: tensor.meta for name, tensor in tensors.items()})
    if faults:
        raise CheckpointError(f"is not what its config says: {faults}", str(folder), "Save it again.")
    return StoredModel(folder, model, tensors)


def _demand_whole(path: Path, folder: Path) -> None:
    """Raises CheckpointError when the weights are not all in the folder's safetensors files."""
    for mark, program in _SHARDED.items():
        if (path / mark).is_file():
            raise CheckpointError(
                "holds the shards of a distributed run, in files that can run code when they are read",
                str(path),
                f"If you wrote them: `{program}` gathers them. vlmtune's own step folders are gathered already.",
            )
    whole = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    if not whole and any(folder.glob("*.safetensors")):
        raise CheckpointError(
            "holds adapters, not all weights",
            str(path),
            f"Run `vlmtune merge {path} OUT` first, and give OUT.",
        )


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every weight in a folder's safetensors files, by its name there; raises CheckpointError without any."""
    index = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    files = sorted({*index.values()}) or ["model.safetensors"]
    found: dict[str, Stored] = {}
    for file in files:
        try:
            found |= _file_tensors(folder / file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}: {error}", str(folder), "Copy it again.") from error
    return found


def _file_tensors(file: Path) -> dict[str, Stored]:
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if not name.endswith(_COMPUTED)]  # noqa: SIM118 (not a mapping)
        return {name: Stored(_meta(opened.get_slice(name), file), _reader(file, name)) for name in names}


def _meta(stored_slice: object, file: Path) -> Tensor:
    dtype, shape = stored_slice.get_dtype(), stored_slice.get_shape()
    if dtype not in _DTYPES:
        raise CheckpointError(f"holds {dtype} numbers", str(file), f"Known: {', '.join(_DTYPES)}.")
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    """Opens the file for each tensor: pages of a file that stays mapped count as memory in use."""

    def read() -> Tensor:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    return read


def stock_name(name: str, nested: bool) -> str:
    """The name in a stock file of a tensor named as in memory, as by any version, or as in the file itself.

    `nested`: the tower's weights lie in `vision_model`.
    """
    rules = [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^lm_head\.", "language_model.lm_head."),
        *([(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")] if nested else []),
    ]
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """How the second differs from the first in names and shapes, with examples; empty when it does not."""
    missing, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    shapes = [
        f"{name} {[*theirs[name].shape]} for {[*ours[name].shape]}"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name].shape != theirs[name].shape
    ]
    found = {"lacks": missing, "has besides": extra, "has of another shape": shapes}
    return "; ".join(
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in found.items()
        if names
    )
