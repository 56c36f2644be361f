"""A folder that appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmtune.errors import CheckpointError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """The folder to write in; it becomes `out` when the block ends well, and is removed when it does not.

    An earlier export at `out` is replaced, and stays when the block fails. Raises CheckpointError when `out`
    holds something else.
    """
    _demand_replaceable(out)
    aside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        _put_in_place(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON that people can read; what JSON does not know is written as text."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _demand_replaceable(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if read_json(out / "manifest.json").get("kind") != "export":
        raise CheckpointError("holds something that is not an export", str(out), "Name another folder.")


def _put_in_place(aside: Path, out: Path) -> None:
    """One rename makes the new export visible; the old one is moved out of the way and then removed."""
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(aside, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
