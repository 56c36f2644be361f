"""report.md of a run: scores, loss curves, sample predictions, where the time went. Works with whatever is there."""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vlmtune.config.loader import load_mix
from vlmtune.data.images import open_image
from vlmtune.data.sources import Source, open_source
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.charts import Curve, Example, draw_examples, draw_losses

RECONSTRUCTION = Path("report") / "reconstruction.png"
"""Inside a run folder."""
_EXAMPLES = 12
_MARKDOWN = re.compile(r"([\\`*_\[\]|~#$!])")


def write_report(run_dir: Path, cache: Path = Path(".cache/vlmtune")) -> Path:
    """The path of report.md, written with its pictures in report/ from the files of a run folder.

    Reads metrics.json, predictions.jsonl, phases.json and the stages' metrics.jsonl; what is missing is left out.
    Texts of answers and questions are escaped: they show as they are and can be neither HTML nor Markdown.
    """
    metrics = _read_json(run_dir / "metrics.json", {})
    phases = _read_json(run_dir / "phases.json", [])
    stages = _stages(run_dir, phases)
    predictions = _read_lines(run_dir / "predictions.jsonl")
    sections = [
        [f"# {_escape(run_dir.resolve().name)}"],
        _scores(metrics),
        _training(run_dir, stages),
        _examples(run_dir, predictions, str(metrics.get("mix", "")), cache),
        _reconstruction(run_dir),
        _time(phases),
    ]
    text = "\n\n".join("\n".join(section) for section in sections if section) + "\n"
    path = run_dir / "report.md"
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return path


# ---------------------------------------------------------------- scores


def _scores(metrics: Mapping[str, Any]) -> list[str]:
    if not metrics:
        return []
    groups = {"all": _overall(metrics)}
    if metrics.get("accuracy_open") is not None and metrics.get("yes_no"):
        closed = metrics["yes_no"]["questions"]
        groups["open (not yes/no)"] = {
            "questions": metrics["questions"] - closed,
            "accuracy": metrics["accuracy_open"],
            "vqa_accuracy": None,
        }
    for title in ("kind", "dataset"):
        found = metrics.get(f"by_{title}", {})
        if len(found) > 1:
            groups |= {f"{title}: {name}": group for name, group in found.items()}
    soft = any(group["vqa_accuracy"] is not None for group in groups.values())
    rows = [
        [name, f"{group['questions']:,}", _share(group["accuracy"])]
        + ([_share(group["vqa_accuracy"])] if soft else [])
        for name, group in groups.items()
    ]
    head = ["questions", "number", "accuracy"] + (["VQA accuracy"] if soft else [])
    lines = ["## Scores", "", *_table(head, rows)]
    if block := metrics.get("yes_no"):
        head = ["yes/no", "accuracy", "precision", "recall", "F1", "yes-ratio", "neither"]
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        row = [f"{block['questions']:,}", *(_share(block[name]) for name in names), str(block["unparsed"])]
        lines += ["", *_table(head, [row])]
    if metrics.get("errors"):
        lines += ["", f"{metrics['errors']:,} samples could not be asked and count as wrong."]
    return lines


def _overall(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metrics.get(name) for name in ("questions", "accuracy", "vqa_accuracy")}


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


# ---------------------------------------------------------------- training


def _stages(run_dir: Path, phases: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each stage's metrics.jsonl, the stages in the order they ran."""
    files = {path.parent.name: path for path in run_dir.glob("*/metrics.jsonl")}
    if (run_dir / "metrics.jsonl").exists():
        files = {"training": run_dir / "metrics.jsonl", **files}
    order = [str(row.get("phase", "")).removeprefix("train ") for row in phases]
    ranked = sorted(files, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: rows for name in ranked if (rows := _read_lines(files[name]))}


def _training(run_dir: Path, stages: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    curves = [_curve(name, rows) for name, rows in stages.items()]
    curves = [curve for curve in curves if curve.train or curve.held_out]
    if not curves:
        return []
    draw_losses(run_dir / "report" / "loss.png", curves)
    head = [
        "stage",
        "steps",
        "epochs",
        "loss",
        "held out",
        "samples/s",
        "useful tokens/s",
        "padding",
        "memory",
    ]
    rows = [_stage_row(curve, stages[curve.stage]) for curve in curves]
    return ["## Training", "", "![Loss by optimizer step](report/loss.png)", "", *_table(head, rows)]


def _curve(name: str, rows: Iterable[Mapping[str, Any]]) -> Curve:
    rows = list(rows)
    train: list[tuple[int, float]] = []
    held_out: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if isinstance(row.get("loss"), (int, float)):
            train.append((row["step"], row["loss"]))
        for dataset, loss in row.get("held_out", {}).items():
            held_out.setdefault(dataset, []).append((row["step"], loss))
    return Curve(name, train, held_out, _terms(rows))


def _terms(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The points of each term of the loss; metrics.jsonl has them between `loss` and `lr` when there are several."""
    terms: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        names = [*row]
        if "loss" in row and "lr" in row:
            for name in names[names.index("loss") + 1 : names.index("lr")]:
                terms.setdefault(name, []).append((row["step"], row[name]))
    return terms


def _stage_row(curve: Curve, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    logged = [row for row in rows if "loss" in row]
    held_out = ", ".join(f"{name} {points[-1][1]:.3f}" for name, points in curve.held_out.items())

    def over(key: str, pick: Any, form: str) -> str:
        values = [row[key] for row in logged if isinstance(row.get(key), (int, float))]
        return format(pick(values), form) if values else ""

    tail = [loss for _, loss in curve.train[-10:]]
    return [
        curve.stage,
        over("step", max, ",d"),
        over("epoch", max, ".2f"),
        f"{fmean(tail):.3f}" if tail else "",
        held_out,
        over("samples_per_s", median, ",.1f"),
        over("tokens_per_s", median, ",.0f"),
        over("padding", fmean, ".1%"),
        over("memory_gb", max, ".2f") + " GB" if over("memory_gb", max, ".2f") else "",
    ]


# ---------------------------------------------------------------- sample predictions


def _examples(run_dir: Path, predictions: Sequence[Mapping[str, Any]], mix: str, cache: Path) -> list[str]:
    chosen = choose(predictions, _EXAMPLES)
    if not chosen:
        return []
    sources = _open_sources(mix, cache)
    examples = [_example(row, sources) for row in chosen]
    draw_examples(run_dir / "report" / "predictions.png", examples)
    rows = [
        [
            row["key"],
            each.question,
            each.answer or row.get("error", ""),
            each.reference,
            "✓" if each.correct else "✗",
        ]
        for row, each in zip(chosen, examples, strict=True)
    ]
    return [
        "## Sample predictions",
        "",
        f"{len(chosen)} of {len(predictions):,}, drawn by chance, the kinds of question in turn.",
        "",
        "![Sample predictions](report/predictions.png)",
        "",
        *_table(["sample", "question", "answer", "expected", ""], rows),
    ]


def choose(predictions: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Some predictions, always the same: by chance within a kind, the kinds in turn."""
    rng = random.Random(0)
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in predictions:
        kinds.setdefault(str(row.get("kind", "")), []).append(row)
    piles = [rng.sample(kinds[kind], len(kinds[kind])) for kind in sorted(kinds)]
    longest = max(map(len, piles), default=0)
    return [pile[place] for place in range(longest) for pile in piles if place < len(pile)][:most]


def _open_sources(mix: str, cache: Path) -> dict[str, Source]:
    """The mix's sources by name; nothing if they are no longer there, for a report can do without pictures."""
    path = Path(mix)
    try:
        return (
            {each.name: open_source(each, path.parent, cache) for each in load_mix(path).sources}
            if mix
            else {}
        )
    except (VlmtuneError, OSError):
        return {}


def _example(row: Mapping[str, Any], sources: Mapping[str, Source]) -> Example:
    name, _, index = str(row["key"]).rpartition("#")
    picture = None
    try:
        images = sources[name][int(index)].images
        picture = open_image(images[-1]) if images else None
    except (KeyError, ValueError, IndexError, VlmtuneError):
        pass
    references = row.get("references") or [""]
    return Example(picture, row["prompt"], row["prediction"], references[0], bool(row.get("correct")))


def _reconstruction(run_dir: Path) -> list[str]:
    """The picture that `vlmtune reconstruct` leaves, if it was asked."""
    if not (run_dir / RECONSTRUCTION).exists():
        return []
    return ["## Reconstructions", "", f"![Picture, target, reconstruction]({RECONSTRUCTION.as_posix()})"]


# ---------------------------------------------------------------- time


def _time(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    if not phases:
        return []
    rows = [[str(row["phase"]), _duration(row["seconds"])] for row in phases]
    total = sum(row["seconds"] for row in phases)
    return ["## Time", "", *_table(["phase", "time"], [*rows, ["total", _duration(total)]])]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02.0f} s" if minutes else f"{rest:.1f} s"


# ---------------------------------------------------------------- files and Markdown


def _read_json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return default


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a line cut off by an interrupted write is left out."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and not any(isinstance(v, float) and math.isnan(v) for v in row.values()):
            rows.append(row)
    return rows


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [list(map(_escape, row)) for row in (head, *rows)]
    rule = ["---"] * len(head)
    return [f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:])]


def _escape(text: str, most: int = 200) -> str:
    """The text on one line, so that Markdown and HTML show it as it is."""
    line = " ".join(str(text).split())
    if len(line) > most:
        line = f"{line[:most]} …"
    return _MARKDOWN.sub(r"\\\1", html.escape(line, quote=False))


__all__ = ["RECONSTRUCTION", "choose", "write_report"]
