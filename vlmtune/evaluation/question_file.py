"""Questions as data: a chat_jsonl file that `train` reads, the mix beside it, and how to go on after a stop.

With answers a line is a conversation about one picture (users ask, so any trainer can read it). Without, a line is
one question, in the questioner's turn: what there is to learn is the question.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlmtune.data.faults import Quarantine
from vlmtune.errors import DataError
from vlmtune.evaluation.asking import Asked, Asking, Question, ask, question_statistics
from vlmtune.evaluation.generate import open_model
from vlmtune.types import IMAGE_MARK, ImageRef, Turn

PICTURES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""Files taken from a folder; a file that is named is taken whatever its suffix."""


@dataclass(frozen=True, slots=True)
class AskReport:
    """What was written."""

    out: Path
    mix: Path
    pictures: int
    skipped: int
    bad: int
    questions: tuple[Question, ...]

    def lines(self) -> list[str]:
        """What to print at the end."""
        done = f"{self.pictures:,} pictures asked about, {self.skipped:,} were in the file, {self.bad:,} unreadable"
        shown = question_statistics(self.questions).lines() if self.questions else []
        return [done, *shown, f"questions {self.out}", f"mix       {self.mix} (data.chat.mix of a recipe)"]


def ask_pictures(
    model: str,
    pictures: Sequence[Path],
    out: Path,
    asking: Asking,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> AskReport:
    """Asks about every picture (of a folder: all in it) that `out` does not hold yet, and appends to it.

    Pictures that cannot be read are listed in `<out>.quarantine.jsonl`. Raises DataError: no picture, or some
    lie outside the folder that an earlier run noted in the mix.
    """
    paths = list(picture_files(pictures))
    root = _root(paths, out.with_suffix(".yaml"))
    names = [path.relative_to(root).as_posix() for path in paths]
    done = written_pictures(out)
    left = [name for name in names if name not in done]
    opened, processor = open_model(model) if left else (None, None)
    mix = _write_mix(out, root)
    quarantine = Quarantine(out.with_suffix(".quarantine.jsonl"), max(len(names), 1), 1.0)
    questions: list[Question] = []
    bad = 0
    chunk = max(batch_size // asking.number, 1)
    for start in range(0, len(left), chunk):
        scenes = [(ImageRef(name, root),) for name in left[start : start + chunk]]
        for each in ask(opened, processor, scenes, asking, batch_size):
            if each.error:
                quarantine.add(each.key, each.error)
                bad += 1
                continue
            questions += each.questions
            _append(out, records(each, asking.answers))
        if on_progress:
            on_progress(len(names) - len(left) + min(start + chunk, len(left)), len(names))
    return AskReport(out, mix, len(left) - bad, len(names) - len(left), bad, tuple(questions))


def records(asked: Asked, answers: bool) -> list[dict[str, Any]]:
    """The lines for one scene: a conversation of its answered questions, or one question a line."""
    if not answers:
        talks = [[*asked.context, Turn("questioner", question.text)] for question in asked.distinct]
    else:
        pairs = [
            turn
            for question in asked.distinct
            if question.answer
            for turn in (Turn("user", question.text), Turn("assistant", question.answer))
        ]
        talks = [_joined([*asked.context, *pairs])] if pairs else []
    images = [image.name for image in asked.images]
    return [
        {"images": images, "messages": [{"role": turn.role, "content": turn.text} for turn in turns]}
        for turns in talks
    ]


def _joined(turns: list[Turn]) -> list[Turn]:
    """The turns, with marks that stand alone in front of the first question put into it."""
    marks, first, *rest = turns
    alone = not marks.text.replace(IMAGE_MARK, "").strip()
    return [Turn("user", f"{marks.text}\n{first.text}"), *rest] if alone else turns


def picture_files(given: Sequence[Path]) -> Iterator[Path]:
    """Yields the absolute paths of files, and of the pictures in folders, each once. Raises DataError for none."""
    found: dict[Path, None] = {}
    for path in given:
        if not path.exists():
            raise DataError(f"there is no file or folder {path}", remedy="Check the name.")
        inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in PICTURES)
        found |= dict.fromkeys(one.resolve() for one in (inside if path.is_dir() else [path]))
    if not found:
        raise DataError(
            f"there is no picture in {', '.join(map(str, given))}", remedy="Name files or folders."
        )
    yield from found


def written_pictures(out: Path) -> set[str]:
    """The pictures that an earlier run asked about; cuts off a last line that a kill left incomplete."""
    if not out.is_file():
        return set()
    text = out.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        out.write_text(whole, "utf-8")
    return {name for line in whole.splitlines() for name in json.loads(line)["images"]}


def _append(out: Path, lines: list[dict[str, Any]]) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _root(paths: Sequence[Path], mix: Path) -> Path:
    """The folder that picture names start from: the one noted in the mix, or the deepest that holds them all."""
    if not mix.is_file():
        parents = {path.parent for path in paths}
        return Path(os.path.commonpath(parents))
    root = Path(yaml.safe_load(mix.read_text("utf-8"))["sources"][0]["images"])
    outside = [path for path in paths if not path.is_relative_to(root)]
    if outside:
        raise DataError(
            f"{outside[0]} is not below {root}, where the pictures of an earlier run are",
            str(mix),
            "Choose another --out.",
        )
    return root


def _write_mix(out: Path, root: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    source = {"name": out.stem, "format": "chat_jsonl", "path": str(out.resolve()), "images": str(root)}
    mix = out.with_suffix(".yaml")
    mix.write_text(yaml.safe_dump({"sources": [source]}, sort_keys=False), "utf-8")
    return mix


__all__ = ["AskReport", "ask_pictures", "picture_files", "records", "written_pictures"]
