"""Runs one arm once, in a process of its own, and writes what the meter read."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
from pathlib import Path

from meter import Meter
from workload import load_workload

ARMS = ("vlmtune", "trainer", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("workload", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    workload = load_workload(options.workload)
    arm = importlib.import_module(f"arm_{options.arm}")
    meter = Meter()
    arm.train(workload, meter, options.checkpointing)
    timed = workload.timed
    result = meter.result(len(timed), sum(workload.lengths[index] for index in timed))
    options.out.write_text(json.dumps(result | {"threads": int(os.environ.get("OMP_NUM_THREADS", "0"))}))


if __name__ == "__main__":
    main()
