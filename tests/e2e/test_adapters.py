"""LoRA, a full projector and a frozen tower: killed, resumed, merged, exported, asked."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.e2e.test_resume import kill_at, start
from tests.models.adapted import answers, distance, save
from tests.tiny import tiny_model
from tests.twins import tiny_mix
from vlmtune.config.loader import load_recipe
from vlmtune.export.hf import export_model
from vlmtune.export.merge import merge_adapters
from vlmtune.export.probe import probe_batch
from vlmtune.models.build import load_model
from vlmtune.models.tuning import part_of
from vlmtune.run import evaluate_folder, export_step, run

STEPS = 12
LAST = f"step_{STEPS:06d}"


def recipe_file(folder: Path, language: dict, **changes: object) -> Path:
    """A recipe that tunes the saved model in `folder / "base"`."""
    content = {
        "name": "adapters",
        "model": {"checkpoint": str(folder / "base")},
        "tuning": {
            "vision": {"mode": "frozen"},
            "projector": {"mode": "full", "lr": 1e-3},
            "language": language,
        },
        "data": {
            "chat": {
                "mix": str(tiny_mix(folder, 20)),
                "batch_size": 5,
                "max_length": 256,
                "micro_tokens": 512,
                "workers": 0,
            }
        },
        "optim": {"lr": 5e-3},
        "schedule": {"steps": STEPS},
        "run": {
            "precision": "fp32",
            "save_every": 3,
            "log_every": 1,
            "log_samples": True,
            "activation_checkpointing": True,
        },
        "evaluation": {"held_out": {"fraction": 0.1, "every": 4, "answers": 1}},
        "export": {"enabled": False},
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def save_base(folder: Path) -> None:
    save(*tiny_model(seed=4), folder / "base")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes that are started here: sums are then the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_resumed_merged_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA#1200 #808: a resume lost the projector. LLaVA#462: the merge was another model."""
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path)
    recipe = recipe_file(tmp_path, {"mode": "lora", "rank": 4, "dropout": 0.1})
    process = start(recipe, tmp_path, "killed", 0)
    kill_at(process, tmp_path / "killed", 8, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / LAST).exists()
    for name in ("killed", "whole"):
        run(load_recipe(recipe, [f"run.dir={tmp_path / name}"]))

    for file in ("model/trained.safetensors", "optimizer.safetensors"):
        whole, resumed = (load_file(tmp_path / name / LAST / file) for name in ("whole", "killed"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), file
    rows = map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.95 * losses[0]

    step = tmp_path / "killed" / LAST
    trained = load_file(step / "model" / "trained.safetensors")
    assert {part_of(name) for name in trained} == {"projector", "language"}  # no LoRA in the tower
    model, processor = load_model(step / "model")
    base, _ = load_model(tmp_path / "base")
    ours, theirs = model.state_dict(), base.state_dict()
    moved = [
        name for name in theirs if part_of(name) == "projector" and not torch.equal(ours[name], theirs[name])
    ]
    assert len(moved) == 4
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if part_of(name) == "vision")

    merge_adapters(step, tmp_path / "merged")
    report = export_step(step, tmp_path / "exported", None)
    assert report.difference.largest <= 1e-4
    plain = export_model(base, processor, tmp_path / "plain", None, probe_batch(base, processor), {}).path
    expected = answers(model, processor)
    names = load_file(plain / "model.safetensors").keys()
    for out in (tmp_path / "merged", tmp_path / "exported"):
        assert load_file(out / "model.safetensors").keys() == names
        reopened = AutoModelForImageTextToText.from_pretrained(out)
        assert distance(answers(reopened, processor), expected) <= 1e-4
    assert distance(answers(base, processor), expected) > 1e-2


def test_qlora_and_eight_bit_adam_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path)
    recipe = recipe_file(
        tmp_path,
        {"mode": "qlora", "rank": 64},
        optim={"type": "adamw_8bit", "lr": 5e-3},
        schedule={"steps": 6},
    )
    run(load_recipe(recipe, ["run.dir=whole"]))
    run(load_recipe(recipe, ["run.dir=stopped"]))
    last = tmp_path / "stopped" / "step_000006"
    moments = load_file(last / "optimizer.safetensors")
    assert any(key.startswith("state1:") and value.dtype == torch.uint8 for key, value in moments.items())
    for file in last.rglob("*"):
        if file.is_file():
            file.unlink()
    run(load_recipe(recipe, ["run.dir=stopped"]))  # from step 3
    for file in ("model/trained.safetensors", "optimizer.safetensors"):
        whole, resumed = (load_file(tmp_path / name / last.name / file) for name in ("whole", "stopped"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), file
    scores = evaluate_folder(str(last), tmp_path / "mix.yaml", None, 8, 4, limit=3)
    assert scores.overall.questions == 3


def test_stages_with_adapters_build_on_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path)
    stages = {
        "one": {"tuning": {"language": {"mode": "frozen"}}},
        "two": {},
        "three": {"tuning": {"vision": {"mode": "lora", "rank": 2}, "language": {"mode": "dora", "rank": 2}}},
    }
    recipe = recipe_file(
        tmp_path,
        {"mode": "lora", "rank": 4},
        stages=stages,
        schedule={"steps": 3},
        export={"enabled": True},
        run={"dir": "run", "precision": "fp32", "save_every": 3},
    )
    run(load_recipe(recipe))
    last = tmp_path / "run" / "three" / "step_000003"
    said = json.loads((last / "model" / "adapters.json").read_text())
    assert said["base"]["model"]["checkpoint"] == str(tmp_path / "run" / "two" / "step_000003" / "model")
    manifest = json.loads((tmp_path / "run" / "export" / "manifest.json").read_text())
    assert set(manifest["adapters"]) == {"vision", "language"}
    model, processor = load_model(last / "model")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "export")
    assert distance(answers(exported, processor), answers(model, processor)) <= 1e-4
