"""Time and memory of a few optimizer steps of one arm, in a process of its own: `overhead.py RECIPE [KEY=VALUE]...`.

Prints one JSON line. The first steps warm up; the memory is the largest resident size of the steps after them, since
what starting takes (imports, the index) would hide what a step takes.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from vlmtune.config.loader import load_recipe
from vlmtune.run import run

WARM = 3


class Clock:
    """Notes the end of each optimizer step; after the warm-up the peak of the resident size begins anew."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) == WARM:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.ends[-1] = time.perf_counter()

    def seconds(self) -> float:
        """Of a step, the median."""
        kept = self.ends[WARM - 1 :]
        return statistics.median(after - before for before, after in itertools.pairwise(kept))


def peak_bytes() -> int:
    """The largest resident size since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    logging.disable()
    clock = Clock()
    register_optimizer_step_post_hook(clock)
    (recipe,) = load_recipe(Path(sys.argv[1]), sys.argv[2:])
    run([recipe], fresh=True)
    print(json.dumps({"seconds_per_step": clock.seconds(), "peak_memory_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
