"""Where a file is that a recipe names."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path


def locate(name: str, folder: Path) -> Path | None:
    """The file `name` below the working directory, the folder or its nearest parent that has it."""
    return next((path for base in _bases(folder) if _is_file(path := base / name)), None)


def like(name: str, folder: Path) -> str:
    """A remedy for a file that is not there: the nearest name among its would-be neighbours."""
    for base in _bases(folder):
        wanted = base / name
        try:
            files = sorted(wanted.parent.glob("*.yaml"))
        except (OSError, ValueError):
            continue
        close = get_close_matches(wanted.stem, [file.stem for file in files], n=1)
        if close:
            return f"Did you mean {shown_path(wanted.with_name(f'{close[0]}.yaml'))}?"
    return "Check the path."


def shown_path(path: Path) -> str:
    """The path as messages name it: relative when it is inside the working directory."""
    full = os.path.abspath(path)
    return os.path.relpath(full) if full.startswith(os.getcwd() + os.sep) else full


def _bases(folder: Path) -> list[Path]:
    return [Path(), folder, *folder.parents]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name the file system refuses names no file
        return False
