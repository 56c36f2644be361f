"""Cache folders that are complete or absent, whoever makes them first."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def make_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, filled by `build` unless it is there already.

    `build` writes into a folder aside, which is renamed when complete; other processes wait meanwhile.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            build(aside)
            _publish(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def digest(*parts: object) -> str:
    """Returns a short hash of the parts' texts, the same in every process."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "replace"), digest_size=10).hexdigest()


def _publish(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:  # somebody without our lock (another machine) was faster: theirs is complete too
        if not folder.is_dir():
            raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        # Some network file systems cannot lock: then both build, and the rename decides.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


__all__ = ["digest", "make_once"]
