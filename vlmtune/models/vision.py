"""Vision towers: one row per family, and the only place where image tokens are counted.

To add a family: a row in TOWER_FAMILIES. Everything that depends on the tower (which hidden state is read,
whether a class token is dropped, which weights no gradient reaches, how many tokens an image has) follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import TypeAdapter
from transformers import LlavaConfig, PreTrainedConfig

from vlmtune.config.plugins import ProjectorConfig
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.projectors import Projector, build_projector

_PROJECTOR = TypeAdapter(ProjectorConfig)


@dataclass(frozen=True, slots=True)
class TowerFamily:
    """What distinguishes one family of vision transformers from another."""

    model_type: str
    """`model_type` of the tower's own config."""
    prefix_tokens: Literal[0, 1]
    """Class tokens before the patches."""
    layers: str
    """Where the list of blocks is, inside the tower."""
    unreachable: tuple[str, ...]
    """Modules and weights behind or beside every hidden state."""
    feature_layer: int = -2
    """Hidden state read by default; the last but one, as in LLaVA-1.5 and Prismatic (arXiv 2402.07865)."""

    def unreached(self, blocks: int, feature_layer: int) -> tuple[str, ...]:
        """Names of what the hidden state `feature_layer` of a tower of so many blocks does not depend on."""
        first = feature_layer if feature_layer >= 0 else blocks + 1 + feature_layer
        return self.unreachable + tuple(f"{self.layers}.{i}" for i in range(first, blocks))

    @property
    def select(self) -> Literal["default", "full"]:
        """transformers' select strategy; `default` drops one token: without a class token a real patch."""
        return "default" if self.prefix_tokens else "full"


TOWER_FAMILIES: dict[str, TowerFamily] = {
    family.model_type: family
    for family in (
        TowerFamily("clip_vision_model", 1, "encoder.layers", ("post_layernorm",)),
        TowerFamily("siglip_vision_model", 0, "encoder.layers", ("post_layernorm", "head")),
        TowerFamily("dinov2", 1, "encoder.layer", ("layernorm", "embeddings.mask_token")),
    )
}


def tower_family(config: PreTrainedConfig) -> TowerFamily:
    """The row of a tower's config; raises CheckpointError for a family that is not in the table."""
    try:
        return TOWER_FAMILIES[config.model_type]
    except KeyError:
        raise CheckpointError(
            f"no vision tower family {config.model_type!r}",
            where="model.vision",
            remedy=f"Known families: {', '.join(TOWER_FAMILIES)}.",
        ) from None


def projector_config(config: LlavaConfig) -> ProjectorConfig:
    """The projector's options; a stock `llava`, whose config has none, has LLaVA-1.5's."""
    return _PROJECTOR.validate_python(config.to_dict().get("projector", {"type": "mlp2x"}))


def resolve_feature_layer(config: PreTrainedConfig, chosen: int | None) -> int:
    """The chosen hidden state or the family's own; raises RecipeError when the tower has no such block.

    Hidden state 0, the embeddings, is refused: no block would be read.
    """
    layer = tower_family(config).feature_layer if chosen is None else chosen
    blocks = config.num_hidden_layers
    if layer == 0 or not -blocks <= layer <= blocks:
        raise RecipeError(
            f"the vision tower has no hidden state {layer}",
            where="model.vision.feature_layer",
            remedy=f"Choose 1 to {blocks} from the front, or -1 to -{blocks} from the back.",
        )
    return layer


def patch_features(config: LlavaConfig) -> int:
    """Features per image that the tower hands to the projector."""
    vision = config.vision_config
    prefix = tower_family(vision).prefix_tokens
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return (vision.image_size // vision.patch_size) ** 2 + prefix - dropped


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """Tokens of an image of any size: towers of a fixed grid see every image at the same size."""

    tokens: int

    def __call__(self, width: int, height: int) -> int:
        return self.tokens


def model_projector(config: LlavaConfig) -> Projector:
    """The projector of a model, with fresh weights."""
    return build_projector(
        projector_config(config),
        config.vision_config.hidden_size,
        config.text_config.hidden_size,
        patch_features(config),
        config.projector_hidden_act,
    )


def token_counter(config: LlavaConfig) -> ImageTokens:
    """The function `(width, height) -> image tokens` of a model; picklable. Nothing else counts them."""
    with torch.device("meta"):
        return ImageTokens(model_projector(config).num_tokens(patch_features(config)))


def processor_counts(config: LlavaConfig) -> dict[str, int | str]:
    """The fields that make transformers' LlavaProcessor count as `token_counter` does.

    It computes grid + num_additional_image_tokens, less one under `default`, whatever the projector.
    """
    vision = config.vision_config
    grid = (vision.image_size // vision.patch_size) ** 2
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return {
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": token_counter(config).tokens - grid + dropped,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
