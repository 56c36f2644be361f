"""What each way of sharing a model between ranks keeps on one rank: weights, gradients, optimizer, buffers, traffic.

Figures follow what the engine does (training/strategies.py, training/zero.py): torch's strategies keep every number in
its weight's own type; ZeRO in bfloat16 computes with bfloat16 weights and keeps float32 masters and moments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vlmtune.planning.skeleton import Weight

Name = Literal["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"]

_BUCKET = 500_000_000
"""Numbers in DeepSpeed's buffer for gradients on their way (reduce_bucket_size)."""
_LIVE = 1_050_000_000
"""Numbers that ZeRO-3 gathers at one time (stage3_max_live_parameters and prefetch_bucket_size)."""
_BLOCKS = 2
"""Blocks that FSDP2 has gathered at one time: the one that computes and the next."""
_SMALL = 4096
"""bitsandbytes keeps the moments of smaller tensors in float32."""
_SCALED = 256
"""Moments that share one float32 scale in 8-bit AdamW."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of one part, or of all, on one rank; `host` is in the machine's memory, not the device's."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    host: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(
            self.parameters + other.parameters,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.host + other.host,
        )

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True)
class Strategy:
    """One launch file."""

    name: Name
    stage: int
    """What is shared out: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights."""
    zero: bool = False
    """DeepSpeed's rules."""
    offload: bool = False
    """Optimizer in host memory."""

    @property
    def launch(self) -> str:
        return f"recipes/launch/{self.name}.yaml"

    def rounds(self, half: bool) -> bool:
        """Whether weights are computed with in bfloat16 whatever their own type."""
        return half and (self.zero or self.stage == 3)


STRATEGIES: dict[Name, Strategy] = {
    one.name: one
    for one in (
        Strategy("ddp", 0),
        Strategy("zero1", 1, zero=True),
        Strategy("zero2", 2, zero=True),
        Strategy("fsdp2", 3),
        Strategy("zero3", 3, zero=True),
        Strategy("zero3_offload", 3, zero=True, offload=True),
    )
}
"""In the order of what they send between ranks."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A strategy on so many ranks, for weights of a recipe."""

    strategy: Strategy
    world: int
    half: bool
    """run.precision bf16."""
    eight_bit: bool = False
    """optim.type adamw_8bit."""

    def held(self, weight: Weight) -> Held:
        """What one rank keeps of one parameter."""
        return self._zero(weight) if self.strategy.zero else self._native(weight)

    def all_held(self, weights: Iterable[Weight]) -> Held:
        """What one rank keeps of all of them."""
        return sum((self.held(weight) for weight in weights), Held())

    def buffers(self, weights: Sequence[Weight]) -> int:
        """Bytes of what is on its way between ranks."""
        trained = sum(weight.numel * self._size(weight) for weight in weights if weight.trained)
        if self.world == 1 and not self.strategy.zero:
            return 0
        if self.strategy.zero:
            bucket = _BUCKET * (2 if self.half else 4) if trained else 0
            return bucket + (self._live(weights) if self.strategy.stage == 3 else 0)
        if self.strategy.stage == 3:
            return self._units(weights)
        return trained  # DDP's buckets hold every gradient once more

    def learns(self, weights: Iterable[Weight]) -> bool:
        """Whether Adam's small steps reach the weights: in bfloat16 alone most are rounded away."""
        return self.strategy.zero or all(weight.itemsize > 2 for weight in weights if weight.trained)

    def traffic(self, weights: Sequence[Weight], micro_batches: float) -> tuple[float, float]:
        """Bytes that a rank sends and receives in one step: between ranks, and to the host."""
        trained = sum(weight.numel * self._size(weight) for weight in weights if weight.trained)
        whole = sum(self._computed(weight) for weight in weights)
        share = (self.world - 1) / self.world
        stage = self.strategy.stage
        reduced = trained * (micro_batches if stage >= 2 else 1)
        gathered = 2 * whole * micro_batches if stage == 3 else trained
        # An all-reduce is a reduce-scatter and an all-gather.
        return share * (reduced + gathered), 2.0 * trained / self.world if self.strategy.offload else 0.0

    def _native(self, weight: Weight) -> Held:
        sharers = self.world if self.strategy.stage == 3 else 1
        size = -(-weight.bytes // sharers)
        if not weight.trained:
            return Held(size)
        return Held(size, size, -(-self._moments(weight) // sharers))

    def _zero(self, weight: Weight) -> Held:
        stage, count = self.strategy.stage, weight.numel
        sharers = self.world if stage == 3 else 1
        whole = self._computed(weight)
        parameters = -(-whole // sharers)
        if not weight.trained:
            return Held(parameters)
        share = -(-count // self.world)
        masters = 12 * share  # weight and two moments in float32
        if self.strategy.offload:
            return Held(parameters, 0, 0, masters + 4 * share)
        return Held(parameters, whole if stage == 1 else 4 * share, masters)

    def _moments(self, weight: Weight) -> int:
        """Two numbers a weight, in its type, and a float32 step counter."""
        count = weight.numel
        if self.eight_bit:
            return 8 * count if count < _SMALL else 2 * count + 8 * -(-count // _SCALED)
        return 2 * count * weight.itemsize + 4

    def _size(self, weight: Weight) -> int:
        """Bytes of one number of a gradient on its way."""
        if self.strategy.zero:
            return 2 if self.half else 4
        return 4 if self.strategy.stage == 3 else weight.itemsize

    def _computed(self, weight: Weight) -> int:
        """Bytes of a weight as it is computed with."""
        quantized = weight.bytes < weight.numel
        return weight.numel * 2 if self.strategy.rounds(self.half) and not quantized else weight.bytes

    def _live(self, weights: Sequence[Weight]) -> int:
        whole, count = sum(self._computed(each) for each in weights), sum(each.numel for each in weights)
        return round(whole * min(1.0, _LIVE / max(count, 1)))

    def _units(self, weights: Iterable[Weight]) -> int:
        """FSDP2: two blocks and all that is in no block, gathered; the gradient of a unit before it is shared out."""
        gathered: Counter[str] = Counter()
        gradients: Counter[str] = Counter()
        for weight in weights:
            gathered[weight.block] += self._computed(weight)
            gradients[weight.block] += weight.numel * (self._size(weight) + 2) if weight.trained else 0
        rest = gathered.pop("", 0)
        return rest + _BLOCKS * max(gathered.values(), default=0) + max(gradients.values(), default=0)


__all__ = ["STRATEGIES", "Held", "Name", "Setting", "Strategy"]
