"""A trained model as a Hugging Face folder, put in place only after it was reopened and compared."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LlavaProcessor

from vlmtune import __version__
from vlmtune.config.tuning import Adapters
from vlmtune.export.card import model_card
from vlmtune.export.compare import Difference, compare_model, compare_processor
from vlmtune.export.folder import new_folder, write_json
from vlmtune.export.processors import write_processor
from vlmtune.export.weights import (
    PartDigest,
    config_json,
    file_tensors,
    is_stock,
    stock_config,
    write_weights,
)
from vlmtune.models.vlm import VLM
from vlmtune.types import ChatBatch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Where the export is and how close it came."""

    path: Path
    difference: Difference
    """Of its logits to the training model's, on the batch given."""
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
    dtype = dtype or _own_type(model)
    with new_folder(out) as aside:
        parts, pinned = _write(model, processor, aside, dtype)
        compare_processor(processor, aside, batch)
        difference = compare_model(model, aside, dtype, batch)
        apart = {"largest_logit_difference": difference.largest, "mean_logit_difference": difference.mean}
        found = {**manifest, **_adapters(model), **apart}
        write_record(aside, out.name, pinned, export_record(is_stock(model), dtype, parts, found))
    report = ExportReport(out, difference, is_stock(model), time.perf_counter() - started)
    _log.info("exported %s: %s, %.1f s", out, difference, report.seconds)
    return report


def _write(
    model: VLM, processor: LlavaProcessor, folder: Path, dtype: torch.dtype
) -> tuple[dict[str, PartDigest], bool]:
    """The digest of each part, and whether pixels are the same everywhere (see `write_processor`)."""
    config = stock_config(model) if is_stock(model) else model.config
    write_json(folder / "config.json", config_json(config, dtype))
    _generation_config(model, processor).save_pretrained(folder)
    pinned = write_processor(processor, folder)
    return write_weights(file_tensors(model), folder, dtype), pinned


def _own_type(model: VLM) -> torch.dtype:
    """The model's type; with adapters that of the base, in which all but what learned is kept."""
    return model.dtype if model.adaptation is None else getattr(torch, model.adaptation.origin.config.dtype)


def _adapters(model: VLM) -> dict[str, dict[str, str]]:
    """What was merged into the weights of each part, in words; empty for a model without adapters."""
    if model.adaptation is None:
        return {}
    modes = model.adaptation.tuning.parts()
    return {"adapters": {part: str(mode) for part, mode in modes.items() if isinstance(mode, Adapters)}}


def write_record(folder: Path, name: str, pinned: bool, record: Mapping[str, Any]) -> None:
    """Writes manifest.json, and the model card that is made of it."""
    record = {**record, "name": name, "pinned_pixels": pinned}
    write_json(folder / "manifest.json", record)
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")


def export_record(
    stock: bool, dtype: torch.dtype, parts: Mapping[str, PartDigest], manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """What manifest.json of an export holds: what is given, its form, the digest of each part, versions."""
    return {
        **manifest,
        "kind": "export",
        "stock": stock,
        "dtype": str(dtype).removeprefix("torch."),
        "parts": {part: asdict(digest) for part, digest in parts.items()},
        "versions": {
            "vlmtune": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


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
