"""Which strategy a launch means, and torch's own: one process, DDP, FSDP2. DeepSpeed's is in zero.py."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vlmtune.config.schema import Recipe
from vlmtune.errors import RecipeError
from vlmtune.objectives.base import Objective
from vlmtune.training.parallel import Autocasting, Parallel, Piece, gathered
from vlmtune.types import ChatBatch, LossOutput

logger = logging.getLogger(__name__)


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

    def learn(self, batch: ChatBatch, totals: Mapping[str, int | float], last: bool) -> LossOutput:
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
