"""What differs between one process, DDP, FSDP2 and ZeRO; the engine and the checkpoint read the same for all.

A strategy owns the wrapped objective and its optimizer. Weights leave it, and all enter it, as full tensors by
parameter name; of the optimizer's state, twice as large or more, each rank gives the part it holds. A checkpoint knows
nothing of the strategy or the world size that wrote it.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vlmtune.config.schema import Recipe
from vlmtune.errors import RecipeError
from vlmtune.objectives.base import Objective
from vlmtune.types import ChatBatch, LossOutput

logger = logging.getLogger(__name__)


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

    def forward(self, batch: ChatBatch, totals: dict[str, int]) -> LossOutput:
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
    def learn(self, batch: ChatBatch, totals: dict[str, int], last: bool) -> LossOutput:
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

    def evaluate(self, batch: ChatBatch, totals: dict[str, int]) -> LossOutput:
        """The micro-batch's share, through the wrapper (which gathers sharded weights)."""
        return self.module(batch, totals)

    def describe(self) -> str:
        """A line for the start of a run."""
        count = self.accelerator.num_processes
        return f"{count} process{'es' if count > 1 else ''}, {self.name} on {self.accelerator.device.type}"


def build_strategy(
    accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> Parallel:
    """The strategy of this launch, with objective and optimizer prepared for it.

    Raises RecipeError for an optimizer whose state cannot be sharded.
    """
    if shards(accelerator) and recipe.optim.type != "adamw":
        raise RecipeError(
            f"{recipe.optim.type} keeps its state in blocks that cannot be shared out over processes",
            "optim.type",
            "Launch with recipes/launch/ddp.yaml, or set optim.type=adamw.",
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from vlmtune.training.zero import Zero

        return Zero(accelerator, objective, optimizer, recipe)
    return Native(accelerator, objective, optimizer, recipe)


def shards(accelerator: Accelerator) -> bool:
    """Whether the launch's strategy moves weights to the device itself, part by part."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


@final
class Native(Parallel):
    """torch's own: one process, DDP, or FSDP2, whose parameters are DTensors."""

    def __init__(
        self, accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer, recipe: Recipe
    ) -> None:
        super().__init__(accelerator, objective, recipe.run.precision == "bf16")
        self.sharded = self.shares_moments = accelerator.distributed_type == DistributedType.FSDP
        self._max_norm = recipe.optim.max_grad_norm or float("inf")
        _warn_of_rounding(objective)
        if self.sharded:
            _configure_fsdp2(accelerator, objective, self._half)
        self.module, self.optimizer = accelerator.prepare(Autocasting(objective, self.autocast), optimizer)

    @property
    def name(self) -> str:
        if self.sharded:
            return "FSDP2"
        return "DDP" if self.accelerator.num_processes > 1 else "no wrapper"

    def learn(self, batch: ChatBatch, totals: dict[str, int], last: bool) -> LossOutput:
        # FSDP2 reduces every micro-batch: waiting would keep whole gradients on every rank.
        wait = not last and not self.sharded
        with self.accelerator.no_sync(self.module) if wait else nullcontext():
            output = self.evaluate(batch, totals)
            self.accelerator.backward(output.loss * self.accelerator.num_processes)
        return output

    def update(self) -> float:
        norm = float(_whole(self.accelerator.clip_grad_norm_(self.module.parameters(), self._max_norm)))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def reached(self) -> set[str]:
        return {name for name, weight in self.objective.named_parameters() if weight.grad is not None}

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        return gathered(self.objective, names, self._kept)

    def moments(self) -> dict[str, Piece]:
        state = self.optimizer.optimizer.state
        found = {
            f"{entry}:{name}": self._piece(_own(entry, value).detach())
            for name, weight in self.objective.named_parameters()
            for entry, value in sorted(state.get(weight, {}).items())
        }
        return {key: value for key, value in found.items() if value is not None}

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        parameters = dict(self.objective.named_parameters())
        optimizer = self.optimizer.optimizer
        for key in moments:
            entry, _, name = key.partition(":")
            value, weight = moments[key], parameters[name]
            optimizer.state[weight][entry] = _counter(value) if value.ndim == 0 else _like(value, weight)
        # torch's own loader decides where each optimizer wants its step counter.
        optimizer.load_state_dict(optimizer.state_dict())

    def _piece(self, tensor: Tensor) -> Piece | None:
        if isinstance(tensor, DTensor):
            return _rows(tensor)
        return Piece(tensor.cpu(), 0, tuple(tensor.shape)) if self.accelerator.is_main_process else None

    def _kept(self, tensor: Tensor) -> Tensor | None:
        whole = _whole(tensor.detach())
        return whole.cpu() if self.accelerator.is_main_process else None


def _warn_of_rounding(objective: nn.Module) -> None:
    if any(weight.requires_grad and weight.dtype == torch.bfloat16 for weight in objective.parameters()):
        logger.warning(
            "weights are trained in bfloat16: small steps of Adam round away. Set model.dtype=float32, or launch"
            " with a recipes/launch/zero*.yaml, which keeps float32 masters"
        )


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


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (collective), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _rows(tensor: DTensor) -> Piece | None:
    """The rows that this rank holds of a tensor as FSDP2 shards it; None if there are none, or another rank's copy."""
    place, rows, row = 0, tensor.shape[0], math.prod(tensor.shape[1:])
    for dim, (placement, at) in enumerate(
        zip(tensor.placements, tensor.device_mesh.get_coordinate() or (), strict=True)
    ):
        if placement.is_replicate() and at:
            return None
        if placement.is_shard():
            chunk = -(-rows // tensor.device_mesh.size(dim))  # as torch.chunk: the last ones may be smaller
            place, rows = place + chunk * at, max(min(chunk, rows - chunk * at), 0)
    return Piece(tensor.to_local().cpu(), place * row, tuple(tensor.shape)) if rows else None


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """The value where its weight is; of a sharded weight the part that this rank holds."""
    if isinstance(weight, DTensor):
        value = value.to(weight.device_mesh.device_type)
        # src_data_rank None: every rank has the whole value, nothing is sent.
        return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
    return value.to(weight.device)


def _own(entry: str, value: Any) -> Tensor:
    """A state as a tensor; of bitsandbytes' table of codes, which all its moments share, a copy: files want that."""
    tensor = torch.as_tensor(value)
    return tensor.clone() if entry.startswith("qmap") else tensor


def _counter(value: Tensor) -> Any:
    """A step counter: a tensor for torch's optimizers, a plain number for those that count with one."""
    return value if value.is_floating_point() else int(value)


def _configure_fsdp2(accelerator: Accelerator, objective: nn.Module, half: bool) -> None:
    """Makes each transformer block of tower and language model a unit; the rest is the root's.

    Weights are gathered, and computed with, in bfloat16; gradients are summed in float32. accelerate's own policy
    would sum them in bfloat16, and round the loss to it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = (
        transformer_auto_wrap_policy  # afresh: a stage before may have set its own blocks
    )
    plugin.transformer_cls_names_to_wrap = sorted(set(_block_names(objective)))
    plugin.mixed_precision_policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else None
    )


def _block_names(objective: nn.Module) -> Iterator[str]:
    from transformers import PreTrainedModel

    present = {type(module).__name__ for module in objective.modules()}
    for module in objective.modules():
        if isinstance(module, PreTrainedModel):
            yield from (name for name in module._no_split_modules or () if name in present)
