"""Weights and config.json under the names that transformers 4 and 5, and the programs built on them, read.

transformers 5 has new names in memory and turns most of them back when it saves. Not all: it saves a CLIP or
SigLIP tower as `vision_tower.X`; version 4 looks for `vision_tower.vision_model.X` and otherwise leaves the
tower random without an error. Version 5 reads both.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaConfig
from transformers.core_model_loading import revert_weight_conversion

from vlmtune.models.adapters import merged_state
from vlmtune.models.checkpoint import feed_digest
from vlmtune.models.vlm import VLM

_NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Towers whose weights lie one level deeper, in `vision_model`, before transformers 5."""
_SHARD_BYTES = 5 * 10**9
PARTS = {"vision_tower": "vision", "multi_modal_projector": "projector", "language_model": "language"}
"""The part of a tensor, by the first word of its name in the file."""


@dataclass(frozen=True, slots=True)
class PartDigest:
    """Size and content of one part of the folder."""

    parameters: int
    sha256: str


def is_stock(model: VLM) -> bool:
    """Whether the model is a plain `llava` once written: its projector is `linear` or `mlp2x`."""
    return model.config.projector["type"] in ("linear", "mlp2x")


def stock_config(model: VLM) -> LlavaConfig:
    """The `llava` config of a model whose projector is `linear` or `mlp2x`."""
    values = model.config.to_dict()
    linear = values.pop("projector")["type"] == "linear"
    values.pop("model_type")
    if linear:
        values["projector_hidden_act"] = "linear"
    return LlavaConfig(**values | {"architectures": ["LlavaForConditionalGeneration"]})


def config_json(config: LlavaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json holds: version 5's keys, and beside them the rotary settings where version 4 looks."""
    values = json.loads(config.to_json_string(use_diff=False)) | {"dtype": str(dtype).removeprefix("torch.")}
    values.pop("_name_or_path", None)  # a folder on this machine
    for part in ("text_config", "vision_config"):
        values[part].pop("dtype", None)
        values[part].pop("_name_or_path", None)
    rope = values["text_config"].get("rope_parameters")
    if rope and "rope_theta" in rope:
        values["text_config"]["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            values["text_config"]["rope_scaling"] = scaling
    return values


def file_tensors(model: VLM) -> dict[str, Tensor]:
    """The tensors to write, by the name they have in the file; adapters are merged into the weights."""
    state = merged_state(model)
    if model.config.text_config.tie_word_embeddings:
        del state["lm_head.weight"]
    fresh = copy.copy(model)
    fresh._weight_conversions = None  # else the names depend on the file the model was once loaded from
    tensors = revert_weight_conversion(fresh, state)
    if model.config.vision_config.model_type in _NESTED_TOWERS:
        tensors = {_nested_name(name): tensor for name, tensor in tensors.items()}
    if model.config.projector["type"] == "linear":
        # x @ I + 0 is x, bit for bit: linear is a llava projector whose second layer does nothing.
        width, dtype = model.config.text_config.hidden_size, model.dtype
        tensors["multi_modal_projector.linear_2.weight"] = torch.eye(width, dtype=dtype)
        tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(width, dtype=dtype)
    return tensors


def _nested_name(name: str) -> str:
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)


def write_weights(tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> dict[str, PartDigest]:
    """The digest of every part, after model*.safetensors (and the index of several files) are written."""
    plan = {name: torch.empty_like(tensor, dtype=dtype, device="meta") for name, tensor in tensors.items()}
    return write_stream(plan, lambda name: tensors[name], folder)


def write_stream(
    plan: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    folder: Path,
    shard_bytes: int | None = None,
    part: Callable[[str], str] = lambda name: PARTS[name.partition(".")[0]],
) -> dict[str, PartDigest]:
    """As `write_weights`, holding one file's tensors at a time: `read` gives each when it is written.

    Shapes and types to write are those of the meta tensors in `plan`. `part` tells a name's part.
    """
    shards = list(_shards(plan, shard_bytes or _SHARD_BYTES))
    digests = {name: hashlib.sha256() for name in PARTS.values()}
    counts = dict.fromkeys(PARTS.values(), 0)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written = {
            name: read(name).detach().to("cpu", plan[name].dtype, copy=True).contiguous() for name in names
        }
        save_file(written, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        for name, tensor in written.items():
            assert tensor.shape == plan[name].shape
            counts[part(name)] += tensor.numel()
            feed_digest(digests[part(name)].update, name, tensor)
        del written
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in plan.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return {name: PartDigest(counts[name], digest.hexdigest()) for name, digest in digests.items()}


def _shards(plan: Mapping[str, Tensor], most: int) -> Iterator[list[str]]:
    """Sorted names, cut so that a file stays under `most` bytes (a larger tensor has its own file)."""
    names: list[str] = []
    size = 0
    for name in sorted(plan):
        if names and size + plan[name].nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += plan[name].nbytes
    if names:
        yield names
