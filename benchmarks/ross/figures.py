"""The table, the curves and the picture grid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from arms import cell

from vlmtune.evaluation.charts import draw_pictures, smoothed

LOSSES = ("reconstruction_loss", "swapped_loss", "condition_swap_gap")


def numbers(seed: dict[str, Any]) -> dict[str, float | None]:
    """A seed's single numbers by name."""
    accuracy = {f"accuracy {kind}": value for kind, value in seed["accuracy"].items()}
    return accuracy | {name: seed[name] for name in LOSSES if name in seed}


def line_of(seed: dict[str, Any]) -> str:
    """One line of one seed."""
    shown = ("accuracy easy", "accuracy tiny", *LOSSES)
    return "  ".join(f"{name} {value:.4f}" for name, value in numbers(seed).items() if name in shown)


def table_lines(report: dict[str, Any]) -> Iterator[str]:
    """The results as Markdown: a row a figure, a column an arm."""
    arms = report["arms"]
    yield "| | " + " | ".join(arms) + " |"
    yield "|---" * (len(arms) + 1) + "|"
    for name in dict.fromkeys(name for each in arms.values() for name in each["mean"]):
        yield f"| {name} | " + " | ".join(cell(each, name) for each in arms.values()) + " |"
    control = arms.get("control", {}).get("overhead")
    for title, name in (("time", "seconds_per_step"), ("peak memory", "peak_memory_bytes")):
        if control:
            ratios = (f"{each['overhead'][name] / control[name]:.2f}" for each in arms.values())
            yield f"| {title}, against control | " + " | ".join(ratios) + " |"


def draw_curves(report: dict[str, Any], path: Path) -> None:
    """Writes a panel a term: the training loss by step, the mean of the seeds, in each arm."""
    import matplotlib.pyplot as plt

    terms = {"next_token_curve": "next token", "reconstruction_curve": "reconstruction"}
    figure, axes = plt.subplots(1, len(terms), figsize=(9, 3.4), layout="constrained")
    for axis, (term, title) in zip(axes, terms.items(), strict=True):
        for arm, each in report["arms"].items():
            runs = [seed[term] for seed in each["seeds"] if term in seed]
            if runs:
                steps = [step for step, _ in runs[0]]
                means = [
                    fmean(values) for values in zip(*([loss for _, loss in run] for run in runs), strict=True)
                ]
                axis.plot(steps, smoothed(means), label=arm, linewidth=1.4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_grid(columns: dict[str, Any], path: Path) -> None:
    """Writes test pictures, their targets and what each arm's head paints of them."""
    if columns:
        draw_pictures(path, {title: each.permute(0, 2, 3, 1).numpy() for title, each in columns.items()})
