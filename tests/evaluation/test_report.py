"""The report of a run: everything there is, nothing that is not, and no text that turns into markup."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import tiny_images
from vlmtune.evaluation.charts import Curve, Example, draw_examples, draw_losses, smoothed
from vlmtune.evaluation.report import choose, write_report
from vlmtune.evaluation.scores import Prediction, score, write_results

EVIL = "<script>alert(1)</script> | **bold** [link](http://x) `code` $x_1$\n# head\n| a | b |"


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def training_rows(steps: int) -> list[dict]:
    rows = [
        {"step": step, "epoch": step / 100, "loss": 5 / step, "samples_per_s": 100.0, "tokens_per_s": 8e3}
        | {"padding": 0.02, "memory_gb": 1.5, "lr": 1e-3, "grad_norm": 1.0, "seconds": 1.0}
        for step in range(10, steps + 1, 10)
    ]
    return [*rows, {"step": steps, "held_out": {"shapes": 0.25}}, {"step": steps, "answers": []}]


def write_mix(folder: Path) -> Path:
    """A mix of three samples with pictures, the last one missing."""
    names = [*tiny_images(folder, 2), "missing.png"]
    rows = [
        {
            "id": str(i),
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?"},
                {"from": "gpt", "value": "red"},
            ],
        }
        for i, name in enumerate(names)
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    mix = folder / "mix.yaml"
    mix.write_text(f"sources:\n  - {{name: shapes, format: llava_json, path: {folder / 'data.json'}}}\n")
    return mix


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my_run"
    write_lines(folder / "tune" / "metrics.jsonl", training_rows(300))
    write_lines(folder / "align" / "metrics.jsonl", training_rows(100))
    with (folder / "align" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "lo')  # killed while writing
    phases = [("train align", 75.2), ("train tune", 3725), ("evaluate", 3.14)]
    rows = [{"phase": name, "seconds": seconds} for name, seconds in phases]
    (folder / "phases.json").write_text(json.dumps(rows))
    predictions = [
        Prediction("shapes#0", "color", "what?", "Red", ("red",)),
        Prediction("shapes#1", "color", EVIL, EVIL, (EVIL, "b|c")),
        Prediction("shapes#2", "yes/no", "is it?", "no", ("yes",), "missing.png: the image is missing."),
    ]
    mix = write_mix(tmp_path / "data")
    write_results(folder, predictions, score(predictions), {"mix": str(mix), "train_seconds": 5.0})
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace(r"\|", "\0").strip("|").split("|")]


def test_report_of_a_whole_run(run: Path, tmp_path: Path) -> None:
    path = write_report(run, tmp_path / "cache")
    text = path.read_text()
    assert path == run / "report.md"
    assert text.startswith("# my\\_run\n")
    assert "| all | 3 | 66.67% | 38.89% |" in text  # soft: 1, (0 + 1/3) / 2 and 0
    stages = [cells(line) for line in text.splitlines() if line.startswith(("| align", "| tune"))]
    assert [row[:5] for row in stages] == [
        ["align", "100", "1.00", "0.146", "shapes 0.250"],
        ["tune", "300", "3.00", "0.020", "shapes 0.250"],
    ]
    assert stages[0][5:] == ["100.0", "8,000", "2.0%", "1.50 GB"]
    assert "| train align | 1 min 15 s |" in text
    assert "| train tune | 1 h 02 min |" in text
    assert "| total | 1 h 03 min |" in text
    for name in ("loss", "predictions"):
        assert f"(report/{name}.png)" in text
        with Image.open(run / "report" / f"{name}.png") as picture:
            assert picture.width > 700
    assert "samples could not be asked" in text


def test_text_of_answers_stays_text(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "cache").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert r"\[link\](http://x)" in text
    assert "\n# head" not in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 5
    for table in tables:
        assert {len(cells(line)) for line in table} == {len(cells(table[0]))}


def test_pictures_come_from_the_mix(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Example] = []
    monkeypatch.setattr(
        "vlmtune.evaluation.report.draw_examples", lambda path, examples: drawn.extend(examples)
    )
    write_report(run, tmp_path / "cache")
    by_question = {example.question: example for example in drawn}
    picture = by_question["what?"].picture
    with Image.open(tmp_path / "data" / "0.png") as original:
        assert picture is not None
        assert np.array_equal(np.asarray(picture), np.asarray(original))
    assert by_question["is it?"].picture is None
    assert [example.correct for example in drawn] == [example.question != "is it?" for example in drawn]
    (tmp_path / "data" / "mix.yaml").unlink()
    drawn.clear()
    write_report(run, tmp_path / "cache")
    assert [example.picture for example in drawn] == [None] * 3


@pytest.mark.parametrize(
    "kept",
    [(), ("phases.json",), ("metrics.json",), ("predictions.jsonl",), ("align", "phases.json")],
    ids="-".join,
)
def test_parts_may_be_missing(run: Path, tmp_path: Path, kept: tuple[str, ...]) -> None:
    folder = tmp_path / "partial"
    folder.mkdir()
    for name in kept:
        (run / name).rename(folder / name)
    text = write_report(folder, tmp_path / "cache").read_text()
    sections = {
        "phases.json": "Time",
        "metrics.json": "Scores",
        "predictions.jsonl": "Sample",
        "align": "Training",
    }
    for name, title in sections.items():
        assert (f"## {title}" in text) == (name in kept)


def test_a_run_without_stages(tmp_path: Path) -> None:
    write_lines(tmp_path / "run" / "metrics.jsonl", training_rows(40))
    assert "| training | 40 |" in write_report(tmp_path / "run").read_text()


def test_choose_takes_the_kinds_in_turn_and_always_the_same() -> None:
    rows = [{"key": f"a#{i}", "kind": "rare" if i == 50 else "common"} for i in range(100)]
    chosen = choose(rows, 12)
    assert chosen == choose(rows, 12)
    assert len({row["key"] for row in chosen}) == len(chosen) == 12
    assert [row["kind"] for row in chosen].count("rare") == 1
    assert choose([], 12) == []


def test_smoothing() -> None:
    assert smoothed([3.0] * 50).tolist() == [3.0] * 50
    line = np.arange(90.0)
    assert smoothed(line)[:87] == pytest.approx(line[:87])  # no lag
    assert np.isfinite(smoothed([1.0, float("nan"), 2.0] * 30)).all()


def test_odd_curves_and_examples_are_drawn(tmp_path: Path) -> None:
    spike = [(1, float("inf")), (2, 1e4), (3, 0.0), (4, 0.01)]
    draw_losses(
        tmp_path / "loss.png", [Curve("$a", spike, {}), Curve("b", [], {"x": [(1, 2.0)]}), Curve("c", [], {})]
    )
    wide = Image.new("RGB", (300, 20), "teal")
    examples = [
        Example(wide, "long " * 60, "$\\frac$ " * 40, "x", False),
        Example(None, "中文\x00", "", "ไทย", False),
        Example(Image.new("L", (1, 90)), "", "y", "y", True),
    ]
    draw_examples(tmp_path / "predictions.png", examples)
    for name in ("loss", "predictions"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).min() < 128
