"""The original LLaVA layout to a llava of transformers and back, each way compared by its logits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlmtune.config.schema import VisionConfig
from vlmtune.errors import CheckpointError
from vlmtune.export.compare import demand_close, logits, probes
from vlmtune.export.folder import read_json
from vlmtune.export.hf import export_model
from vlmtune.export.original import (
    Original,
    OriginalLlava,
    is_original,
    open_original,
    original_logits,
    tower_path,
)
from vlmtune.export.probe import probe_batch
from vlmtune.export.to_original import to_original
from vlmtune.models.build import assemble, grow_embeddings
from vlmtune.models.processor import build_processor, pixel_statistics, prepare_tokenizer, square_images
from vlmtune.models.vision import token_counter
from vlmtune.models.vlm import VLM, VLMConfig
from vlmtune.types import IMAGE_MARK


@dataclass(frozen=True, slots=True)
class Conversion:
    """Where the converted folder is, its layout, and how close it came."""

    path: Path
    layout: Literal["hf", "llava"]
    max_abs_diff: float
    """Largest logit difference between the two layouts' forwards."""


def convert(
    path: Path,
    out: Path,
    to: Literal["hf", "llava"] | None = None,
    base: Path | None = None,
    tower: str | None = None,
    template: str | None = None,
) -> Conversion:
    """The report on `out`: the other layout of `path`, or the one that `to` names.

    `base`: the language model of a folder that holds LoRA or a projector alone. `tower`: where the vision tower
    is (into hf), or its name in the config (into llava). `template`: the text of the chat template of the hf
    folder; None takes the tokenizer's own. Raises CheckpointError when the logits differ, and writes nothing.
    """
    found = "llava" if is_original(read_json(path / "config.json")) else "hf"
    if found == to:
        raise CheckpointError(
            f"is in the layout {to} already", str(path), "Leave --to out for the other one."
        )
    if found == "hf":
        return Conversion(out, "llava", to_original(path, out, tower))
    return Conversion(out, "hf", to_hf(path, out, base, tower, template))


# ---------------------------------------------------------------- original -> transformers


def to_hf(
    path: Path, out: Path, base: Path | None = None, tower: str | None = None, template: str | None = None
) -> float:
    """The largest logit difference, after `out` holds the original layout at `path` as a llava of transformers."""
    original = open_original(path, base, tower)
    tokenizer = _tokenizer(original)
    pad = tokenizer.pad_token
    template = template or tokenizer.chat_template
    if not template:
        raise CheckpointError(
            "there is no chat template", str(original.tokens), "Name one: --template vicuna_v1."
        )
    prepare_tokenizer(tokenizer, template)
    config = _vlm_config(original, tokenizer.convert_tokens_to_ids(IMAGE_MARK))
    statistics = pixel_statistics(VisionConfig(path=tower_path(original.config, path, tower)))
    fit = "pad" if original.config.get("image_aspect_ratio") == "pad" else "crop"
    images = square_images(fit, config.vision_config.image_size, statistics)
    processor = build_processor(config, tokenizer, images, template)
    with torch.device("meta"):
        shell = VLM(config)
    batch = probe_batch(shell, processor)
    samples = probes(shell, batch)
    theirs = original_logits(original.model, shell, samples)
    rows = original.model.language.get_input_embeddings().num_embeddings
    model = _assembled(original.model, config, len(tokenizer))
    ours = [each[..., :rows] for each in logits(model, samples)]
    exact = model.dtype == torch.float32
    difference = demand_close(ours, theirs, exact, f"{path}: logits of the two layouts").largest
    record = {
        "converted": {
            "from": "the original LLaVA layout",
            "path": str(path),
            "base": base and str(base),
            "largest_logit_difference": difference,
        },
        "original": {
            "config": original.config,
            "rows": rows,
            "pad_token": pad,
            "tower_in_weights": original.tower_in_weights,
        },
    }
    export_model(model, processor, out, None, batch, record)
    return difference


def _tokenizer(original: Original) -> PreTrainedTokenizerBase:
    folder = original.tokens
    try:
        # With a config, because transformers would take the folder's own, of type "llava", for one of its own.
        return AutoTokenizer.from_pretrained(folder, config=original.model.language.config)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"no tokenizer: {error}",
            str(folder),
            "A tokenizer.model alone needs `pip install sentencepiece protobuf`; tokenizer.json needs nothing.",
        ) from error


def _vlm_config(original: Original, image_id: int) -> VLMConfig:
    linear = isinstance(original.model.projector, nn.Linear)
    config = VLMConfig(
        vision_config=copy.deepcopy(original.model.tower.config),
        text_config=copy.deepcopy(original.model.language.config),
        projector={"type": "linear" if linear else "mlp2x"},
        image_token_index=image_id,
        vision_feature_layer=original.model.layer,
        vision_feature_select_strategy="default" if original.model.select == "patch" else "full",
    )
    config.image_seq_length = token_counter(config).tokens
    return config


def _assembled(original: OriginalLlava, config: VLMConfig, tokens: int) -> VLM:
    """The original's own weights in a VLM, LoRA merged, with embeddings for so many tokens."""
    from peft import PeftModel

    language = original.language
    if isinstance(language, PeftModel):
        language = language.merge_and_unload(safe_merge=True)
    model = assemble(config, original.tower, language, language.dtype)
    ours, theirs = (
        [layer for layer in projector.modules() if isinstance(layer, nn.Linear)]
        for projector in (model.model.multi_modal_projector, original.projector)
    )
    for layer, source in zip(ours, theirs, strict=True):
        layer.load_state_dict(source.state_dict())
    grow_embeddings(model, tokens)
    return model.eval()
