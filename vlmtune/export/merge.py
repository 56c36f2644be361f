"""Adapters -> weights: a step folder that needs its base becomes a folder that needs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.export.folder import read_json
from vlmtune.export.hf import ExportReport, export_model
from vlmtune.export.probe import probe_batch
from vlmtune.models.checkpoint import ADAPTERS_FILE, load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}


def merge_adapters(
    path: Path, out: Path, dtype: str | None = None, facts: Mapping[str, Any] | None = None
) -> ExportReport:
    """The report on `out`: base, merged adapters and every part trained whole, compared before it is put there.

    `path` is a step folder with adapters, or the `model` folder in it. The difference reported is between logits
    of the reopened folder and of the model with its adapters. QLoRA is merged into its dequantised weights.
    `facts` about the run go into the manifest. Raises CheckpointError when there are no adapters, when the base is
    another one, or when the logits differ.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"no export type {dtype!r}", "dtype", "Known: float32, bfloat16.")
    folder = path / "model" if (path / "model").is_dir() else path
    if not (folder / ADAPTERS_FILE).is_file():
        raise CheckpointError(
            f"there are no adapters to merge (no {ADAPTERS_FILE})", str(folder), "Use vlmtune export instead."
        )
    model, processor = load_model(folder)
    manifest = read_json(path / "manifest.json") | dict(facts or {})
    return export_model(model, processor, out, DTYPES[dtype], probe_batch(model, processor), manifest)
