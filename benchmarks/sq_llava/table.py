"""Means with standard errors, the table and the plot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

SHOWN = {
    "accuracy": "answer accuracy",
    "accuracy_open": "open questions",
    "question_nll": "question NLL",
    "answer_nll": "answer NLL",
    "shuffle_gap": "shuffle gap",
}
ASKED = {"well_formed": "well formed", "answerable": "of these answerable"}


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's figures per seed, their means and the standard errors of the means (None of a single seed)."""
    columns = {name: [each[name] for each in seeds] for name in SHOWN}
    columns |= {name: [each["asked"][name] for each in seeds] for name in ASKED}
    known = {name: values for name, values in columns.items() if None not in values}
    return {
        "seeds": seeds,
        "mean": {name: fmean(values) for name, values in known.items()},
        "standard_error": {name: standard_error(values) for name, values in known.items()},
    }


def standard_error(values: list[float]) -> float | None:
    """Of the mean, by the sample's deviation."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def figures_of(seed: dict[str, Any]) -> str:
    """One line of one seed."""
    return "  ".join(f"{name} {seed[name]:.4f}" for name in SHOWN if seed[name] is not None)


def table_lines(report: dict[str, Any]) -> Iterator[str]:
    """The table as Markdown."""
    titles = SHOWN | ASKED
    yield "| arm | " + " | ".join(titles.values()) + " |"
    yield "|---" * (len(titles) + 1) + "|"
    for arm, each in report["arms"].items():
        yield f"| {arm} | " + " | ".join(cell(each, name) for name in titles) + " |"


def cell(arm: dict[str, Any], name: str) -> str:
    """Mean and standard error; a control asks nothing that has a form."""
    if name not in arm["mean"]:
        return "-"
    error = arm["standard_error"][name]
    return f"{arm['mean'][name]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def plot(report: dict[str, Any], path: Path) -> None:
    """Writes a panel a figure: means with standard errors, and the seeds as points."""
    import matplotlib.pyplot as plt

    names = ["accuracy", "question_nll", "answer_nll", "shuffle_gap"]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.4), layout="constrained")
    arms = list(report["arms"])
    for axis, name in zip(axes, names, strict=True):
        for place, arm in enumerate(arms):
            each = report["arms"][arm]
            if name not in each["mean"]:
                continue
            axis.bar(
                place,
                each["mean"][name],
                yerr=each["standard_error"][name] or 0.0,
                color="#9db4c8",
                capsize=3,
            )
            points = [seed[name] for seed in each["seeds"]]
            axis.plot([place] * len(points), points, "o", color="#1f3b57", markersize=3)
        axis.set_title(SHOWN[name], fontsize=10)
        axis.set_xticks(range(len(arms)), arms, rotation=40, ha="right", fontsize=8)
    figure.suptitle(f"easy-VQA, {report['settings']['steps']} steps, {report['date'][:10]}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
