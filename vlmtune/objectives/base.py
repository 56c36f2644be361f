"""The one noun: an Objective owns the model and what only training needs, and turns a batch into a loss.

The law: the losses returned on all ranks and micro-batches of one optimizer step add up to the loss of the global
batch. `counts` runs before any forward; the engine sums it over micro-batches and ranks into `totals`; `forward`
divides each of its terms by that term's own total.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from vlmtune.types import ChatBatch, LossOutput


class Objective(nn.Module, ABC):
    """A loss with its model. Every objective is tested for the law on {1, 2} ranks x {1, 2, 4} micro-batches."""

    streams: ClassVar[tuple[str, ...]]
    """Names of the data streams it reads (keys of the recipe's `data`)."""
    accumulates: ClassVar[bool] = True
    """False for losses over the whole batch (contrastive): one micro-batch a step."""
    progress: float = 0.0
    """Share of the stage's optimizer steps already taken: what a weight's schedule reads. The engine sets it."""

    @abstractmethod
    def counts(self, batch: ChatBatch) -> dict[str, int]:
        """The micro-batch's contribution to the denominators, without a forward."""

    @abstractmethod
    def forward(self, batch: ChatBatch, totals: Mapping[str, int | float]) -> LossOutput:
        """The micro-batch's share of the global loss, given the denominators of the whole step."""

    @abstractmethod
    def exported(self) -> nn.Module:
        """The module that is saved for use; nothing that only training needs."""
