"""Opens a benchmark's file as a module, as if its folder were on the path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def opened(folder: str, file: str) -> ModuleType:
    """`benchmarks/<folder>/<file>`; the path is as before afterwards."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{Path(file).stem}", BENCHMARKS / folder / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module
