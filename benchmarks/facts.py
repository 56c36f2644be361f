"""What every results file says of itself: the commit that was measured, the machine, the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether its files differed from it (results aside)."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "hash": git("rev-parse", "HEAD"),
        "dirty": bool(
            git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        ),
    }


def machine(threads: int, packages: Sequence[str]) -> dict[str, Any]:
    """The machine, the threads of a measured process, and the versions of those packages that are installed."""
    installed = {each.name for each in importlib.metadata.distributions()}
    return {
        "cpu": next(_cpu_names(), platform.processor()),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": threads,
        "versions": {name: importlib.metadata.version(name) for name in packages if name in installed},
    }


def _cpu_names() -> Iterator[str]:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            yield line.partition(":")[2].strip()
