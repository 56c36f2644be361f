"""The mathematics of merging: several tensors of one name in, one out. Each method is a class with its settings.

Every combination is of one tensor with its namesakes and of nothing else, so that a model can be merged
tensor by tensor, in any order, from any number of files.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

Same = Float[Tensor, "*shape"]


class Method(ABC):
    """A way to make one tensor of several; the result has at least float32's precision."""

    needs_base = False
    """Whether it works on the differences to a base model."""

    @abstractmethod
    def combine(self, name: str, tensors: Sequence[Same], base: Same | None) -> Same:
        """The merged tensor; `base` is there if the method needs it."""

    @abstractmethod
    def fault(self, count: int) -> str:
        """Why so many models cannot be merged with these settings; empty when they can."""


@final
@dataclass(frozen=True, slots=True)
class Copy(Method):
    """The first model's tensor as it is: for a part that was frozen, or must not change."""

    def combine(self, name: str, tensors: Sequence[Same], base: Same | None) -> Same:
        return tensors[0]

    def fault(self, count: int) -> str:
        return ""


@final
@dataclass(frozen=True, slots=True)
class Average(Method):
    """The mean with `weights` (scaled to add up to one; empty: uniform), as model soups, arXiv 2203.05482."""

    weights: tuple[float, ...] = ()

    def combine(self, name: str, tensors: Sequence[Same], base: Same | None) -> Same:
        return mean(tensors, self.weights or (1.0,) * len(tensors))

    def fault(self, count: int) -> str:
        if self.weights and sum(self.weights) <= 0:
            return "the weights add up to nothing"
        return _count_fault(self.weights, count)


@final
@dataclass(frozen=True, slots=True)
class Slerp(Method):
    """The point at share `t` of the arc from the first tensor to the second."""

    t: float = 0.5

    def combine(self, name: str, tensors: Sequence[Same], base: Same | None) -> Same:
        return slerp(tensors[0], tensors[1], self.t)

    def fault(self, count: int) -> str:
        if count != 2:
            return f"slerp lies between two models, not {count}"
        return "" if 0 <= self.t <= 1 else f"t is {self.t}; it goes from 0 (the first model) to 1"


@final
@dataclass(frozen=True, slots=True)
class Ties(Method):
    """TIES-Merging (arXiv 2306.01708, algorithm 1): trim, elect a sign, mean of those that have it."""

    density: float = 0.2
    """Share of each difference that is kept, the largest entries; the paper's 20 %."""
    scale: float = 1.0
    """What the merged difference is multiplied with before it is added to the base (lambda)."""
    weights: tuple[float, ...] = ()
    """Factor of each model's difference; empty: 1 each."""
    needs_base = True

    def combine(self, name: str, tensors: Sequence[Same], base: Same | None) -> Same:
        assert base is not None
        changes = ties(_changes(tensors, base), self.weights or (1.0,) * len(tensors), self.density)
        return base.float() + self.scale * changes

    def fault(self, count: int) -> str:
        return _density_fault(self.density) or _count_fault(self.weights, count)


@final
@dataclass(frozen=True, slots=True)
class Dare(Method):
    """DARE (arXiv 2311.03099, section 3.1): drop entries of each difference at random, rescale the rest."""

    density: float = 0.2
    """Share of entries that is kept: 1 - p of the paper."""
    scale: float = 1.0
    """What the merged difference is multiplied with before it is added to the base."""
    weights: tuple[float, ...] = ()
    """Factor of each model's difference; empty: 1/n each, their mean."""
    seed: int = 0
    needs_base = True

    def combine(self, name: str, tensors: Sequence[Same], base: Same | None) -> Same:
        assert base is not None
        weights = self.weights or (1 / len(tensors),) * len(tensors)
        kept = (
            thinned(change, self.density, generator(self.seed, name, model))
            for model, change in enumerate(_changes(tensors, base))
        )
        merged = sum(weight * change for weight, change in zip(weights, kept, strict=True))
        return base.float() + self.scale * merged

    def fault(self, count: int) -> str:
        return _density_fault(self.density) or _count_fault(self.weights, count)


METHODS: dict[str, type[Method]] = {
    "average": Average,
    "slerp": Slerp,
    "ties": Ties,
    "dare": Dare,
    "copy": Copy,
}


def _count_fault(weights: Sequence[float], count: int) -> str:
    return f"{len(weights)} weights for {count} models" if weights and len(weights) != count else ""


def _density_fault(density: float) -> str:
    return "" if 0 < density <= 1 else f"the density is {density}; it must be above 0 and at most 1"


def _changes(tensors: Sequence[Same], base: Same) -> list[Same]:
    """What each model changed of the base, in float32."""
    return [tensor.float() - base.float() for tensor in tensors]


def mean(tensors: Sequence[Same], weights: Sequence[float]) -> Same:
    """The weighted mean in float64: in that type the mean of equal float32 numbers is the number itself."""
    total = math.fsum(weights)
    first, *others = (weight / total for weight in weights)
    result = tensors[0].double() * first  # not from zeros: 0 + -0 loses the sign
    for tensor, weight in zip(tensors[1:], others, strict=True):
        result.add_(tensor, alpha=weight)
    return result


def ema_weights(count: int, decay: float) -> tuple[float, ...]:
    """The weights, oldest first, with which `mean` is the exponential moving average of a run's steps.

    It starts at the oldest; each later one enters with 1 - `decay`.
    """
    return (decay ** (count - 1), *((1 - decay) * decay ** (count - 1 - step) for step in range(1, count)))


def slerp(a: Same, b: Same, t: float) -> Same:
    """Spherical interpolation of two tensors read as vectors, in float64; the ends are exactly the ends.

    Vectors that point the same way (or have no length) lie on no arc: between them it is a line.
    """
    if t in (0, 1):
        return (a, b)[int(t)]
    first, second = a.double(), b.double()
    lengths = first.norm() * second.norm()
    cosine = float((first * second).sum() / lengths) if lengths > 0 else 1.0
    if abs(cosine) > 1 - 1e-9:
        return (1 - t) * first + t * second
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def trimmed(change: Same, density: float) -> Same:
    """The largest entries, by magnitude, a share `density` of them; zeros elsewhere."""
    count = int(density * change.numel())
    flat = change.reshape(-1)
    kept = flat.abs().topk(count).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(change)


def ties(changes: Sequence[Same], weights: Sequence[float], density: float) -> Same:
    """The merged change: at each entry the mean of the trimmed changes that have the sign of their sum.

    Where the sum is zero the positive ones count, as in peft.
    """
    kept = [trimmed(change, density) for change in changes]
    mass = sum(kept[1:], start=kept[0])
    sign = torch.where(mass >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(mass), torch.zeros_like(mass)
    for change, weight in zip(kept, weights, strict=True):
        agrees = change.sign() == sign
        total += weight * change * agrees
        count += agrees
    return total / count.clamp(min=1)


def thinned(change: Same, density: float, source: torch.Generator) -> Same:
    """The change with entries kept with probability `density` and divided by it: the same on average."""
    kept = torch.rand(change.shape, generator=source) < density
    return change * kept / density


def generator(seed: int, name: str, model: int) -> torch.Generator:
    """The random numbers of one tensor of one model: neither the order of tensors nor of files matters."""
    digest = hashlib.sha256(f"{seed}:{model}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
