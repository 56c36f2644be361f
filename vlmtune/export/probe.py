"""The batch on which an export is compared with its model: pictures, several turns, text alone."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlmtune.data.collate import collate
from vlmtune.data.render import Renderer
from vlmtune.errors import DataError
from vlmtune.export.compare import Probe, made_up, probes
from vlmtune.models.vision import token_counter
from vlmtune.models.vlm import VLM
from vlmtune.types import IMAGE_MARK, ChatBatch, ChatSample, Encoded, ImageRef, Size, Turn

_TURNS = (
    (f"{IMAGE_MARK}\nwhat is this?", "a red circle", "is it blue?", "no"),
    (f"{IMAGE_MARK}\n{IMAGE_MARK}\nwhich is larger?", "the second"),
    ("how many sides has a triangle?", "three"),
)


def probe_batch(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> ChatBatch:
    """A packed batch made without any file: a picture with two questions, two pictures, and no picture."""
    renderer = Renderer(processor.tokenizer, token_counter(model.config))
    return collate([_encode(renderer, processor, texts, i) for i, texts in enumerate(_TURNS)], "isolated")


def probes_of(model: VLM, processor: LlavaProcessor) -> list[Probe]:
    """The probes for a model whose chat template need not be ours.

    A template without generation marks tells nobody what is learned: it is asked about a made-up picture only.
    """
    try:
        return probes(model, probe_batch(model, processor))
    except DataError:
        return [made_up(model)]


def _encode(renderer: Renderer, processor: LlavaProcessor, texts: tuple[str, ...], number: int) -> Encoded:
    count = sum(text.count(IMAGE_MARK) for text in texts)
    pictures = [_picture(number * 2 + i) for i in range(count)]
    roles = ("user", "assistant") * (len(texts) // 2)
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=True))
    sample = ChatSample(f"probe#{number}", tuple(ImageRef("picture") for _ in pictures), turns)
    rendered = renderer.render(sample, [Size(*picture.size) for picture in pictures])
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"] if pictures else None
    return Encoded(sample.key, torch.tensor(rendered.input_ids), torch.tensor(rendered.labels), pixels)


def _picture(seed: int) -> Image.Image:
    """Noise over a slope, wider than high, so that padding, cropping and resizing all take part."""
    height, width = 60, 90 + 10 * seed
    slope = np.linspace(0, 200, width)[None, :, None]
    noise = np.random.default_rng(seed).integers(0, 56, (height, width, 3))
    return Image.fromarray((slope + noise).astype(np.uint8))
