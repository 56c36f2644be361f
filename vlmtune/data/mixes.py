"""What is trained on and in which order: a pure function of the mix, the sizes and the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import numpy as np
from jaxtyping import Int64

from vlmtune.config.mix import Mix
from vlmtune.config.schema import HeldOutConfig
from vlmtune.data.caching import digest
from vlmtune.errors import DataError

_SLOTS, _ROWS = 0, 1
"""Separate random streams of one seed: places within an epoch, and rows of a source."""


def split_held_out(
    size: int, name: str, config: HeldOutConfig
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " held"]]:
    """Returns the rows to train on and the rows held out, both ascending.

    Depends on name, size and config only, so that runs with different seeds never train on each other's
    held-out rows. More than half of the rows are left to train on.
    """
    count = min(math.floor(config.fraction * size + 1e-9), config.most)  # 0.29 x 100 is 28.999... in floats
    rng = np.random.default_rng(int(digest("held out", name), 16))
    order = rng.permutation(size).astype(np.int64)
    return np.sort(order[count:]), np.sort(order[:count])


def epoch_amounts(mix: Mix, sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the samples drawn per epoch from each source: count, weight x size (at least 1), or size.

    Raises DataError for a source without rows: nothing can be drawn from it.
    """
    empty = [source.name for source, size in zip(mix.sources, sizes, strict=True) if size < 1]
    if empty:
        raise DataError("no sample to train on", ", ".join(empty), "Remove the source, or give it samples.")
    return tuple(
        source.count or max(1, round((source.weight or 1.0) * size))
        for source, size in zip(mix.sources, sizes, strict=True)
    )


@final
class MixOrder:
    """The endless order of (source, row) pairs: epochs of fixed amounts, each shuffled anew.

    A source is drawn in whole permutations of its rows that run on across epochs, so after any number of
    epochs its rows were drawn equally often, give or take one. Any epoch is computed from the seed alone:
    resuming replays nothing.
    """

    def __init__(self, sizes: Sequence[int], amounts: Sequence[int], seed: int) -> None:
        if len(sizes) != len(amounts) or any(
            amount > 0 and size < 1 for size, amount in zip(sizes, amounts, strict=True)
        ):
            raise ValueError(f"cannot draw {list(amounts)} from sources of {list(sizes)} rows")
        self._sizes, self._amounts, self._seed = tuple(sizes), tuple(amounts), seed
        self._last: tuple[int, Int64[np.ndarray, "size 2"]] | None = None

    @property
    def epoch_size(self) -> int:
        return sum(self._amounts)

    def epoch(self, number: int) -> Int64[np.ndarray, "size 2"]:
        """Returns the (source, row) pairs of an epoch (from 0) in order; read-only, the last one is kept."""
        if self._last is None or self._last[0] != number:
            self._last = (number, self._made(number))
        return self._last[1]

    def at(self, position: int) -> tuple[int, int]:
        """Returns the (source, row) at a position counted over all epochs; no earlier one is made for it."""
        number, place = divmod(position, self.epoch_size)
        source, row = self.epoch(number)[place]
        return int(source), int(row)

    def _made(self, number: int) -> Int64[np.ndarray, "size 2"]:
        pairs = np.empty((self.epoch_size, 2), np.int64)
        pairs[:, 0] = np.repeat(np.arange(len(self._amounts)), self._amounts)
        pairs[:, 1] = np.concatenate([self._rows(source, number) for source in range(len(self._amounts))])
        order = self._rng(_SLOTS, number, 0).permutation(self.epoch_size)
        pairs = pairs[order]
        pairs.setflags(write=False)
        return pairs

    def _rows(self, source: int, number: int) -> Int64[np.ndarray, " amount"]:
        """Returns the source's draws number x amount to (number + 1) x amount of its permutations."""
        size, amount = self._sizes[source], self._amounts[source]
        if not amount:
            return np.empty(0, np.int64)
        first, skip = divmod(number * amount, size)
        rounds = -(-(skip + amount) // size)
        chain = [self._rng(_ROWS, source, first + k).permutation(size) for k in range(rounds)]
        return np.concatenate(chain).astype(np.int64)[skip : skip + amount]

    def _rng(self, stream: int, *numbers: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, stream, *numbers))


__all__ = ["MixOrder", "epoch_amounts", "split_held_out"]
