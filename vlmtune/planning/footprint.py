"""Bytes that a micro-batch takes beside the weights: the real forward and backward, on tensors without memory.

The objective's own functions run unchanged on fake weights (`FakeTensorMode`), with real ids, positions and segment
lengths. Every tensor that comes to life is counted until it dies, so checkpointing, LoRA, frozen parts, autocast's
copies of the weights and the loss's chunks need no formula. The language model runs at two small depths; all figures
grow evenly with its layers, which are alike.

Autocast follows the CPU's rules. CUDA's keep layer norms in float32, which matters for a trained CLIP tower only.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmtune.config.tuning import Frozen, TuningConfig
from vlmtune.models.attention import use_attention
from vlmtune.models.kernels import checkpoint_activations
from vlmtune.models.vlm import VLMConfig
from vlmtune.objectives.spine import hidden_states, token_loss
from vlmtune.planning.skeleton import meta_model, shallow
from vlmtune.types import ChatBatch

_DEPTHS = (1, 2)
"""Layers of the language model in the two runs."""
_FROZEN_TOWER = 2
"""Blocks of a tower that keeps nothing."""
_PLACES = {
    "vision": "model.model.vision_tower",
    "projector": "model.model.multi_modal_projector",
}


@dataclass(frozen=True, slots=True)
class Compute:
    """How a micro-batch is computed."""

    checkpointing: bool
    autocast: bool
    """To bfloat16, as run.precision bf16."""
    rounded: bool = False
    """Weights in bfloat16, as ZeRO and FSDP2 compute with."""
    sharded: bool = False
    """Casts of weights are made anew for each use (FSDP2, ZeRO-3)."""
    eager: bool = False
    """Attention that keeps its score matrix; every other one keeps its inputs and a sum per row."""
    chunk: int = 512
    """Rows of logits at a time, as objective.chunk."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one micro-batch on one device, beside weights, gradients and optimizer."""

    saved: Mapping[str, int]
    """Alive between forward and backward, by part; `loss` is the loss's own."""
    logits: int
    """The most that rows as wide as the vocabulary ever take."""
    forward_peak: int
    backward_peak: int

    @property
    def activations(self) -> int:
        """All that is saved for the backward pass."""
        return sum(self.saved.values())

    @property
    def working(self) -> int:
        """What the peak takes beside activations and logits: a recomputed block, gradients on their way."""
        return (
            max(self.forward_peak, self.backward_peak, self.activations + self.logits)
            - self.activations
            - self.logits
        )

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.working

    def deeper(self, other: Footprint, layers: int) -> Footprint:
        """This one, with `layers` times what `other` has more."""

        def grown(mine: int, theirs: int) -> int:
            return mine + layers * (theirs - mine)

        return Footprint(
            {part: grown(size, other.saved[part]) for part, size in self.saved.items()},
            max(self.logits, other.logits),
            grown(self.forward_peak, other.forward_peak),
            grown(self.backward_peak, other.backward_peak),
        )


def footprint(
    config: VLMConfig, tuning: TuningConfig, dtype: torch.dtype, batch: ChatBatch, compute: Compute
) -> Footprint:
    """What one forward and backward of `batch` allocates; `tuning` is without QLoRA."""
    layers, (low, high) = config.text_config.num_hidden_layers, _DEPTHS
    if layers <= high:
        return _measured(meta_model(config, tuning, dtype, compute.rounded), batch, compute)
    tower = _FROZEN_TOWER if isinstance(tuning.vision, Frozen) else None
    models = (
        meta_model(shallow(config, depth, tower), tuning, dtype, compute.rounded) for depth in (low, high)
    )
    less, more = (_measured(model, batch, compute) for model in models)
    return less.deeper(more, layers - low)


def _measured(model: nn.Module, batch: ChatBatch, compute: Compute) -> Footprint:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.to_empty(device="cpu")
        model.tie_weights()
        pixels = (
            None if batch.pixel_values is None else torch.empty_like(batch.pixel_values, dtype=torch.float32)
        )
    use_attention(model, "eager" if compute.eager else "sdpa")
    if compute.checkpointing:
        checkpoint_activations(model)
    objective = _NextToken(model, compute.chunk).train()
    for weight in objective.parameters():
        if weight.requires_grad:  # gradients are counted with the weights
            weight.register_post_accumulate_grad_hook(_drop_gradient)
    known = [*objective.parameters(), *objective.buffers(), *([] if pixels is None else [pixels])]
    count = _Count(known, model.config.text_config.vocab_size)
    cast = (
        torch.autocast("cpu", torch.bfloat16, cache_enabled=not compute.sharded)
        if compute.autocast
        else nullcontext()
    )
    batch = replace(batch, pixel_values=pixels)
    with count, _places(objective, count):
        with cast:
            loss = objective(batch)
        gc.collect()  # non-reentrant checkpoints of frozen blocks leave cycles behind
        saved = dict(count.alive)
        forward_peak, count.peak = count.peak, 0
        loss.backward()
    return Footprint(saved, count.logits_peak, forward_peak, count.peak)


class _NextToken(nn.Module):
    """The objective next_token, without what it asks of a processor."""

    def __init__(self, model: nn.Module, chunk: int) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, batch: ChatBatch) -> Tensor:
        return token_loss(self.model, hidden_states(self.model, batch), batch.labels, self.chunk)


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


@contextmanager
def _places(objective: nn.Module, count: _Count) -> Iterator[None]:
    """While it lasts, what a part's forward allocates is counted as that part's."""

    def enter(part: str) -> Any:
        return lambda *_: setattr(count, "place", part)

    modules = {part: objective.get_submodule(path) for part, path in _PLACES.items()}
    hooks = [module.register_forward_pre_hook(enter(part)) for part, module in modules.items()]
    hooks += [module.register_forward_hook(enter("language")) for module in modules.values()]
    language = objective.get_submodule("model.model.language_model")
    hooks.append(language.register_forward_hook(enter("loss")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Count(TorchDispatchMode):
    """Counts the bytes of fake storages from their first appearance until nothing refers to them."""

    def __init__(self, known: list[Tensor], vocabulary: int) -> None:
        super().__init__()
        self.place = "language"
        self.alive: Counter[str] = Counter(vision=0, projector=0, language=0, loss=0)
        self.peak = self.logits_peak = 0
        self._total = self._logits = 0
        self._vocabulary = vocabulary
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._remember(tensor, "", 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # foreign: torch
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # most calls ask for no more; this is far quicker
        if func is torch.ops.aten.index.Tensor and (shape := _masked_shape(*args)) is not None:
            out = args[0].new_empty(shape)
        else:
            out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        if id(tensor.untyped_storage()) in self._seen:
            return
        logits = size if tensor.ndim and tensor.shape[-1] == self._vocabulary else 0
        self._total += size
        self._logits += logits
        self.alive[self.place] += size
        self._remember(tensor, self.place, size, logits)
        self.peak = max(self.peak, self._total)
        self.logits_peak = max(self.logits_peak, self._logits)

    def _remember(self, tensor: Tensor, place: str, size: int, logits: int = 0) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)

        def forget(_: Any) -> None:
            del self._seen[key]
            self._total -= size
            self._logits -= logits
            if size:
                self.alive[place] -= size

        self._seen[key] = weakref.ref(storage, forget)


def _masked_shape(tensor: Tensor, indices: list[Tensor | None]) -> tuple[int, ...] | None:
    """The shape of `tensor[mask]` for a real mask, which a fake tensor cannot know; None for other indices."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype is not torch.bool:
        return None
    return (int(mask.sum()), *tensor.shape[mask.ndim :])


__all__ = ["Compute", "Footprint", "footprint"]
