"""What is trained, part by part, as the recipe says it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from vlmtune.config.section import Section, mode_tag


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


PartTuning = Annotated[
    Annotated[Frozen, Tag("frozen")] | Annotated[Full, Tag("full")], Discriminator(mode_tag)
]


class TuningConfig(Section):
    """What is trained, part by part."""

    vision: PartTuning = Frozen(mode="frozen")
    projector: PartTuning = Full(mode="full")
    language: PartTuning = Full(mode="full")
