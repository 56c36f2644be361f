"""What a run tells: metrics.jsonl (always), trackers (if asked), and a progress bar or plain lines."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends JSON lines; on resume, lines after the checkpoint's step are dropped so that no step stands twice."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if _step_of(line) <= resumed_at]
        path.write_text("".join(line + "\n" for line in kept))

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def write(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the torn last line of a killed run
        return float("inf")


class RunLog:
    """A context that shows and records one stage on the main process and stays silent on the others."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        title: str,
        total: int,
        start: int,
        samples: bool = False,
    ) -> None:
        self._accelerator = accelerator
        self._main = accelerator.is_main_process
        self._console = Console(stderr=True)
        self._metrics = MetricsFile(folder / "metrics.jsonl", start) if self._main else None
        self._samples = MetricsFile(folder / "samples.jsonl", start) if self._main and samples else None
        self._live = self._console.is_terminal and self._main
        self._bar = Progress(*_columns(), console=self._console, disable=not self._live)
        self._task = self._bar.add_task(title, total=total, completed=start, note="")
        self._title, self._total, self._start, self._began = title, total, start, time.monotonic()

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to `step` steps done."""
        self._bar.update(self._task, completed=step)

    def record_samples(self, step: int, keys: list[str]) -> None:
        """Writes the keys of all ranks' samples of a step, if the recipe asks for it."""
        if self._samples is not None:
            self._samples.write({"step": step, "samples": keys})

    def record(self, row: dict[str, Any]) -> None:
        """Writes one line of metrics, to the trackers too, and shows it."""
        if self._metrics is None:
            return
        self._metrics.write(row)
        scalars = {
            name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"
        }
        for dataset, loss in row.get("held_out", {}).items():
            scalars[f"held_out/{dataset}"] = loss
        if scalars:
            self._accelerator.log(scalars, step=row["step"])
        self._show(row)

    def say(self, text: str) -> None:
        """Shows one line above the bar."""
        if self._main:
            self._console.print(text, markup=False, highlight=False)

    def _show(self, row: dict[str, Any]) -> None:
        if "loss" in row:
            note = (
                f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} useful tok/s  "
                f"pad {row['padding']:.1%}  {row['memory_gb']:.1f} GB"
            )
            self._bar.update(self._task, note=note)
            if not self._live:
                done = row["step"] - self._start
                left = (time.monotonic() - self._began) / max(done, 1) * (self._total - row["step"])
                self.say(f"{self._title} {row['step']}/{self._total}  {note}  {left:,.0f} s left")
        for dataset, loss in row.get("held_out", {}).items():
            self.say(f"  held-out {dataset}: loss {loss:.4f}")
        for answer in row.get("answers", ()):
            self.say(
                f"  {answer['key']}: {answer['prompt']!r} -> {answer['answer']!r} (is {answer['reference']!r})"
            )


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal (nothing elsewhere); inside, call the function with (done, total)."""
    console = Console(stderr=True)
    with Progress(*_columns(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


def quiet_libraries() -> None:
    """Keeps transformers' and accelerate's notices out of the progress display; warnings stay."""
    for name in ("transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
