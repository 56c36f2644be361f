"""The options of projectors, transforms and objectives: each `*Config` carries the plug-in's name in `type`.

No torch here: a recipe is checked without it. A dotted `type` is imported as written and gets its keys unchecked.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Discriminator, Field, Tag, model_validator

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


class ClusteringConfig(Section):
    """Every patch takes on what its cluster has in common, then an MLP; as many tokens as patches (SQ-LLaVA)."""

    type: Literal["clustering"]
    formula: Literal["released", "paper"] = "released"
    """released: pooled centres, a patch belongs to one cluster. paper: learned centres, all of them averaged."""
    centers: int = Field(default=256, ge=1)
    """Clusters; the paper's K (arXiv 2403.11299)."""
    iterations: int = Field(default=2, ge=1)
    """Rounds of assigning patches to centres and moving the centres; the paper's T."""
    normalize_over: Literal["tokens", "channels"] | None = None
    """released only: what the patches are normalised over before they are compared with the centres. None is
    tokens, as released (each channel by its norm over the image); channels is the usual cosine similarity."""
    prototypes: bool = True
    """False leaves the MLP alone: what the clusters are worth."""

    @model_validator(mode="after")
    def _released_only(self) -> ClusteringConfig:
        if self.normalize_over is not None and self.formula == "paper":
            raise ValueError("normalize_over is an option of the released formula")
        return self


ProjectorConfig = Annotated[
    Annotated[LinearConfig, Tag("linear")]
    | Annotated[Mlp2xConfig, Tag("mlp2x")]
    | Annotated[PixelShuffleConfig, Tag("pixel_shuffle")]
    | Annotated[ResamplerConfig, Tag("resampler")]
    | Annotated[ClusteringConfig, Tag("clustering")]
    | Annotated[Custom, Tag("custom")],
    Discriminator(type_tag),
]

_PROJECTORS = (LinearConfig, Mlp2xConfig, PixelShuffleConfig, ResamplerConfig, ClusteringConfig)
PROJECTOR_TYPES = {get_args(each.model_fields["type"].annotation)[0]: each for each in _PROJECTORS}
"""The options of each projector of ours, by its name in a recipe."""

# ---------------------------------------------------------------- transforms


class ShuffleTurnsConfig(Section):
    """Question-answer pairs in a new order each epoch; `<image>` marks stay in front."""

    type: Literal["shuffle_turns"]


class SelfQuestionConfig(Section):
    """User turns about an image become the questioner's, and what they ask is learned too (SQ-LLaVA)."""

    type: Literal["self_question"]
    probability: float = Field(default=0.5, ge=0, le=1)
    """Of each turn, drawn anew each epoch; the paper's delta (arXiv 2403.11299)."""
    first_turn: bool = False
    """True also takes the first user turn, so that a model learns to ask with nothing but the image before it.
    The paper's code never does."""


TransformConfig = Annotated[
    Annotated[ShuffleTurnsConfig, Tag("shuffle_turns")]
    | Annotated[SelfQuestionConfig, Tag("self_question")]
    | Annotated[Custom, Tag("custom")],
    Discriminator(type_tag),
]


# ---------------------------------------------------------------- objectives


class NextTokenConfig(Section):
    """Cross entropy of the supervised tokens (visual instruction tuning)."""

    type: Literal["next_token"] = "next_token"
    chunk: int = Field(default=512, ge=1)
    """Supervised tokens whose logits exist at one time."""


class PixelsTargetConfig(Section):
    """The picture as the tower saw it, a square of pixels a token (the paper's Ross^R-Pixel)."""

    type: Literal["pixels"]
    side: int | None = Field(default=None, ge=1)
    """Pixels that the picture is resized to, rounded down to a multiple of the token grid; None: the tower's."""


class VaeTargetConfig(Section):
    """Latents of a frozen VAE, a 2 x 2 window a token (the paper's default, with FLUX.1's)."""

    type: Literal["vae"]
    path: str
    """Folder of a diffusers AutoencoderKL; `vlmtune vae` trains a small one."""


class FeaturesTargetConfig(Section):
    """Patch features of a frozen teacher tower."""

    type: Literal["features"]
    path: str
    """Folder or hub id of a CLIP, SigLIP, SigLIP2 or DINOv2 model."""
    layer: int | None = None
    """Hidden state that is reconstructed; None takes the tower family's default."""


TargetConfig = Annotated[
    Annotated[PixelsTargetConfig, Tag("pixels")]
    | Annotated[VaeTargetConfig, Tag("vae")]
    | Annotated[FeaturesTargetConfig, Tag("features")],
    Discriminator(type_tag),
]


class DenoiserConfig(Section):
    """The network that reconstructs; discarded after training."""

    profile: Literal["adaln", "additive"] = "adaln"
    """adaln: what the released code builds. additive: what the paper's figure draws."""
    depth: int = Field(default=3, ge=1)
    """Blocks (denoiser_vit3x)."""
    width: int = Field(default=1024, ge=4, multiple_of=4)
    """Width; the released builder takes 1280 at depth 8 and 1536 at depth 12."""
    heads: int = Field(default=16, ge=1)
    """Attention heads; must divide the width."""

    @model_validator(mode="after")
    def _divides(self) -> DenoiserConfig:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} must divide width {self.width}")
        return self


class WeightScheduleConfig(Section):
    """How the weight of a loss term moves over a stage, as a factor of it."""

    type: Literal["linear", "cosine"] = "cosine"
    start: float = Field(default=1.0, ge=0)
    """At the first optimizer step."""
    end: float = Field(default=0.0, ge=0)
    """After the last."""


class ReconstructionConfig(Section):
    """next_token, and the reconstruction of the image from the hidden states at its tokens (Ross)."""

    type: Literal["reconstruction"]
    chunk: int = Field(default=512, ge=1)
    """Supervised tokens whose logits exist at one time."""
    weight: float = Field(default=1.0, ge=0)
    """Of the second term (Ross: 1, constant); at 0 neither denoiser nor target exist and next_token remains."""
    weight_schedule: WeightScheduleConfig | None = None
    """How the weight moves over the stage; None is Ross's constant. Losses are logged as weighted."""
    method: Literal["denoise", "regress"] = "denoise"
    """denoise: predict the noise in the target. regress: predict the target with a two-layer MLP (ablation)."""
    target: TargetConfig
    denoiser: DenoiserConfig = DenoiserConfig()
    draws: int = Field(default=4, ge=1)
    """Time steps and noises drawn for each image at each step (released code: 4); one suffices to regress."""
    as_written: bool = False
    """Count text-only samples as images of the mean colour, as the released code does; for comparison."""
    weights: str | None = None
    """Step folder, or run folder (its last step), whose denoiser this one starts from (stage 1 for stage 2)."""


ObjectiveConfig = Annotated[
    Annotated[NextTokenConfig, Tag("next_token")]
    | Annotated[ReconstructionConfig, Tag("reconstruction")]
    | Annotated[Custom, Tag("custom")],
    Discriminator(type_tag),
]
