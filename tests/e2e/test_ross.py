"""A Ross run in small: two stages, a VAE on disk, an export without denoiser, a picture grid in the report."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from tests.tiny import LANGUAGES, TOWERS
from tests.twins import tiny_mix
from tests.vaes import tiny_vae_folder
from vlmtune.cli import app
from vlmtune.config.schema import Recipe
from vlmtune.errors import CheckpointError
from vlmtune.evaluation.report import write_report
from vlmtune.export.probe import probe_batch
from vlmtune.models.build import load_model
from vlmtune.provenance import base_hashes
from vlmtune.reconstruct import open_objective, reconstruct_images
from vlmtune.run import run

STEPS = 3


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Stage 1 with a frozen language model and its own rate for the denoiser, stage 2 with everything but the tower."""
    folder = tmp_path_factory.mktemp("ross")
    mix = tiny_mix(folder, 24)
    base = {
        "name": "ross",
        "model": {
            "vision": {"config": TOWERS["clip"]},
            "projector": {"type": "mlp2x"},
            "language": {"config": LANGUAGES["qwen2"], "tokenizer": {"vocab_size": 400}},
        },
        "data": {
            "chat": {"mix": str(mix), "batch_size": 6, "max_length": 256, "micro_tokens": 256, "workers": 0}
        },
        "objective": {
            "type": "reconstruction",
            "target": {"type": "vae", "path": tiny_vae_folder(folder / "vae")},
            "denoiser": {"depth": 1, "width": 32, "heads": 4},
        },
        "optim": {"lr": 1e-3, "objective_lr": 1e-4},
        "schedule": {"steps": STEPS},
        "run": {"dir": str(folder / "run"), "precision": "fp32", "log_every": 1},
        "evaluation": {"held_out": {"fraction": 0.1, "every": STEPS, "answers": 1}},
    }
    align = base | {"stage": "align", "tuning": {"language": {"mode": "frozen"}}}
    return folder, tuple(Recipe.model_validate(one) for one in (align, base | {"stage": "tune"}))


@pytest.fixture(scope="module")
def done(recipes):
    folder, stages = recipes
    patch = pytest.MonkeyPatch()
    patch.setattr("vlmtune.run.CACHE", folder / "cache")
    report = run(stages)
    patch.undo()
    return report.folder


def step_of(done, stage):
    return done / stage / f"step_{STEPS:06d}"


def rows_of(done, stage):
    lines = (done / stage / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_both_terms_are_logged_and_add_up(done):
    rows = rows_of(done, "align")
    assert len(rows) == STEPS
    for row in rows:
        assert row["loss"] == pytest.approx(row["next_token"] + row["reconstruction"])
    assert rows[0]["reconstruction"] == pytest.approx(1.0, abs=0.05)


def test_the_denoiser_goes_on_from_the_stage_before_and_the_tower_stays(done):
    first, second = (load_file(step_of(done, stage) / "objective.safetensors") for stage in ("align", "tune"))
    fresh_would_be_zero = first["denoiser.last.out.bias"]
    assert fresh_would_be_zero.abs().max() > 0
    moved = (second["denoiser.last.out.bias"] - fresh_would_be_zero).abs().max()
    assert 0 < moved < 4e-4 * STEPS  # three steps of at most the rate, from where stage 1 ended
    assert first.keys() == second.keys()
    assert not any("vae" in name or "table" in name for name in first)
    models = [load_model(step_of(done, stage) / "model")[0] for stage in ("align", "tune")]
    towers = [model.model.vision_tower.state_dict() for model in models]
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0])


def test_the_export_is_a_stock_llava_with_the_training_models_logits(done):
    export = done / "export"
    with safe_open(export / "model.safetensors", "pt") as file:
        names = [*file.keys()]
    assert names and not [name for name in names if "denoiser" in name or "vae" in name]
    assert json.loads((export / "config.json").read_text())["model_type"] == "llava"
    trained, processor = load_model(step_of(done, "tune") / "model")
    stock, report = LlavaForConditionalGeneration.from_pretrained(export, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    batch = probe_batch(trained, processor)
    inputs = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values}
    with torch.no_grad():
        expected, found = (model.eval()(**inputs).logits for model in (trained, stock))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_loss_curve_has_both_terms(done, monkeypatch):
    drawn = []
    monkeypatch.setattr("vlmtune.evaluation.report.draw_losses", lambda path, curves: drawn.extend(curves))
    write_report(done)
    assert [curve.stage for curve in drawn] == ["align", "tune"]
    for curve in drawn:
        assert curve.terms.keys() == {"next_token", "reconstruction"}
        sums = [sum(loss for _, loss in points) for points in zip(*curve.terms.values(), strict=True)]
        assert sums == pytest.approx([loss for _, loss in curve.train])


def test_the_report_shows_the_pictures_painted(done, tmp_path):
    picture = tmp_path / "red.png"
    Image.new("RGB", (50, 40), "red").save(picture)
    result = CliRunner().invoke(
        app, ["reconstruct", str(step_of(done, "tune")), str(picture), "--steps", "3"]
    )
    assert result.exit_code == 0, result.output
    grid = done / "report" / "reconstruction.png"
    assert str(grid) in result.output.replace("\n", "")
    with Image.open(grid) as opened:
        assert opened.width > opened.height > 100  # one row of three pictures
    assert "report/reconstruction.png" in (done / "report.md").read_text()


def test_painting_depends_on_the_picture_and_the_seed(done, tmp_path):
    pictures = []
    for color in ("red", "blue"):
        pictures.append(tmp_path / f"{color}.png")
        Image.new("RGB", (40, 40), color).save(pictures[-1])
    grids = []
    for seed in (0, 0, 1):
        path = reconstruct_images(step_of(done, "tune"), pictures, tmp_path / f"{seed}.png", 2, seed)
        grids.append(path.read_bytes())
    assert grids[0] == grids[1] != grids[2]
    objective, _ = open_objective(step_of(done, "tune"))
    assert not objective.training and objective.denoiser.last.out.bias.abs().max() > 0


def test_a_run_and_an_export_lead_to_the_same_step(done, tmp_path):
    picture = tmp_path / "red.png"
    Image.new("RGB", (40, 40), "red").save(picture)
    grids = [
        reconstruct_images(folder, [picture], tmp_path / f"{number}.png", 2, 0).read_bytes()
        for number, folder in enumerate((step_of(done, "tune"), done / "tune", done / "export"))
    ]
    assert grids[0] == grids[1] == grids[2]
    shutil.copytree(done / "export", tmp_path / "alone")
    with pytest.raises(CheckpointError, match="an export holds the model alone"):
        reconstruct_images(tmp_path / "alone", [picture], None, 2, 0)


def test_an_export_has_nothing_to_paint_with(done):
    with pytest.raises(CheckpointError, match="an export holds the model alone"):
        open_objective(done / "export")


def test_the_vae_counts_among_the_base_models(recipes):
    """Another VAE in the same folder makes the stage another stage."""
    folder, (align, _) = recipes
    hashes = base_hashes(align)
    assert len(hashes["base target"]) == 64
    control = align.model_copy(update={"objective": align.objective.model_copy(update={"weight": 0.0})})
    assert "base target" not in base_hashes(control)
    started = align.objective.model_copy(update={"weights": str(folder / "run" / "align")})
    assert "base denoiser" in base_hashes(align.model_copy(update={"objective": started}))
