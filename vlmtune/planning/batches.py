"""The batches of every rank before any is loaded: what each computes, how even they are, and what each calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from vlmtune.config.schema import ChatStreamConfig
from vlmtune.data.collate import collate
from vlmtune.data.packing import Packing, plan_step
from vlmtune.errors import Fault
from vlmtune.models.vlm import VLMConfig
from vlmtune.planning.lengths import Lengths
from vlmtune.types import IGNORE, ChatBatch, Encoded

_STEPS = 24
"""Steps that are simulated."""


class Shape(NamedTuple):
    """One sample of a micro-batch."""

    tokens: int
    images: int
    supervised: int


@dataclass(frozen=True)
class Micro:
    """One micro-batch of one rank."""

    samples: tuple[Shape, ...]
    packing: Packing

    @property
    def tokens(self) -> int:
        """Useful ones; a rank without sample computes one token that counts for nothing."""
        return sum(each.tokens for each in self.samples)

    @property
    def computed(self) -> int:
        """Tokens that are computed, padding included."""
        longest = max((each.tokens for each in self.samples), default=1)
        return max(self.tokens, 1) if self.packing == "isolated" else longest * max(len(self.samples), 1)

    @property
    def images(self) -> int:
        return sum(each.images for each in self.samples)

    @property
    def supervised(self) -> int:
        return sum(each.supervised for each in self.samples)

    @property
    def squares(self) -> int:
        """Sum of the squared lengths that attention runs over."""
        if self.packing == "isolated":
            return sum(each.tokens**2 for each in self.samples) or 1
        return self.computed**2 // max(len(self.samples), 1)

    def calls(self, world: int) -> tuple[str, ...]:
        """The parts that its forward runs; among several ranks one without image runs a blank one."""
        visual = ("vision", "projector") if self.images or world > 1 else ()
        return (*visual, "language")


Step = Sequence[Sequence[Micro]]
"""[rank][micro-batch]"""


@dataclass(frozen=True)
class RankRow:
    """What one rank does in the simulated steps."""

    rank: int
    micro_batches: int
    tokens: int
    images: int
    blank: int
    """Micro-batches without image, which run a blank one when there are other ranks."""
    padding: float
    """Share of the computed tokens."""


@dataclass(frozen=True)
class Schedule:
    """The simulated steps of all ranks."""

    steps: tuple[Step, ...]
    world: int

    def ranks(self) -> list[RankRow]:
        """A row for each rank."""
        return [
            _row(rank, [micro for step in self.steps for micro in step[rank]]) for rank in range(self.world)
        ]

    @property
    def micros(self) -> Iterator[Micro]:
        """Every micro-batch of every rank."""
        return chain.from_iterable(chain.from_iterable(self.steps))

    @property
    def imbalance(self) -> float:
        """How much longer, on average over steps, the busiest rank works than the mean rank (0: even)."""
        sums = [[sum(micro.computed for micro in rank) for rank in step] for step in self.steps]
        return float(np.mean([max(step) / (sum(step) / len(step)) for step in sums])) - 1

    @property
    def per_step(self) -> float:
        """Micro-batches of a rank in one step."""
        return float(np.mean([len(step[0]) for step in self.steps]))

    def worst(self, image_weight: float) -> Micro:
        """The micro-batch that takes the most memory, an image counting as much as `image_weight` tokens."""
        return max(self.micros, key=lambda micro: micro.computed + image_weight * micro.images)

    def hangs(self) -> list[Fault]:
        """Where ranks would call different modules, and wait for each other for ever."""
        faults = []
        for number, step in enumerate(self.steps):
            calls = [[micro.calls(self.world) for micro in rank] for rank in step]
            odd = next((rank for rank, own in enumerate(calls) if own != calls[0]), None)
            if odd is not None:
                what = f"rank {odd} runs {_spelt(calls[odd])} and rank 0 {_spelt(calls[0])}"
                faults.append(Fault(what, f"step {number + 1}", "They would wait for each other for ever."))
        return faults


def simulate(lengths: Lengths, stream: ChatStreamConfig, world: int) -> Schedule:
    """The first steps of training, shared out as the loader does it."""
    size = stream.batch_size
    count = min(_STEPS, max(len(lengths.tokens) // size, 1))
    steps = []
    for start in range(0, count * size, size):
        rows = slice(start, start + size)
        steps.append(_step(lengths, rows, stream, world))
    return Schedule(tuple(steps), world)


def _step(lengths: Lengths, rows: slice, stream: ChatStreamConfig, world: int) -> Step:
    columns = (lengths.tokens, lengths.images, lengths.supervised)
    shapes = [Shape(*map(int, each)) for each in zip(*(column[rows] for column in columns), strict=True)]
    plan = plan_step([shape.tokens for shape in shapes], world, stream.micro_tokens, stream.packing)
    return [
        [Micro(tuple(shapes[place] for place in micro), stream.packing) for micro in rank] for rank in plan
    ]


def _row(rank: int, micros: Sequence[Micro]) -> RankRow:
    tokens, computed = (sum(micro.tokens for micro in micros), sum(micro.computed for micro in micros))
    blank = sum(not micro.images for micro in micros)
    images = sum(micro.images for micro in micros)
    return RankRow(rank, len(micros), tokens, images, blank, 1 - tokens / max(computed, 1))


def _spelt(calls: Sequence[Sequence[str]]) -> str:
    return f"{len(calls)} micro-batches ({'; '.join('+'.join(call) for call in calls[:4])})"


def as_batch(micro: Micro, config: VLMConfig) -> ChatBatch:
    """A ChatBatch of the micro-batch's shape, with ids that mean nothing."""
    per_image, image_id = config.image_seq_length, config.image_token_id
    side = config.vision_config.image_size

    def encoded(shape: Shape) -> Encoded:
        ids = torch.zeros(shape.tokens, dtype=torch.int64)
        ids[: shape.images * per_image] = image_id
        labels: Int64[torch.Tensor, " t"] = torch.full_like(ids, IGNORE)
        labels[shape.tokens - shape.supervised :] = 0
        pixels = torch.empty(shape.images, 3, side, side) if shape.images else None
        return Encoded("", ids, labels, pixels)

    return collate([encoded(shape) for shape in micro.samples], micro.packing)


__all__ = ["Micro", "RankRow", "Schedule", "Shape", "as_batch", "simulate"]
