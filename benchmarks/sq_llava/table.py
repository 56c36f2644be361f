"""The table and the plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arms import cell

SHOWN = {
    "accuracy": "answer accuracy",
    "accuracy_open": "open questions",
    "question_nll": "question NLL",
    "answer_nll": "answer NLL",
    "shuffle_gap": "shuffle gap",
}
ASKED = {"well_formed": "well formed", "answerable": "of these answerable"}


def numbers(seed: dict[str, Any]) -> dict[str, float | None]:
    """What of a seed is averaged; a control's questions may have no form to speak of."""
    return {name: seed[name] for name in SHOWN} | {name: seed["asked"][name] for name in ASKED}


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
