"""What is trained, part by part, as the recipe says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from vlmtune.config.section import Section, mode_tag

Part = Literal["vision", "projector", "language"]


class Frozen(Section):
    """The part keeps its weights."""

    mode: Literal["frozen"]


class Full(Section):
    """Every reachable weight of the part is trained."""

    mode: Literal["full"]
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of this part; None takes optim.lr."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decay of this part's matrices; None takes optim.weight_decay. Biases and norms are never decayed."""


class _Adapters(Section):
    """Low-rank matrices beside some linear layers of the part, whose own weights stay frozen."""

    rank: int = Field(default=16, ge=1)
    """Columns of A and rows of B in W + (alpha / rank) B A."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the update before it is divided by rank; None is 2 x rank (LLaVA's finetune_lora.sh: 256 / 128)."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of an adapter's inputs set to zero while training (LLaVA's lora_dropout)."""
    targets: tuple[str, ...] | None = None
    """Layers as paths inside the part, `*` for anything (`layers.*.self_attn.q_proj`). None: every linear layer of
    the part's transformer blocks that a gradient reaches (of a projector: all its linear layers); never lm_head."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of this part; None takes optim.lr."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decay of this part's adapters; None takes optim.weight_decay."""
    no_grad: bool = False
    """Only for vision: the adapters exist and never move. Reproduces the released SQ-LLaVA (arXiv 2403.11299),
    whose tower runs without gradients."""

    @property
    def scale(self) -> float:
        """alpha, resolved."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def __str__(self) -> str:
        return f"{type(self).__name__} of rank {self.rank}, alpha {self.scale:g}"


class Lora(_Adapters):
    """LoRA (arXiv 2106.09685)."""

    mode: Literal["lora"]


class Dora(_Adapters):
    """DoRA (arXiv 2402.09353): the length of each row is trained apart from its direction."""

    mode: Literal["dora"]


class Qlora(_Adapters):
    """LoRA on layers kept in 4 bits and computed in model.dtype: NF4, double quantisation (arXiv 2305.14314)."""

    mode: Literal["qlora"]

    def __str__(self) -> str:
        return f"{super().__str__()}; the weights are the 4-bit ones it was trained on, dequantised"


Adapters = Lora | Dora | Qlora
Trained = Full | Adapters

PartTuning = Annotated[
    Annotated[Frozen, Tag("frozen")]
    | Annotated[Full, Tag("full")]
    | Annotated[Lora, Tag("lora")]
    | Annotated[Dora, Tag("dora")]
    | Annotated[Qlora, Tag("qlora")],
    Discriminator(mode_tag),
]


class TuningConfig(Section):
    """What is trained, part by part."""

    vision: PartTuning = Frozen(mode="frozen")
    projector: PartTuning = Full(mode="full")
    language: PartTuning = Full(mode="full")

    @model_validator(mode="after")
    def _gradients_stop_in_front(self) -> TuningConfig:
        if any(isinstance(part, Adapters) and part.no_grad for part in (self.projector, self.language)):
            raise ValueError("no_grad is for the vision tower only: what lies behind it would not learn")
        return self

    def parts(self) -> dict[Part, PartTuning]:
        """How each part is trained."""
        return {"vision": self.vision, "projector": self.projector, "language": self.language}
