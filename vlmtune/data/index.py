"""Token length and image count of every sample of a source: from headers and text, no pixel decoded.

Kept on disk as raw int32 arrays that only grow while they are made: a killed process goes on where it stopped
and memory stays flat. Other processes wait for the file, not in a collective operation, which would time out.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from vlmtune.data.caching import digest
from vlmtune.data.images import image_size
from vlmtune.data.render import Renderer
from vlmtune.data.sources import Source
from vlmtune.errors import DataError

VERSION = 1
"""Part of the key: raise it when a length could come out differently."""
_BLOCK = 1024
"""Samples measured between two writes."""
_PER_PROCESS = 20_000
"""Samples for which another process is worth its start."""
_POLL = 0.2
"""Seconds between two looks at what another process has done."""
_PATIENCE = 600.0
"""Seconds without progress of the process that builds, after which a waiting one gives up."""

Progress = Callable[[int, int], None]
"""Called with samples done and samples in all."""


@dataclass(frozen=True)
class Index:
    """Of each sample: its length in tokens, images included (0: it cannot be used), and its images."""

    folder: Path
    lengths: Int32[np.ndarray, " n"]
    images: Int32[np.ndarray, " n"]

    @property
    def faults(self) -> Path:
        """JSON lines {"row", "key", "reason"} of the samples that cannot be used."""
        return self.folder / "faults.jsonl"

    def reasons(self) -> dict[int, str]:
        """Why each unusable sample is so, by row."""
        lines = map(json.loads, self.faults.read_text("utf-8").splitlines())
        return {line["row"]: line["reason"] for line in lines}


def build_index(
    source: Source, renderer: Renderer, cache: Path, on_progress: Progress | None = None
) -> Index:
    """The source's index, from the cache or made now; the key holds all that a length depends on.

    The renderer's image token count goes in by its repr, which for a dataclass is the same in every process.
    Raises DataError when another process was making it and has stopped to get on.
    """
    folder = cache / "index" / f"{source.name}-{_key(source, renderer)}"
    partial = _Partial(folder.with_name(f".{folder.name}"), len(source))
    seen, since = -1, time.monotonic()
    while not folder.is_dir():
        with _lock(partial) as ours:
            if ours and not folder.is_dir():
                _measure_rest(source, renderer, partial, on_progress)
                partial.folder.rename(folder)
        if not ours:
            done = partial.done()
            if done > seen:
                seen, since = done, time.monotonic()
            elif time.monotonic() - since > _PATIENCE:
                raise _stuck(partial, source.name, done)
            time.sleep(_POLL)
    return Index(folder, _mapped(folder / "lengths"), _mapped(folder / "images"))


def fault_reason(error: DataError, key: str) -> str:
    """What an error says of the sample `key`; places other than the key (an image's name) are kept."""
    faults = error.faults
    return "; ".join(
        fault.what if fault.where in ("", key) else f"{fault.where}: {fault.what}" for fault in faults
    )


def _key(source: Source, renderer: Renderer) -> str:
    tokenizer = renderer.tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    del content["truncation"], content["padding"]  # state of the last call
    counter = renderer.image_tokens
    return digest(
        VERSION,
        source.fingerprint,
        renderer.template_text,
        json.dumps(content, sort_keys=True),
        sorted(tokenizer.special_tokens_map.items()),
        f"{type(counter).__module__} {counter!r}",
    )


# ---------------------------------------------------------------- measuring

_Row = tuple[int, int, str]
"""Length, images, reason ("" for a good sample)."""


def _measure(source: Source, renderer: Renderer, start: int, stop: int) -> list[_Row]:
    return [_measured(source, renderer, row) for row in range(start, stop)]


def _measured(source: Source, renderer: Renderer, row: int) -> _Row:
    try:
        sample = source[row]
        sizes = [image_size(ref) for ref in sample.images]
        return renderer.length(sample, sizes), len(sizes), ""
    except DataError as error:
        return 0, 0, fault_reason(error, f"{source.name}#{row}")


def _blocks(source: Source, renderer: Renderer, start: int) -> Iterator[list[_Row]]:
    """The rows from `start` on, measured in blocks; by several processes when there are many."""
    starts = range(start, len(source), _BLOCK)
    bounds = [(first, min(first + _BLOCK, len(source))) for first in starts]
    processes = min(len(os.sched_getaffinity(0)), (len(source) - start) // _PER_PROCESS)
    if processes < 2:
        yield from (_measure(source, renderer, *bound) for bound in bounds)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _set_worker, (source, renderer)) as pool:
        yield from pool.map(_measure_in_worker, bounds)


def _set_worker(source: Source, renderer: Renderer) -> None:
    _worker.append((source, renderer))
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when its parent was killed: the pool's processes would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(_POLL)
    os._exit(1)


def _measure_in_worker(bounds: tuple[int, int]) -> list[_Row]:
    return _measure(*_worker[0], *bounds)


_worker: list[tuple[Source, Renderer]] = []
"""What a pool process measures with, sent once instead of with every block."""


# ---------------------------------------------------------------- the files


@dataclass(frozen=True)
class _Partial:
    """An index that is being made: files that grow by whole blocks."""

    folder: Path
    total: int

    def done(self) -> int:
        """Samples whose length and image count are both on disk."""
        return min(_size(self.folder / "lengths"), _size(self.folder / "images")) // 4

    def cut(self) -> int:
        """The samples done, after what a killed process wrote beyond them is cut off."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.done()
        for name in ("lengths", "images"):
            with (self.folder / name).open("ab") as file:
                file.truncate(done * 4)
        faults = self.folder / "faults.jsonl"
        faults.touch()
        kept = [line for line in faults.read_text("utf-8").splitlines(keepends=True) if _belongs(line, done)]
        faults.write_text("".join(kept), "utf-8")
        return done

    def append(self, rows: list[_Row], start: int, name: str) -> None:
        """Writes a block; the lengths, by which a block counts as done, come last."""
        faults = [
            json.dumps({"row": row, "key": f"{name}#{row}", "reason": reason}) + "\n"
            for row, (_, _, reason) in enumerate(rows, start)
            if reason
        ]
        columns = np.array([row[:2] for row in rows], np.int32)
        for file, content in (
            ("faults.jsonl", "".join(faults).encode()),
            ("images", columns[:, 1].tobytes()),
            ("lengths", columns[:, 0].tobytes()),
        ):
            with (self.folder / file).open("ab") as stream:
                stream.write(content)


def _measure_rest(
    source: Source, renderer: Renderer, partial: _Partial, on_progress: Progress | None
) -> None:
    done = partial.cut()
    for block in _blocks(source, renderer, done):
        partial.append(block, done, source.name)
        done += len(block)
        if on_progress is not None:
            on_progress(done, len(source))


def _belongs(line: str, done: int) -> bool:
    return line.endswith("\n") and json.loads(line)["row"] < done


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _mapped(path: Path) -> Int32[np.ndarray, " n"]:
    if not _size(path):
        return np.empty(0, np.int32)  # an empty file cannot be mapped
    return np.memmap(path, np.int32, mode="r")


# ---------------------------------------------------------------- other processes


@contextmanager
def _lock(partial: _Partial) -> Iterator[bool]:
    """True for the one process that may build. Its forks do not share the lock; a kill frees it."""
    path = partial.folder.with_name(f"{partial.folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either for "held by another"
            yield False
        else:
            yield True


def _stuck(partial: _Partial, name: str, done: int) -> DataError:
    return DataError(
        f"waited {_PATIENCE:.0f} s for the token index of source {name}, which another process is making: "
        f"it stays at {done:,} of {partial.total:,} samples",
        str(partial.folder),
        "See what that process is doing; start again when it has ended, and indexing goes on from there.",
    )


__all__ = ["Index", "build_index", "fault_reason"]
