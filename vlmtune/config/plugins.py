"""The options of projectors, transforms and objectives: each `*Config` carries the plug-in's name in `type`.

No torch here: a recipe is checked without it. A dotted `type` is imported as written and gets its keys unchecked.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Discriminator, Field, Tag

from vlmtune.config.section import Custom, Section, type_tag

# ---------------------------------------------------------------- projectors


class LinearConfig(Section):
    """One linear layer (LLaVA-1)."""

    type: Literal["linear"]


class Mlp2xConfig(Section):
    """Linear, GELU, linear (LLaVA-1.5)."""

    type: Literal["mlp2x"]


class PixelShuffleConfig(Section):
    """Each factor x factor square of patches becomes one token, then linear, GELU, linear."""

    type: Literal["pixel_shuffle"]
    factor: int = Field(default=2, ge=2)
    """Side of the square; tokens fall by its square."""


class ResamplerConfig(Section):
    """Learned queries read the patches by cross attention: a fixed number of tokens."""

    type: Literal["resampler"]
    queries: int = Field(default=64, ge=1)
    """Tokens per image."""
    heads: int = Field(default=8, ge=1)
    """Attention heads; must divide the language width."""
    layers: int = Field(default=2, ge=1)
    """Cross-attention blocks."""


ProjectorConfig = Annotated[
    Annotated[LinearConfig, Tag("linear")]
    | Annotated[Mlp2xConfig, Tag("mlp2x")]
    | Annotated[PixelShuffleConfig, Tag("pixel_shuffle")]
    | Annotated[ResamplerConfig, Tag("resampler")]
    | Annotated[Custom, Tag("custom")],
    Discriminator(type_tag),
]

_PROJECTORS = (LinearConfig, Mlp2xConfig, PixelShuffleConfig, ResamplerConfig)
PROJECTOR_TYPES = {get_args(each.model_fields["type"].annotation)[0]: each for each in _PROJECTORS}
"""The options of each projector of ours, by its name in a recipe."""

# ---------------------------------------------------------------- transforms


class ShuffleTurnsConfig(Section):
    """Question-answer pairs in a new order each epoch; `<image>` marks stay in front."""

    type: Literal["shuffle_turns"]


TransformConfig = Annotated[
    Annotated[ShuffleTurnsConfig, Tag("shuffle_turns")] | Annotated[Custom, Tag("custom")],
    Discriminator(type_tag),
]


# ---------------------------------------------------------------- objectives


class NextTokenConfig(Section):
    """Cross entropy of the supervised tokens (visual instruction tuning)."""

    type: Literal["next_token"] = "next_token"
    chunk: int = Field(default=512, ge=1)
    """Supervised tokens whose logits exist at one time."""


ObjectiveConfig = Annotated[
    Annotated[NextTokenConfig, Tag("next_token")] | Annotated[Custom, Tag("custom")],
    Discriminator(type_tag),
]
