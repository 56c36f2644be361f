"""The report's pictures: loss curves, and a sheet of sample predictions. matplotlib is imported late."""

from __future__ import annotations

import math
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

_INK, _GREY, _LINE = "#1f2933", "#6b7785", "#d8dee4"
_TRAIN, _RIGHT, _WRONG = "#2563a8", "#1a7f45", "#c0362c"
_HELD_OUT = ("#d9822b", "#7c4dbe", "#178f8f", "#b83280", "#7a6a00", "#50606f")


@dataclass(frozen=True, slots=True)
class Curve:
    """The losses of one stage by optimizer step."""

    stage: str
    train: Sequence[tuple[int, float]]
    held_out: Mapping[str, Sequence[tuple[int, float]]]
    terms: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """The parts that the training loss is the sum of, if there are several."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prediction with its picture, None where there is none to show."""

    picture: Image | None
    question: str
    answer: str
    reference: str
    correct: bool


def draw_losses(path: Path, curves: Sequence[Curve]) -> None:
    """Writes a PNG with one panel a stage: training loss, raw and smoothed, and held-out loss by dataset."""
    with _figure(path, 5.2 * len(curves) + 0.6, 3.7) as figure:
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for panel, curve in zip(panels, curves, strict=True):
            _draw_curve(panel, curve)
        panels[0].set_ylabel("loss (nats per learned token)", color=_GREY, fontsize=9)
        figure.tight_layout(w_pad=2.5)


def draw_examples(path: Path, examples: Sequence[Example], columns: int = 4) -> None:
    """Writes a PNG sheet: picture, question, answer in green (right) or red (wrong, with the reference)."""
    rows = math.ceil(len(examples) / columns)
    with _figure(path, 2.7 * columns, 3.45 * rows) as figure:
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for cell in cells:
            cell.axis("off")
        for cell, example in zip(cells, examples, strict=False):
            _draw_example(cell, example)
        figure.subplots_adjust(left=0.02, right=0.98, top=0.985, bottom=0.24 / rows, wspace=0.1, hspace=0.42)


def draw_pictures(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes a PNG: a column a title, of equally many pictures (n, height, width, 3) with values from -1 to 1."""
    count = len(next(iter(columns.values())))
    with _figure(path, 1.6 * len(columns), 1.6 * count + 0.3) as figure:
        cells = figure.subplots(count, len(columns), squeeze=False)
        for place, (title, pictures) in enumerate(columns.items()):
            cells[0, place].set_title(title, fontsize=9, color=_INK, parse_math=False)
            for cell, picture in zip(cells[:, place], pictures, strict=True):
                cell.imshow((picture.clip(-1, 1) + 1) / 2, interpolation="nearest")
                cell.axis("off")
        figure.subplots_adjust(
            left=0.01, right=0.99, bottom=0.01, top=1 - 0.3 / (1.6 * count + 0.3), wspace=0.03, hspace=0.03
        )


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yields a figure (inches) that is saved on leaving; no global state, so training's own plots are left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    # Answers may hold any script; a glyph that the font lacks is drawn as a box, which needs no warning.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


# ---------------------------------------------------------------- losses


def _draw_curve(panel: Axes, curve: Curve) -> None:
    shown: list[float] = []
    if curve.train:
        steps, losses = map(np.asarray, zip(*curve.train, strict=True))
        smooth = smoothed(losses)
        panel.plot(steps, losses, color=_TRAIN, alpha=0.22, linewidth=0.9)
        panel.plot(steps, smooth, color=_TRAIN, linewidth=1.9, label="training, smoothed")
        shown += smooth.tolist()
    for style, (name, points) in zip(("--", ":", "-.") * len(curve.terms), curve.terms.items(), strict=False):
        steps, losses = map(np.asarray, zip(*points, strict=True))
        smooth = smoothed(losses)
        panel.plot(steps, smooth, color=_TRAIN, linewidth=1.3, linestyle=style, label=f"of it: {name}")
        shown += smooth.tolist()
    for color, (name, points) in zip(_HELD_OUT * len(curve.held_out), curve.held_out.items(), strict=False):
        steps, losses = zip(*points, strict=True)
        panel.plot(
            steps, losses, color=color, linewidth=1.4, marker="o", markersize=3.6, label=f"held out: {name}"
        )
        shown += losses
    _style(panel)
    panel.set_title(curve.stage, loc="left", fontsize=11, color=_INK, fontweight="bold", parse_math=False)
    panel.set_xlabel("optimizer step", color=_GREY, fontsize=9)
    shown = [loss for loss in shown if loss > 0 and math.isfinite(loss)]
    if not shown:
        return
    if max(shown) > 20 * min(shown):
        panel.set_yscale("log")
        panel.set_ylim(min(shown) * 0.7, max(shown) * 1.4)
        panel.yaxis.set_major_formatter("{x:g}")
    else:
        panel.set_ylim(0, max(shown) * 1.08)
    legend = panel.legend(fontsize=8, labelcolor=_INK, facecolor="white", edgecolor="none", framealpha=0.9)
    for text in legend.get_texts():
        text.set_parse_math(False)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """The mean over about a fifteenth of the values round each (symmetric at the start), non-finite ones left out."""
    numbers = np.asarray(values, dtype=float)
    half = len(numbers) // 30
    windows = (numbers[i - min(half, i) : i + min(half, i) + 1] for i in range(len(numbers)))
    finite = (window[np.isfinite(window)] for window in windows)
    return np.array([window.mean() if len(window) else math.nan for window in finite])


def _style(panel: Axes) -> None:
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(_LINE)
    panel.tick_params(colors=_GREY, labelsize=8, length=0, which="both")
    panel.grid(axis="y", color=_LINE, linewidth=0.6)
    panel.set_axisbelow(True)


# ---------------------------------------------------------------- sample predictions


def _draw_example(cell: Axes, example: Example) -> None:
    cell.set_xlim(0, 1)
    cell.set_ylim(1, 0)
    cell.set_aspect("equal", anchor="N")
    if example.picture is None:
        cell.add_patch(_box(facecolor="#f0f2f4", edgecolor="none"))
        _write(cell, "no picture", 0.5, 0.5, _GREY, 8, ha="center", va="center")
    else:
        width, height = example.picture.size
        side = max(width, height)
        x, y = width / side / 2, height / side / 2
        enlarged = side < 200
        cell.imshow(
            np.asarray(example.picture.convert("RGB")),
            extent=(0.5 - x, 0.5 + x, 0.5 + y, 0.5 - y),
            interpolation="nearest" if enlarged else "antialiased",
        )
        cell.set_xlim(0, 1)
        cell.set_ylim(1, 0)
    cell.add_patch(_box(facecolor="none", edgecolor=_LINE, linewidth=0.8))
    question = _lines(example.question, 36, 2)
    room = 4 - len(question) - (not example.correct)  # four lines go between two rows of pictures
    answer = _lines(example.answer or "(nothing)", 30, min(room, 2))
    answer[0] = f"{'✓' if example.correct else '✗'} {answer[0]}"
    color = _RIGHT if example.correct else _WRONG
    place = _write_lines(cell, question, 1.02, _GREY, 8)
    place = _write_lines(cell, answer, place + 0.02, color, 9.5, fontweight="bold")
    if not example.correct:
        _write_lines(cell, _lines(f"expected: {example.reference}", 36, 1), place, _INK, 8)


def _box(**style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((0, 0), 1, 1, clip_on=False, **style)


def _write_lines(
    cell: Axes, lines: Sequence[str], top: float, color: str, size: float, **style: Any
) -> float:
    """Writes lines under each other below `top`; returns where the last one ends."""
    height = size * 0.0105
    for number, line in enumerate(lines, start=1):
        _write(cell, line, 0, top + height * number * 0.98, color, size, **style)
    return top + height * len(lines)


def _write(cell: Axes, text: str, x: float, y: float, color: str, size: float, **style: Any) -> None:
    cell.text(x, y, text, color=color, fontsize=size, parse_math=False, **style)


def _lines(text: str, width: int, most: int) -> list[str]:
    """At most so many lines of printable text."""
    clean = "".join(" " if unicodedata.category(letter)[0] == "C" else letter for letter in text)
    return textwrap.wrap(clean, width, max_lines=most, placeholder=" …") or [""]
