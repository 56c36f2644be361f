"""Opens an export the way a stranger would, and compares it with the model that was trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlmtune.errors import CheckpointError
from vlmtune.models.vision import token_counter
from vlmtune.models.vlm import VLM
from vlmtune.types import ChatBatch

FP32_TOLERANCE = 1e-4
"""Largest difference of a logit between the training model and the export, both in float32."""
HALF_TOLERANCE = 0.05
"""The mean difference as a share of the largest logit, where a type of 8 bits of mantissa (bfloat16) is involved.

The mean, for rounding alone moves single logits far: SmolLM2-135M, 42 at most, by 2.6 with 0.3 on average."""
_MOST_SAMPLES = 4
_REMEDY = "Nothing was exported. Please report this with the recipe: vlmtune or transformers is at fault."


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the logits of two models are apart on the same samples."""

    largest: float
    mean: float
    """Of the sample where it is largest: what counts when a half-precision type rounds, see HALF_TOLERANCE."""

    def __str__(self) -> str:
        return f"logits within {self.largest:.2g}, {self.mean:.2g} on average"


@dataclass(frozen=True, slots=True)
class Probe:
    """One sample's ids and pictures, as both models read them."""

    input_ids: Int[Tensor, "1 t"]
    pixel_values: Float[Tensor, "n 3 h w"] | None


def probes(model: VLM, batch: ChatBatch) -> list[Probe]:
    """The first samples of a packed or padded batch, one by one, and a made-up one: the tower always runs."""
    tokens = token_counter(model.config)(0, 0)
    image_id = model.config.image_token_id
    found, done = [], 0
    for ids in _samples(batch):
        images = int((ids == image_id).sum()) // tokens
        pixels = None if batch.pixel_values is None else batch.pixel_values[done : done + images]
        found.append(Probe(ids[None], pixels if images else None))
        done += images
    return [*found[:_MOST_SAMPLES], made_up(model)]


def made_up(model: VLM) -> Probe:
    """A picture of noise and a few tokens: what can be asked of any model, whatever its chat template."""
    tokens, image_id = token_counter(model.config)(0, 0), model.config.image_token_id
    side = model.config.vision_config.image_size
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    text = torch.arange(min(8, image_id)) if image_id else torch.arange(1, 9)
    return Probe(torch.cat([torch.full((tokens,), image_id), text])[None], noise)


def _samples(batch: ChatBatch) -> Iterator[Int[Tensor, " t"]]:
    if batch.cu_seqlens is not None:
        yield from batch.input_ids[0].split(batch.cu_seqlens.diff().tolist())
    else:
        for row, ids in enumerate(batch.input_ids):
            yield ids if batch.attention_mask is None else ids[batch.attention_mask[row].bool()]


@torch.no_grad()
def logits(model: LlavaForConditionalGeneration, samples: list[Probe]) -> list[Float[Tensor, "1 t v"]]:
    """Float32 logits on the CPU of each probe, in the model's own type (no autocast), in eval mode."""
    training = model.training
    model.eval()
    try:
        return [
            model(
                input_ids=probe.input_ids.to(model.device),
                pixel_values=(
                    None if probe.pixel_values is None else probe.pixel_values.to(model.device, model.dtype)
                ),
                attention_mask=torch.ones_like(probe.input_ids, device=model.device),
                use_cache=False,
            )
            .logits.float()
            .cpu()
            for probe in samples
        ]
    finally:
        model.train(training)


def compare_model(model: VLM, folder: Path, dtype: torch.dtype, batch: ChatBatch) -> Difference:
    """The difference of the reopened export's logits.

    Raises CheckpointError when it is too large, or when a weight is missing, left over or of another shape.
    """
    reopened, info = AutoModelForImageTextToText.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, dtype=dtype
    )
    faults = {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys}
    if faults:
        raise CheckpointError(f"the export reopens with {faults}", str(folder), _REMEDY)
    samples = probes(model, batch)
    ours = logits(model, samples)
    theirs = logits(reopened.to(model.device), samples)
    exact = {dtype, *(weight.dtype for weight in model.parameters())} <= {
        torch.float32,
        torch.uint8,
    }  # or 4 bits
    return demand_close(ours, theirs, exact, f"{folder}: logits of the reopened export")


def demand_close(
    ours: list[Float[Tensor, "1 t v"]], theirs: list[Float[Tensor, "1 t v"]], exact: bool, what: str
) -> Difference:
    """The difference of two models' logits; raises CheckpointError, about `what`, when they are not alike.

    `exact`: both were computed in float32. Then the largest difference counts, else the mean.
    """
    apart = [(a - b).abs() for a, b in zip(ours, theirs, strict=True)]
    found = Difference(max(float(each.max()) for each in apart), max(float(each.mean()) for each in apart))
    measured, bound = found.largest, FP32_TOLERANCE
    if not exact:
        measured, bound = found.mean, HALF_TOLERANCE * max(float(a.abs().max()) for a in ours)
    if not measured <= bound:  # also refuses NaN
        kind = "largest" if exact else "mean"
        raise CheckpointError(f"{what} differ by {measured:.3g} ({kind}; allowed {bound:.3g})", "", _REMEDY)
    return found


def compare_processor(processor: LlavaProcessor, folder: Path, batch: ChatBatch) -> None:
    """Raises CheckpointError unless the reopened processor gives the same prompt, ids and pixels."""
    reopened = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    text = processor.tokenizer.decode(batch.input_ids[0])
    ours, theirs = _outputs(processor, text), _outputs(reopened, text)
    wrong = [name for name, value in ours.items() if value != theirs[name]]
    if wrong:
        raise CheckpointError(f"the reopened processor gives other {', '.join(wrong)}", str(folder), _REMEDY)


def _outputs(processor: LlavaProcessor, text: str) -> dict[str, Any]:
    """What a processor makes of a text, a chat and a picture, in comparable form."""
    picture = Image.linear_gradient("L").resize((150, 97)).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    chat = [{"role": "user", "content": content}]
    template = processor.chat_template
    return {
        "chat template": template,
        "prompt": template and processor.apply_chat_template(chat, add_generation_prompt=True),
        "ids": processor.tokenizer(text, add_special_tokens=False)["input_ids"],
        "special tokens": processor.tokenizer(text)["input_ids"],
        "image tokens": processor(images=picture, text=processor.image_token)["input_ids"],
        "pixels": processor.image_processor(picture, return_tensors="pt")["pixel_values"].tolist(),
    }
