"""`vlmtune merge`, `convert` and `export --push` from the command line's words to the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.tiny import tiny_model
from vlmtune import shipping
from vlmtune.cli import app
from vlmtune.errors import RecipeError
from vlmtune.export.combine import Average, Copy, Dare, Slerp, Ties
from vlmtune.export.hf import export_model
from vlmtune.export.probe import probe_batch

LOCK = """
name: x
stages:
  align:
    model:
      vision: {path: openai/clip-vit-large-patch14-336}
      language: {path: BASE}
  tune: {model: {checkpoint: null}}
lock:
  hashes: {base vision: openai/clip@main, mix data_mixes/a.yaml: 12ab}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, its lock, its export and scores."""
    root = tmp_path_factory.mktemp("runs") / "x"
    for step in (1, 2):
        model, processor = tiny_model(seed=step)
        folder = root / "tune" / f"step_{step:06d}"
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        facts = {"kind": "step", "step": step, "key": "k", "recipe": "x", "total_steps": 2}
        (folder / "manifest.json").write_text(json.dumps(facts))
    export_model(model, processor, root / "export", None, probe_batch(model, processor), facts)
    base = root.parent / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# Base\n")
    (root / "recipe.lock.yaml").write_text(LOCK.replace("BASE", str(base)))
    scores = {"model": str(root / "export"), "accuracy": 0.5, "accuracy_open": None, "questions": 8}
    (root / "metrics.json").write_text(json.dumps(scores | {"yes_no": {"f1": 0.25}}))
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def vlmtune(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_moving_average_over_a_run(run: Path, tmp_path: Path) -> None:
    said = vlmtune("merge", run / "tune", tmp_path / "ema", "--ema", 0.75)
    assert "2 models merged" in said
    first, last = (
        weights(shipping_export(run / "tune" / f"step_{step:06d}", tmp_path / str(step))) for step in (1, 2)
    )
    for name, value in weights(tmp_path / "ema").items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * last[name], rtol=1e-6, atol=1e-6)


def shipping_export(step: Path, out: Path) -> Path:
    vlmtune("export", step, out)
    return out


def test_methods_of_parts_from_the_command_line(run: Path, tmp_path: Path) -> None:
    steps = sorted((run / "tune").glob("step_*"))
    parts = ("--part", "language=ties,density=0.5", "--part", "vision=copy", "--base", steps[0])
    vlmtune("merge", *steps, tmp_path / "out", "--weights", "1,3", *parts, "--shard-size", 0.0001)
    merge = json.loads((tmp_path / "out" / "manifest.json").read_text())["merge"]["parts"]
    assert merge["vision"] == {"method": "copy"}
    assert merge["projector"] == {"method": "average", "weights": [1, 3]}
    assert merge["language"] == {"method": "ties", "density": 0.5, "scale": 1.0, "weights": [1, 3]}
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 2


def test_words_become_methods() -> None:
    assert shipping.Merging("slerp", t=0.25).methods(2) == dict.fromkeys(PARTS, Slerp(0.25))
    assert shipping.Merging("dare", seed=4, scale=2.0).methods(3)["vision"] == Dare(scale=2.0, seed=4)
    mixed = shipping.Merging(None, ("projector=slerp,t=0.1", "language=copy"), weights="2,1").methods(2)
    assert mixed == {"vision": Average((2, 1)), "projector": Slerp(0.1), "language": Copy()}
    assert shipping.Merging("average", ema=0.5).methods(3)["language"] == Average((0.25, 0.25, 0.5))
    assert shipping.Merging("ties", ("language=ties,density=0.7",), density=0.1).methods(2) == {
        "vision": Ties(0.1),
        "projector": Ties(0.1),
        "language": Ties(0.7),
    }


PARTS = ("vision", "projector", "language")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"method": "mean"}, "no method 'mean'.*average, slerp"),
        ({"method": "average", "t": 0.5}, "--t changes nothing"),
        ({"method": "average", "weights": "a,b"}, "not numbers"),
        ({"method": "average", "weights": "1,2", "ema": 0.5}, "exclude"),
        ({"method": None, "parts": ("tower=copy",)}, "no part 'tower'.*vision"),
        ({"method": None, "parts": ("vision=copy,density=1",)}, "copy has no setting 'density'"),
        ({"method": None, "parts": ("vision=ties,density",)}, "a name, = and a number"),
    ],
)
def test_words_that_mean_nothing(how: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        shipping.Merging(**how).methods(2)


def test_several_models_need_a_method(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"2 models to merge.*--method"):
        shipping.merge([run / "tune"], tmp_path / "out", shipping.Merging(None))
    with pytest.raises(RecipeError, match="nothing to merge"):
        shipping.merge([], tmp_path / "out", shipping.Merging(None))


def test_one_step_and_no_method_is_a_merge_of_adapters(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmtune.export import merge

    calls = []
    report = type("Report", (), {"path": tmp_path / "out", "difference": "logits within 1e-06"})
    monkeypatch.setattr(merge, "merge_adapters", lambda *arguments: calls.append(arguments) or report)
    step = run / "tune" / "step_000002"
    assert "adapters merged" in vlmtune("merge", step, tmp_path / "out", "--dtype", "bfloat16")
    assert calls == [(step, tmp_path / "out", "bfloat16", shipping.run_facts(step))]


def test_convert_from_the_command_line(run: Path, tmp_path: Path) -> None:
    tower = ("--vision-tower", "openai/clip-vit-large-patch14-336")
    assert "layout llava" in vlmtune("convert", run / "export", tmp_path / "original", *tower)
    assert "mm_projector_type" in (tmp_path / "original" / "config.json").read_text()
    with pytest.raises(RecipeError, match="no layout 'gguf'"):
        vlmtune("convert", run / "export", tmp_path / "out", "--to", "gguf")


def test_a_card_says_where_the_model_comes_from(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmtune.export import push

    pushed = []
    monkeypatch.setattr(push, "push_folder", lambda *arguments: pushed.append(arguments) or "hub")
    vlmtune("export", run / "tune" / "step_000002", tmp_path / "out", "--push", "me/x", "--public")
    assert pushed == [(tmp_path / "out", "me/x", False)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: [openai/clip-vit-large-patch14-336]" in card
    assert "licence llama2" in card and "`data_mixes/a.yaml`" in card
    assert "| accuracy | 0.5 |" in card and "| yes/no F1 | 0.25 |" in card
    assert "largest logit difference" in card and "Recipe: `x`" in card


def test_scores_of_another_step_are_not_claimed(run: Path, tmp_path: Path) -> None:
    assert shipping.run_facts(run / "tune" / "step_000002")["scores"]["questions"] == 8
    assert "scores" not in shipping.run_facts(run / "tune" / "step_000001")
    stray = tmp_path / "step_000001"
    shutil.copytree(run / "tune" / "step_000001", stray)
    assert shipping.run_facts(stray) == {}
