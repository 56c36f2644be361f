"""Arms times seeds of a small reproduction: runs that are kept as they finish, means with standard errors."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from facts import ROOT

log = logging.getLogger("benchmark")

Seed = dict[str, Any]
"""What was measured of one arm and seed."""


def arguments(doc: str | None, name: str, arms: Iterable[str], steps: int) -> argparse.ArgumentParser:
    """The options that every reproduction has; `name` is that of its folder under runs/ and of its results file."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps, help="of 32 samples, in every arm")
    parser.add_argument("--quick", action="store_true", help="few steps, one seed, few questions")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / f"{name}_benchmark")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    return parser


def quicken(options: argparse.Namespace, **few: Any) -> None:
    """Turns the options into those of a check, in folders of their own."""
    vars(options).update(few, seeds=1, steps=2)
    options.work = options.work.with_name(f"{options.work.name}_quick")
    options.out = options.work / options.out.name


def every_seed(
    options: argparse.Namespace, measured: Callable[[str, int], Seed], line: Callable[[Seed], str]
) -> dict[str, list[Seed]]:
    """The figures of every arm, seed by seed, so that a run stopped early holds whole comparisons."""
    began = time.monotonic()
    found: dict[str, list[Seed]] = {arm: [] for arm in options.arms}
    for seed in range(options.seeds):
        for arm in options.arms:
            found[arm].append(measured(arm, seed))
            log.info("%6.0f s  seed %d  %-14s %s", time.monotonic() - began, seed, arm, line(found[arm][-1]))
    return found


def kept(file: Path, key: str, make: Callable[[], Seed]) -> Seed:
    """The figures in `file` if it was written for the same key, else new ones, which are written there."""
    if file.is_file() and (known := json.loads(file.read_text()))["key"] == key:
        return known["figures"]
    found = make()
    file.write_text(json.dumps({"key": key, "figures": found}, indent=1))
    return found


def summary(seeds: list[Seed], numbers: Callable[[Seed], dict[str, float | None]]) -> dict[str, Any]:
    """An arm's figures per seed, their means and the standard errors of the means (None of a single seed)."""
    rows = [numbers(each) for each in seeds]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    known = {name: values for name, values in columns.items() if None not in values}
    return {
        "seeds": seeds,
        "mean": {name: fmean(values) for name, values in known.items()},  # type: ignore[arg-type]
        "standard_error": {name: standard_error(values) for name, values in known.items()},  # type: ignore[arg-type]
    }


def standard_error(values: list[float]) -> float | None:
    """Of the mean, by the sample's deviation."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def cell(arm: dict[str, Any], name: str) -> str:
    """Mean and standard error for a table; what an arm does not have is a dash."""
    if name not in arm["mean"]:
        return "-"
    error = arm["standard_error"][name]
    return f"{arm['mean'][name]:.3f}" + ("" if error is None else f" ± {error:.3f}")
