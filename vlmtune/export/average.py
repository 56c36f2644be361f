"""Several models of one architecture made into one, part by part, without ever holding one of them whole."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaProcessor

from vlmtune.errors import CheckpointError
from vlmtune.export.alike import demand_alike, demand_same_tokens
from vlmtune.export.combine import Copy, Method
from vlmtune.export.compare import logits
from vlmtune.export.folder import new_folder, write_json
from vlmtune.export.hf import export_record, write_record
from vlmtune.export.probe import probes_of
from vlmtune.export.processors import write_processor
from vlmtune.export.stored import StoredModel, open_stored
from vlmtune.export.weights import PARTS, config_json, is_stock, stock_config, write_stream
from vlmtune.models.checkpoint import load_model, load_processor, weights_digest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Output:
    """Where and how a merged model is written."""

    folder: Path
    dtype: torch.dtype | None = None
    """None: each tensor in the type it has in the first model."""
    shard_bytes: int | None = None
    """Size of the largest file in bytes; None: 5 GB. Memory in use stays below two files."""
    probe: bool = True
    """Open the result and run it once, which takes memory for the whole model."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The models to merge, opened and found alike, and the base of those methods that need one."""

    models: tuple[StoredModel, ...]
    base: StoredModel | None
    processor: LlavaProcessor
    """The first model's."""


def merge_models(
    paths: Sequence[Path], methods: Mapping[str, Method], base: Path | None, out: Output
) -> Path:
    """The folder of the merged model; `methods` by part. Config and processor are those of the first model.

    Raises CheckpointError when the models do not fit each other or a method, or when the result computes
    something else than finite numbers; nothing is written then.
    """
    inputs = _open(paths, methods, base)
    with new_folder(out.folder) as aside:
        _write(inputs, methods, out, aside)
        if out.probe:
            _demand_finite_logits(aside)
    _log.info("merged %d models into %s", len(paths), out.folder)
    return out.folder


def _open(paths: Sequence[Path], methods: Mapping[str, Method], base: Path | None) -> Inputs:
    for part, method in methods.items():
        fault = method.fault(len(paths))
        if method.needs_base and base is None:
            fault = "it works on what each model changed: give the base that they were tuned from"
        if fault:
            raise CheckpointError(f"{part}: {type(method).__name__.lower()}: {fault}", "vlmtune merge")
    models = tuple(open_stored(path) for path in paths)
    needed = {part for part, method in methods.items() if method.needs_base}
    origin = open_stored(base) if base is not None and needed else None
    merged = {part for part, method in methods.items() if not isinstance(method, Copy)}
    processor = load_processor(models[0].path, models[0].model)
    others = [(model, merged) for model in models[1:]] + ([(origin, needed)] if origin else [])
    for other, parts in others:
        demand_alike(models[0], other, parts)
        if "language" in parts:
            names = str(models[0].path), str(other.path)
            demand_same_tokens(processor.tokenizer, load_processor(other.path, other.model).tokenizer, names)
    return Inputs(models, origin, processor)


def _write(inputs: Inputs, methods: Mapping[str, Method], out: Output, folder: Path) -> None:
    first = inputs.models[0]
    stock = is_stock(first.model)
    plan = {
        name: torch.empty_like(stored.meta, dtype=out.dtype or stored.meta.dtype, device="meta")
        for name, stored in first.tensors.items()
    }
    parts = write_stream(plan, _combiner(inputs, methods), folder, out.shard_bytes)
    dtype = next(iter(plan.values())).dtype
    config = stock_config(first.model) if stock else first.model.config
    write_json(folder / "config.json", config_json(config, dtype))
    if (first.path / "generation_config.json").is_file():
        shutil.copy(first.path / "generation_config.json", folder)
    pinned = write_processor(inputs.processor, folder)
    record = export_record(stock, dtype, parts, {"merge": _origin(inputs, methods)})
    write_record(folder, out.folder.name, pinned, record)


def _combiner(inputs: Inputs, methods: Mapping[str, Method]) -> Callable[[str], Tensor]:
    """The function from a tensor's name to the merged tensor; it raises CheckpointError when one is not finite."""

    def combine(name: str) -> Tensor:
        method = methods[PARTS[name.partition(".")[0]]]
        models = inputs.models[:1] if isinstance(method, Copy) else inputs.models
        base = inputs.base.tensors[name].read() if inputs.base and method.needs_base else None
        merged = method.combine(name, [model.tensors[name].read() for model in models], base)
        if not bool(merged.isfinite().all()):
            raise CheckpointError(
                f"{name} is not finite", str(inputs.models[0].path), "Check each model by itself first."
            )
        return merged

    return combine


def _origin(inputs: Inputs, methods: Mapping[str, Method]) -> dict[str, Any]:
    """What the manifest says about the merge: every input by path and content, every part's settings."""
    models = chain(inputs.models, [inputs.base] if inputs.base else [])
    digests = [{"path": str(model.path), "sha256": weights_digest(model.path)} for model in models]
    return {
        "inputs": digests[: len(inputs.models)],
        "base": digests[-1] if inputs.base else None,
        "parts": {
            part: {"method": type(method).__name__.lower(), **asdict(method)}
            for part, method in methods.items()
        },
    }


def _demand_finite_logits(folder: Path) -> None:
    """Opens the folder strictly and runs a probe; raises CheckpointError when a logit is not finite."""
    model, processor = load_model(folder)
    for each in logits(model, probes_of(model, processor)):
        if not bool(each.isfinite().all()):
            raise CheckpointError(
                "the merged model computes logits that are not finite",
                str(folder),
                "Nothing was written. Merge fewer models, or with a smaller scale.",
            )
