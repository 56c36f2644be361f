"""Vision towers loaded from a folder or the hub, or made from a config."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.models.siglip import SiglipVisionModel
from transformers.models.siglip2 import Siglip2VisionConfig, Siglip2VisionModel

from vlmtune.config.schema import VisionConfig
from vlmtune.errors import RecipeError
from vlmtune.models.checkpoint import load_config, load_model, load_weights
from vlmtune.models.vision import tower_family


def load_tower(config: VisionConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A tower of a known family; fresh weights (from the global generator) when it is given by its config.

    A dual encoder (CLIP, SigLIP) gives its vision half, a LLaVA-style model its tower. SigLIP2's NaFlex tower
    becomes the fixed-grid SigLIP tower that computes the same. Raises CheckpointError or RecipeError.
    """
    if config.path is None:
        own = config_from(config.config or {}, "model.vision.config")
        tower = AutoModel.from_config(_check_family(own)).to(dtype)
    elif is_vlm(config.path, trust_remote_code):
        model, _ = load_model(config.path, dtype, trust_remote_code=trust_remote_code, merged=True)
        tower = model.model.vision_tower
    else:
        own = load_config(config.path, "model.vision.path", trust_remote_code=trust_remote_code)
        whole = "vision_config" not in own.sub_configs
        tower = load_weights(
            AutoModel,
            config.path,
            "model.vision.path",
            dtype,
            _check_family(own if whole else own.vision_config),
            trust_remote_code=trust_remote_code,
            part_of_more=not whole,
        )
    if isinstance(tower, Siglip2VisionModel):
        return fixed_grid(tower, config.image_size)
    if config.image_size not in (None, tower.config.image_size):
        raise RecipeError(
            f"the tower sees {tower.config.image_size} pixels, not {config.image_size}",
            where="model.vision.image_size",
            remedy="Leave it out, or choose a SigLIP2 NaFlex tower.",
        )
    return tower


def is_vlm(path: str, trust_remote_code: bool = False) -> bool:
    """Whether a folder or hub id holds a LLaVA-style model."""
    config = load_config(path, "model.vision.path", trust_remote_code=trust_remote_code)
    return isinstance(config, LlavaConfig)


def _check_family(config: PreTrainedConfig) -> PreTrainedConfig:
    if config.model_type != Siglip2VisionConfig.model_type:
        tower_family(config)
    return config


def config_from(options: dict[str, Any], where: str) -> PreTrainedConfig:
    """transformers' config of `options["model_type"]`; raises RecipeError for a wrong type, key or value.

    transformers itself keeps unknown keys in silence: a misspelt size would be the default size.
    """
    rest = dict(options)
    try:
        config = AutoConfig.for_model(rest.pop("model_type", ""), **rest)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise RecipeError(str(error), where=where, remedy="See transformers' documentation of it.") from error
    fields = [field.name for field in dataclasses.fields(config)] + list(config.attribute_map)
    for key in sorted(rest.keys() & config.to_dict().keys() - set(fields)):
        near = difflib.get_close_matches(key, fields, n=1)
        raise RecipeError(
            f"{config.model_type} has no option {key!r}",
            where=where,
            remedy=f"Did you mean {near[0]!r}?" if near else f"Options: {', '.join(sorted(fields))}.",
        )
    return config


def fixed_grid(tower: Siglip2VisionModel, image_size: int | None = None) -> SiglipVisionModel:
    """The SigLIP tower for squares of `image_size` pixels that computes what the NaFlex tower does on them.

    NaFlex multiplies flattened patches (row, column, channel) by a matrix and resizes its position grid in
    every forward; here the matrix is a convolution and the grid is resized once. None keeps the grid.
    """
    old: Siglip2VisionConfig = tower.config
    config = grid_config(old, image_size)
    grid, side = math.isqrt(old.num_patches), config.image_size // config.patch_size
    fixed = SiglipVisionModel(config)
    weights = dict(tower.state_dict())
    patch = weights["embeddings.patch_embedding.weight"]
    weights["embeddings.patch_embedding.weight"] = patch.unflatten(
        1, (old.patch_size, old.patch_size, old.num_channels)
    ).permute(0, 3, 1, 2)
    weights["embeddings.position_embedding.weight"] = _resize_grid(
        weights["embeddings.position_embedding.weight"], grid, side
    )
    fixed.load_state_dict(weights)
    return fixed.to(tower.dtype).train(tower.training)


def grid_config(naflex: Siglip2VisionConfig, image_size: int | None = None) -> SiglipVisionConfig:
    """The config of `fixed_grid`'s tower; raises RecipeError when patches do not fill the square."""
    if image_size is not None and image_size % naflex.patch_size:
        raise RecipeError(
            f"patches of {naflex.patch_size} pixels do not fill {image_size}",
            where="model.vision.image_size",
            remedy=f"Choose a multiple of {naflex.patch_size}.",
        )
    side = math.isqrt(naflex.num_patches) * naflex.patch_size if image_size is None else image_size
    shared = {field.name for field in dataclasses.fields(SiglipVisionConfig)} & naflex.to_dict().keys()
    options = {key: value for key, value in naflex.to_dict().items() if key in shared - {"model_type"}}
    return SiglipVisionConfig(**options | {"image_size": side})


def _resize_grid(positions: Float[Tensor, "p d"], grid: int, side: int) -> Float[Tensor, "q d"]:
    """As Siglip2VisionEmbeddings does: bilinear, antialiased, in float32."""
    square = positions.float().T.reshape(1, -1, grid, grid)
    resized = F.interpolate(square, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized.flatten(2).squeeze(0).T.to(positions.dtype)
