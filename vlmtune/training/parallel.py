"""The face that one process, DDP, FSDP2 and ZeRO show to the engine and the checkpoint.

A strategy owns the wrapped objective and its optimizer. Weights leave it, and all enter it, as full tensors by
parameter name; of the optimizer's state, twice as large or more, each rank gives the part it holds. A checkpoint knows
nothing of the strategy or the world size that wrote it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlmtune.objectives.base import Objective
from vlmtune.types import ChatBatch, LossOutput


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries of a tensor that follow one another in row-major order: what one rank holds of it, perhaps all."""

    value: Tensor
    """On the CPU."""
    start: int
    """The place of the first among the entries of the whole."""
    shape: tuple[int, ...]
    """Of the whole."""


@final
class Autocasting(nn.Module):
    """The objective in the recipe's precision, inside the wrapper: DeepSpeed's engine turns off what is outside."""

    def __init__(self, objective: Objective, autocast: Callable[[], AbstractContextManager]) -> None:
        super().__init__()
        self.objective = objective
        self._autocast = autocast

    def forward(self, batch: ChatBatch, totals: Mapping[str, int | float]) -> LossOutput:
        with self._autocast():
            return self.objective(batch, totals)


class Parallel(ABC):
    """One way to train on the processes of a launch. Every method is called by all ranks together."""

    sharded: bool
    """No rank holds all weights: a forward pass is collective."""
    shares_moments: bool
    """Every rank holds a part of the optimizer's state."""

    def __init__(self, accelerator: Accelerator, objective: Objective, half: bool) -> None:
        self.accelerator = accelerator
        self.objective = objective
        self._half = half
        self.module: nn.Module
        """The wrapped objective."""
        self.optimizer: Any
        """The wrapped optimizer; its groups take the learning rates."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called, for people."""

    @abstractmethod
    def learn(self, batch: ChatBatch, totals: Mapping[str, int | float], last: bool) -> LossOutput:
        """The micro-batch's share, after its backward pass. `last`: no other follows before the update."""

    @abstractmethod
    def update(self) -> float:
        """The global gradient norm before clipping, after one optimizer step; not finite: no weight has moved."""

    @abstractmethod
    def reached(self) -> set[str]:
        """Names of the parameters that a backward pass has reached so far (asked for before the update)."""

    @abstractmethod
    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The full tensors of these entries of the objective's state, on the CPU of the main process; {} elsewhere."""

    @abstractmethod
    def moments(self) -> dict[str, Piece]:
        """The part of the optimizer's state that this rank is to save, as `<entry>:<parameter name>` -> piece.

        Nothing is gathered; the pieces of all ranks hold every entry once.
        """

    @abstractmethod
    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Puts a whole state in place, of this or another strategy; every rank passes all of it."""

    def autocast(self) -> AbstractContextManager:
        """Inside, the recipe's precision is in force.

        Casts are not kept from one use to the next when weights are sharded: that would hold a half-precision copy of
        the whole model.
        """
        if not self._half:
            return nullcontext()
        kind = self.accelerator.device.type
        return torch.autocast(kind, torch.bfloat16, cache_enabled=not self.sharded)

    def evaluate(self, batch: ChatBatch, totals: Mapping[str, int | float]) -> LossOutput:
        """The micro-batch's share, through the wrapper (which gathers sharded weights)."""
        return self.module(batch, totals)

    def describe(self) -> str:
        """A line for the start of a run."""
        count = self.accelerator.num_processes
        return f"{count} process{'es' if count > 1 else ''}, {self.name} on {self.accelerator.device.type}"


def gathered(
    objective: nn.Module, names: Iterable[str], keep: Callable[[Tensor], Tensor | None]
) -> dict[str, Tensor]:
    """`keep` of these entries of the objective's state, one after the other, without those that are None.

    `keep` gets the parameters themselves, and a tied one once: both its names share what comes back.
    """
    held = objective.state_dict() | dict(objective.named_parameters(remove_duplicate=False))
    kept: dict[int, Tensor | None] = {}
    found: dict[str, Tensor] = {}
    for name in names:
        if id(held[name]) not in kept:
            kept[id(held[name])] = keep(held[name])
        if (value := kept[id(held[name])]) is not None:
            found[name] = value
    return found
