"""The processor: how an image becomes square pixels, and a text ids with a place for each image."""

from __future__ import annotations

from typing import Any, Literal

from transformers import (
    AddedToken,
    AutoImageProcessor,
    BaseImageProcessor,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from vlmtune.config.schema import VisionConfig
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.tokenizer import PAD, control_tokens
from vlmtune.models.vision import processor_counts
from vlmtune.models.vlm import VLMConfig
from vlmtune.types import IMAGE_MARK


def pixel_statistics(config: VisionConfig) -> dict[str, Any]:
    """Mean, deviation and resampling that a pretrained tower was trained with, or those a new one starts with.

    Raises CheckpointError when a pretrained tower comes without them: wrong ones cost accuracy in silence.
    """
    path = config.path
    if path is None:
        return {"image_mean": [0.5] * 3, "image_std": [config.pixel_std] * 3}
    try:
        saved = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no image processor in {path}: {error}",
            where="model.vision.path",
            remedy="Save the tower's preprocessor_config.json beside its weights.",
        ) from error
    return statistics_of(saved)


def statistics_of(images: BaseImageProcessor) -> dict[str, Any]:
    """Mean, deviation and resampling of an image processor."""
    return {
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        "resample": images.resample,
    }


def square_images(
    fit: Literal["pad", "crop", "stretch"], side: int, statistics: dict[str, Any]
) -> LlavaImageProcessorPil | CLIPImageProcessorPil:
    """A stock image processor for side x side pixels.

    On PIL, by name: the torchvision ones differ by up to 0.015. Both backends are saved under one name.
    """
    square = {"height": side, "width": side}
    if fit == "stretch":
        return CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False, **statistics)
    sizes = {"size": {"shortest_edge": side}, "crop_size": square}
    if fit == "crop":
        return CLIPImageProcessorPil(**sizes, **statistics)
    return LlavaImageProcessorPil(do_pad=True, **sizes, **statistics)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer with the image token and a padding token of its own, padding on the left for generation.

    Raises RecipeError when it would cut a control token of the chat template into pieces.
    """
    cut = [token for token in control_tokens(template) if len(tokenizer.tokenize(token)) != 1]
    if cut:
        raise RecipeError(
            f"the chat template writes {', '.join(cut)}, unknown to the tokenizer",
            where="model.template",
            remedy="Choose the template that the language model was made with.",
        )
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD, special=True, normalized=False)})
    tokenizer.padding_side = "left"
    return tokenizer


def build_processor(
    config: VLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    images: LlavaImageProcessorPil | CLIPImageProcessorPil,
    template: str,
) -> LlavaProcessor:
    """transformers' own processor, its image token count derived from the model."""
    return LlavaProcessor(images, tokenizer, chat_template=template, **processor_counts(config))
