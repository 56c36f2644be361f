"""Ten steps of a tiny run against figures on disk: shows that something changed, not what is right.

`make golden` rewrites them; say why in CHANGELOG.md under "Changes to results".
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.twins import tiny_twin
from vlmtune.config.loader import load_recipe
from vlmtune.run import run

ROOT = Path(__file__).parents[2]
STEPS = 10


@pytest.mark.parametrize("name", ["llava15/pretrain_7b", "llava15/finetune_7b"])
def test_ten_steps_as_before(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vlmtune.run.CACHE", tmp_path / "cache")
    (recipe,) = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    twin = tiny_twin(recipe, tmp_path / "twin", STEPS)
    twin = twin.model_copy(update={"export": twin.export.model_copy(update={"enabled": False})})
    folder = run((twin,)).folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["loss"], row["grad_norm"]) for row in lines if "loss" in row]
    assert len(found) == STEPS
    golden = Path(__file__).parent / f"{name.replace('/', '_')}.txt"
    if os.environ.get("VLMTUNE_GOLDEN") == "write":
        golden.write_text("".join(f"{step} {loss:.6f} {norm:.6f}\n" for step, loss, norm in found))
    expected = [tuple(map(float, line.split())) for line in golden.read_text().splitlines()]
    for (step, loss, norm), (number, old_loss, old_norm) in zip(found, expected, strict=True):
        assert step == number
        assert loss == pytest.approx(old_loss, rel=2e-4), f"step {step}"
        assert norm == pytest.approx(old_norm, rel=2e-3), f"step {step}"
    drift = sum(loss - old for (_, loss, _), (_, old, _) in zip(found, expected, strict=True)) / STEPS
    assert abs(drift) < 5e-4
