"""A mix's sources made ready: indexed, split into train and held out, with each sample's planned length."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

import numpy as np
from jaxtyping import Int32, Int64

from vlmtune.config.schema import ChatStreamConfig, HeldOutConfig
from vlmtune.data.caching import make_once
from vlmtune.data.images import image_size
from vlmtune.data.index import Index, Progress, build_index
from vlmtune.data.mixes import split_held_out
from vlmtune.data.render import Renderer
from vlmtune.data.sources import Source
from vlmtune.errors import DataError, Fault

logger = logging.getLogger(__name__)

LEFT_OUT = -1
"""Planned length of a sample that is neither trained on nor measured: too long."""


@final
@dataclass(frozen=True)
class Part:
    """A source with its index, the length each sample is planned with, and the rows of either use."""

    source: Source
    index: Index
    planned: Int32[np.ndarray, " n"]
    """Tokens after shortening; 0 for a bad sample (its slot stays), LEFT_OUT for one that is not used."""
    train: Int64[np.ndarray, " train"]
    held: Int64[np.ndarray, " held"]

    @cached_property
    def reasons(self) -> dict[int, str]:
        """Why each bad sample is so, by row."""
        return self.index.reasons()

    def bad(self, row: int) -> str:
        """Why the row cannot be used; empty if it can."""
        if self.planned[row]:
            return ""
        return self.reasons.get(row, "it changed while it was being indexed")

    def summary(self, max_length: int) -> str:
        """One line: samples, use, and what was found wrong or too long."""
        lengths = self.index.lengths
        good = lengths[lengths > 0]
        left_out = int((self.planned == LEFT_OUT).sum())
        notes = {
            "bad": len(lengths) - len(good),
            f"over {max_length:,} tokens left out": left_out,
            f"over {max_length:,} tokens shortened": int((lengths > max_length).sum()) - left_out,
        }
        found = "".join(f"; {count:,} {note}" for note, count in notes.items() if count)
        mean = good.mean() if len(good) else 0.0
        return (
            f"{self.source.name}: {len(lengths):,} samples, {mean:,.0f} tokens on average; "
            f"{len(self.train):,} to train on, {len(self.held):,} held out{found}"
        )


def make_part(
    source: Source, renderer: Renderer, config: ChatStreamConfig, held_out: HeldOutConfig, cache: Path
) -> Part:
    """The source ready for a stream; DataError under overlong "error" if a sample is too long."""
    index = build_index(source, renderer, cache, _logged(source.name))
    planned = _planned(source, index, renderer, config)
    train, held = split_held_out(len(source), source.name, held_out)
    used = planned != LEFT_OUT
    return Part(source, index, planned, train[used[train]], held[used[held]])


def _planned(
    source: Source, index: Index, renderer: Renderer, config: ChatStreamConfig
) -> Int32[np.ndarray, " n"]:
    """Each sample's length under the policy for those over max_length."""
    over = np.flatnonzero(index.lengths > config.max_length)
    if not len(over):
        return index.lengths
    if config.overlong == "error":
        raise _too_long(source, index, over, config.max_length)
    planned = np.array(index.lengths)
    planned[over] = (
        LEFT_OUT
        if config.overlong == "drop"
        else _short_lengths(source, index, renderer, config.max_length, over)
    )
    return planned


def _short_lengths(
    source: Source, index: Index, renderer: Renderer, max_length: int, rows: Int64[np.ndarray, " over"]
) -> Int32[np.ndarray, " over"]:
    """Lengths after shortening; cached, since it renders each of these conversations several times."""

    def build(folder: Path) -> None:
        lengths = [_short_length(source, row, renderer, max_length) for row in rows.tolist()]
        np.array(lengths, np.int32).tofile(folder / "lengths")

    folder = index.folder.with_name(f"{index.folder.name}-within-{max_length}")
    return np.fromfile(make_once(folder, build) / "lengths", np.int32)


def _short_length(source: Source, row: int, renderer: Renderer, max_length: int) -> int:
    try:
        sample = source[row]
        sizes = [image_size(ref) for ref in sample.images]
        short = renderer.shorten(sample, sizes, max_length)
        return LEFT_OUT if short is None else renderer.length(short, sizes[: len(short.images)])
    except DataError:
        return 0


def _too_long(source: Source, index: Index, rows: Int64[np.ndarray, " over"], max_length: int) -> DataError:
    faults = [
        Fault(f"{index.lengths[row]:,} tokens, more than max_length {max_length:,}", f"{source.name}#{row}")
        for row in rows[:20].tolist()
    ]
    remedy = "Raise max_length, or set overlong to shorten or drop."
    return DataError([*faults, Fault(f"{len(rows):,} samples are too long", f"source {source.name}", remedy)])


def _logged(name: str) -> Progress:
    """Progress in the log, a line at most every ten seconds."""
    last = time.monotonic()

    def log(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            logger.info("indexing %s: %s of %s samples", name, f"{done:,}", f"{total:,}")

    return log


__all__ = ["LEFT_OUT", "Part", "make_part"]
