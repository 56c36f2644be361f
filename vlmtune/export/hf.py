"""A trained model as a Hugging Face folder, put in place only after it was reopened and compared."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LlavaProcessor

from vlmtune import __version__
from vlmtune.errors import CheckpointError
from vlmtune.export.card import model_card
from vlmtune.export.compare import compare_model, compare_processor
from vlmtune.export.processors import write_processor
from vlmtune.export.weights import config_json, file_tensors, is_stock, stock_config, write_weights
from vlmtune.models.vlm import VLM
from vlmtune.types import ChatBatch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Where the export is and how close it came."""

    path: Path
    max_abs_diff: float
    """Largest logit difference to the training model, on the batch given."""
    stock: bool
    """Loads without vlmtune."""
    seconds: float


def export_model(
    model: VLM,
    processor: LlavaProcessor,
    out: Path,
    dtype: torch.dtype | None,
    batch: ChatBatch,
    manifest: dict[str, Any],
) -> ExportReport:
    """The report on the folder `out`, complete and compared on `batch`; an earlier export there is replaced.

    `dtype` None keeps the model's type. Raises CheckpointError when the reopened folder is not the model
    (nothing is left of it then, and an earlier export stays), or when `out` holds something else.
    """
    started = time.perf_counter()
    dtype = dtype or model.dtype
    _demand_replaceable(out)
    aside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write(model, processor, aside, dtype, manifest, out.name)
        compare_processor(processor, aside, batch)
        difference = compare_model(model, aside, dtype, batch)
        _put_in_place(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    report = ExportReport(out, difference, is_stock(model), time.perf_counter() - started)
    _log.info("exported %s: logits within %.2g, %.1f s", out, difference, report.seconds)
    return report


def _write(
    model: VLM,
    processor: LlavaProcessor,
    folder: Path,
    dtype: torch.dtype,
    manifest: dict[str, Any],
    name: str,
) -> None:
    stock = is_stock(model)
    config = stock_config(model) if stock else model.config
    _write_json(folder / "config.json", config_json(config, dtype))
    _generation_config(model, processor).save_pretrained(folder)
    pinned = write_processor(processor, folder)
    parts = write_weights(file_tensors(model), folder, dtype)
    versions = {"vlmtune": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    record = {
        **manifest,
        "kind": "export",
        "stock": stock,
        "dtype": str(dtype).removeprefix("torch."),
        "parts": {part: asdict(digest) for part, digest in parts.items()},
        "versions": versions,
    }
    _write_json(folder / "manifest.json", record)
    (folder / "README.md").write_text(model_card(name, stock, pinned, parts, manifest), encoding="utf-8")


def _generation_config(model: VLM, processor: LlavaProcessor) -> GenerationConfig:
    """Greedy decoding that ends where the template's answers end; no base model's sampling settings."""
    tokenizer = processor.tokenizer
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ids = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ids[0] if len(ids) == 1 else ids,
        pad_token_id=tokenizer.pad_token_id,
    )


def _demand_replaceable(out: Path) -> None:
    manifest = out / "manifest.json"
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not manifest.is_file() or json.loads(manifest.read_text()).get("kind") != "export":
        raise CheckpointError("holds something that is not an export", str(out), "Name another folder.")


def _put_in_place(aside: Path, out: Path) -> None:
    """One rename makes the new export visible; the old one is moved out of the way and then removed."""
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(aside, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
