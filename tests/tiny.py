"""Models of about a hundred thousand weights, made from a seed: what the tests train, save and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import LlavaProcessor

from vlmtune.config.schema import ModelConfig
from vlmtune.models.build import build_model
from vlmtune.models.vlm import VLM

IMAGE_SIZE = 32
"""Pixels; with patches of 8 a grid of 4 x 4."""

TEXTS = (
    "What color is the shape?",
    "The shape in the image is a red circle, a blue square or a green triangle.",
    "Is there a yellow rectangle in the image? yes no",
    "hello hi 0 1 2",
)
_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
_VISION = {"image_size": IMAGE_SIZE, "patch_size": 8, **_SIZES}
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 64, **_VISION},
    "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 64, **_VISION},
    "siglip2": {
        "model_type": "siglip2_vision_model",
        "intermediate_size": 64,
        "num_patches": 16,
        "patch_size": 8,
        **_SIZES,
    },
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, "use_mask_token": True, **_VISION},
}
PROJECTORS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear"},
    "mlp2x": {"type": "mlp2x"},
    "pixel_shuffle": {"type": "pixel_shuffle", "factor": 2},
    "resampler": {"type": "resampler", "queries": 5, "heads": 4, "layers": 1},
    "clustering": {"type": "clustering", "centers": 7},
}
_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_DECODER},
    "qwen2": {"model_type": "qwen2", **_DECODER},
}


def template_text(template: str) -> str:
    """The text of one of our chat templates."""
    folder = Path(__file__).parent.parent / "vlmtune" / "data" / "chat_templates"
    return (folder / f"{template}.jinja").read_text()


def tiny_config(
    tower: str = "clip", projector: str = "mlp2x", language: str = "llama", tied: bool = False
) -> ModelConfig:
    """A model from scratch, as a recipe would write it."""
    return ModelConfig.model_validate(
        {
            "vision": {"config": TOWERS[tower]},
            "projector": PROJECTORS[projector],
            "language": {
                "config": LANGUAGES[language] | {"tie_word_embeddings": tied},
                "tokenizer": {"vocab_size": 512},
            },
        }
    )


def tiny_model(
    tower: str = "clip",
    projector: str = "mlp2x",
    language: str = "llama",
    seed: int = 0,
    tied: bool = False,
    template: str = "vicuna_v1",
) -> tuple[VLM, LlavaProcessor]:
    """A model with weights drawn from `seed`, in eval mode, with packed attention; and its processor."""
    config = tiny_config(tower, projector, language, tied)
    return build_model(config, seed, template_text(template), lambda: TEXTS)


def tiny_processor(template: str = "vicuna_v1") -> LlavaProcessor:
    """The processor of `tiny_model()`: 16 tokens an image, square padding."""
    return tiny_model(template=template)[1]


def tiny_images(folder: Path, n: int) -> list[str]:
    """Names of `n` new PNG files in `folder`: noise of different sizes, wide and tall."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(n)]
    for i, name in enumerate(names):
        height, width = 20 + 5 * (i % 7), 60 - 6 * (i % 5)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names
