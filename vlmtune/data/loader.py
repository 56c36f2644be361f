"""The stream of conversations: which samples a step has, and how they share micro-batches and ranks.

A step's batches are a pure function of (seed, step, rank, world). Workers, world size and packing change who
computes a sample and beside which others, never which samples a step has or what is drawn for them.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_bool
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice, zip_longest
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from pathlib import Path
from types import FrameType
from typing import NamedTuple, final, overload

import numpy as np
import torch
from jaxtyping import Int64
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaProcessor

from vlmtune.config.mix import Mix
from vlmtune.config.schema import ChatStreamConfig, HeldOutConfig
from vlmtune.data.collate import collate
from vlmtune.data.encode import Encoder, Request
from vlmtune.data.index import Index
from vlmtune.data.mixes import MixOrder, epoch_amounts
from vlmtune.data.packing import plan_step
from vlmtune.data.parts import Part, make_part
from vlmtune.data.render import Renderer
from vlmtune.data.sources import open_source
from vlmtune.errors import DataError
from vlmtune.types import ChatBatch, ChatSample, Encoded

_OPEN_FILES = 65_536
"""A tensor from a worker holds a file open; a step of many micro-batches passes the usual limit of 1,024."""


class _Draw(NamedTuple):
    """One sample of a step; `seed` None takes it as it is stored (held out)."""

    source: int
    row: int
    seed: tuple[int, ...] | None


@final
class TrainOrder:
    """The mix's order as (source, row of that source), without held-out and left-out rows."""

    def __init__(self, order: MixOrder, rows: Sequence[Int64[np.ndarray, " _"]]) -> None:
        self._order, self._rows = order, rows
        self._last: tuple[int, Int64[np.ndarray, "size 2"]] | None = None

    @property
    def epoch_size(self) -> int:
        """Positions in an epoch."""
        return self._order.epoch_size

    def epoch(self, number: int) -> Int64[np.ndarray, "size 2"]:
        """The (source, row) pairs of an epoch (from 0) in order; the last one asked for is kept."""
        if self._last is None or self._last[0] != number:
            pairs = self._order.epoch(number).copy()
            for source, rows in enumerate(self._rows):
                own = pairs[:, 0] == source
                pairs[own, 1] = rows[pairs[own, 1]]
            self._last = (number, pairs)
        return self._last[1]


@final
class ChatData:
    """A mix ready to be trained on: opened, indexed, split, ordered; picklable.

    Raises DataError for a source that cannot be opened or has nothing to train on and, with overlong "error",
    for samples over max_length. A sample that cannot be loaded becomes a zero-weight slot with its reason.
    """

    def __init__(
        self,
        config: ChatStreamConfig,
        mix: Mix,
        base: Path,
        processor: LlavaProcessor,
        image_tokens: Callable[[int, int], int],
        held_out: HeldOutConfig,
        seed: int,
        cache: Path,
    ) -> None:
        renderer = Renderer(processor.tokenizer, image_tokens, processor.chat_template)
        self.config, self._seed, self._encoder = config, seed, Encoder(config, renderer, processor)
        sources = [open_source(source, base, cache) for source in mix.sources]
        self._parts = tuple(make_part(source, renderer, config, held_out, cache) for source in sources)
        rows = [part.train for part in self._parts]
        sizes = [len(each) for each in rows]
        self.order = TrainOrder(MixOrder(sizes, epoch_amounts(mix, sizes), seed), rows)

    # ------------------------------------------------------------ what there is

    @property
    def samples(self) -> int:
        """Samples in the mix's sources, each counted once."""
        return sum(len(part.source) for part in self._parts)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every position of the order comes once; the last one may be smaller."""
        return -(-self.order.epoch_size // self.config.batch_size)

    @property
    def indices(self) -> tuple[Index, ...]:
        """The token index of each source."""
        return tuple(part.index for part in self._parts)

    def summary(self) -> str:
        """A line per source: samples, use, and what was found wrong or too long while indexing."""
        return "\n".join(part.summary(self.config.max_length) for part in self._parts)

    def known_bad(self) -> Iterator[tuple[str, str]]:
        """Key and reason of each sample that indexing found unusable: may be enough to stop at once."""
        for part in self._parts:
            yield from ((f"{part.source.name}#{row}", reason) for row, reason in part.reasons.items())

    def find(self, key: str) -> tuple[int, int]:
        """Source number and row of a sample key; DataError if there is none."""
        name, _, row = key.rpartition("#")
        for number, part in enumerate(self._parts):
            if part.source.name == name and row.isdecimal() and int(row) < len(part.source):
                return number, int(row)
        last = ", ".join(f"{part.source.name}#{len(part.source) - 1}" for part in self._parts)
        raise DataError("the mix has no such sample", key, f"The last of each source: {last}.")

    # ------------------------------------------------------------ steps

    def step(self, step: int, rank: int, world: int) -> list[ChatBatch]:
        """The micro-batches of one rank in optimizer step `step`, counted from 0 over all epochs."""
        return [self._batch(micro) for micro in self._plan(step, rank, world)]

    def heaviest(self, rank: int, world: int) -> list[ChatBatch]:
        """Two micro-batches of one rank as heavy as the first epoch's get: that of most tokens, that of most images.

        Looked for in the step with the most tokens, that with the most images, and that of the sample with the most.
        """
        pairs = self.order.epoch(0)
        columns = [part.planned for part in self._parts], [part.index.images for part in self._parts]
        tokens, images = (_column(pairs, each) for each in columns)
        starts = np.arange(0, len(pairs), self.config.batch_size)
        steps = {
            int(np.add.reduceat(tokens, starts).argmax()),
            int(np.add.reduceat(images, starts).argmax()),
            int(images.argmax()) // self.config.batch_size,
        }
        micros = [micro for step in sorted(steps) for micro in self._plan(step, rank, world)]

        def heaviest(column: list[Int32[np.ndarray, " n"]]) -> list[_Draw]:
            return max(micros, key=lambda micro: sum(int(column[draw.source][draw.row]) for draw in micro))

        return [self._batch(heaviest(each)) for each in columns]

    def stream(self, rank: int, world: int) -> ChatStream:
        """The steps and held-out batches of one rank."""
        return ChatStream(self, rank, world)

    def held_out(self, rank: int = 0, world: int = 1) -> dict[str, Sequence[ChatBatch]]:
        """This rank's held-out batches by source, loaded when indexed; no transform, no augmentation."""
        batches: dict[str, Sequence[ChatBatch]] = {}
        for number, part in enumerate(self._parts):
            if len(part.held):
                draws = [_Draw(number, row, None) for row in part.held.tolist()]
                lengths = part.planned[part.held].tolist()
                batches[part.source.name] = _Batches(self, self._share(draws, lengths, rank, world))
        return batches

    def held_out_samples(self, count: int) -> list[ChatSample]:
        """The first `count` usable held-out samples, the sources taking turns."""
        turns = zip_longest(*(self._held_out_of(part) for part in self._parts))
        return list(islice(filter(None, chain.from_iterable(turns)), count))

    def encode(self, source: int, row: int, rng: np.random.Generator | None) -> Encoded:
        """One sample with its pixels, drawn with `rng` as in training, or as it is stored with None."""
        return self._encoder.encode([self._request(source, row, rng)])[0]

    def _draws(self, step: int) -> list[_Draw]:
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.config.batch_size
        pairs = self.order.epoch(epoch)[start : start + self.config.batch_size].tolist()
        # The position too: a source of weight 2 shows a row twice an epoch, each time drawn anew.
        return [
            _Draw(source, row, (self._seed, epoch, source, row, position))
            for position, (source, row) in enumerate(pairs, start)
        ]

    def _plan(self, step: int, rank: int, world: int) -> list[list[_Draw]]:
        """The draws of each micro-batch of one rank."""
        draws = self._draws(step)
        return self._share(draws, [self._planned_length(draw) for draw in draws], rank, world)

    def _planned_length(self, draw: _Draw) -> int:
        """The length from the index; with transforms, which may change it, that of the transformed sample."""
        planned = int(self._parts[draw.source].planned[draw.row])
        return self._encoder.length(self._drawn(draw)) if planned and self.config.transforms else planned

    def _share(self, draws: list[_Draw], lengths: list[int], rank: int, world: int) -> list[list[_Draw]]:
        plan = plan_step(lengths, world, self.config.micro_tokens, self.config.packing)[rank]
        return [[draws[place] for place in micro] for micro in plan]

    def _batch(self, draws: list[_Draw]) -> ChatBatch:
        samples = self._encoder.encode([self._drawn(draw) for draw in draws])
        return collate(samples, self.config.packing, self._encoder.pad)

    def _drawn(self, draw: _Draw) -> Request:
        rng = None if draw.seed is None else np.random.default_rng(draw.seed)
        return self._request(draw.source, draw.row, rng)

    def _request(self, source: int, row: int, rng: np.random.Generator | None) -> Request:
        part = self._parts[source]
        return Request(part.source, row, rng, part.bad(row))

    def _held_out_of(self, part: Part) -> Iterator[ChatSample]:
        usable = part.held[part.planned[part.held] > 0]
        return (part.source[row] for row in usable.tolist())


def _column(
    pairs: Int64[np.ndarray, "size 2"], columns: Sequence[Int32[np.ndarray, " n"]]
) -> Int64[np.ndarray, " size"]:
    """What the columns, one a source, say of each (source, row)."""
    found = np.zeros(len(pairs), np.int64)
    for source, column in enumerate(columns):
        own = pairs[:, 0] == source
        found[own] = column[pairs[own, 1]]
    return found


@final
class _Batches(Sequence[ChatBatch]):
    """Batches that are loaded when asked for: a held-out set with its pixels is too large to keep."""

    def __init__(self, data: ChatData, plan: list[list[_Draw]]) -> None:
        self._data, self._plan = data, plan

    def __len__(self) -> int:
        return len(self._plan)

    @overload
    def __getitem__(self, index: int) -> ChatBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[ChatBatch]: ...
    def __getitem__(self, index: int | slice) -> ChatBatch | list[ChatBatch]:
        if isinstance(index, slice):
            return [self._data._batch(draws) for draws in self._plan[index]]
        return self._data._batch(self._plan[index])


# ---------------------------------------------------------------- workers


@final
@dataclass(frozen=True)
class ChatStream:
    """One rank's view of ChatData, as the engine reads it."""

    data: ChatData
    rank: int
    world: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.data.steps_per_epoch

    def steps(self, start: int, stop: int) -> Iterator[list[ChatBatch]]:
        """The micro-batches of optimizer steps start, ..., stop - 1, loaded ahead by the config's workers."""
        return step_loader(self.data, self.rank, self.world, start, stop, self.data.config.workers)

    def heaviest(self) -> list[ChatBatch]:
        """Micro-batches as heavy as they get; the same number on every rank."""
        return self.data.heaviest(self.rank, self.world)

    def held_out(self) -> dict[str, Sequence[ChatBatch]]:
        """This rank's held-out batches by source; the same number on every rank."""
        return self._held_out

    @cached_property
    def _held_out(self) -> dict[str, Sequence[ChatBatch]]:
        return self.data.held_out(self.rank, self.world)


def step_loader(
    data: ChatData, rank: int, world: int, start: int, stop: int, workers: int
) -> Iterator[list[ChatBatch]]:
    """The micro-batches of steps start, ..., stop - 1 in order; each worker process loads two steps ahead.

    Starts at any step without replaying earlier ones, and leaves the global random state alone.
    """
    if not workers:
        yield from (data.step(step, rank, world) for step in range(start, stop))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    _allow_open_files()
    ending = RawValue(c_bool, False)
    at_exit = Finalize(None, setattr, (ending, "value", True), exitpriority=0)
    loader = DataLoader(
        _Steps(data, rank, world),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=2,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_outlive_signals, ending),
        multiprocessing_context="fork",
        generator=torch.Generator(),
    )
    steps = iter(loader)
    try:
        yield from steps
    finally:
        ending.value = True
        at_exit.cancel()
        # There is no public name for this. Left to the garbage collector after an error, the queue may go first
        # and the workers never hear of the end.
        steps._shutdown_workers()


@final
@dataclass(frozen=True)
class _Steps(Dataset[list[ChatBatch]]):
    data: ChatData
    rank: int
    world: int

    def __getitem__(self, step: int) -> list[ChatBatch]:
        return self.data.step(step, self.rank, self.world)


def _as_it_is(batches: list[ChatBatch]) -> list[ChatBatch]:
    return batches


def _outlive_signals(ending: c_bool, worker: int) -> None:
    """A signal to the whole process group must let the trainer save: workers end with the trainer only.

    `ending` is in shared memory and set before the trainer ends them. Ignoring SIGTERM outright would hang its
    exit in the middle of a step: Python then terminates the workers in this way, and waits for them.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if ending.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


__all__ = ["ChatData", "ChatStream", "TrainOrder", "step_loader"]
