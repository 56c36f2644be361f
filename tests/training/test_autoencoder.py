"""The small VAE: trained on a mix's pictures, opened by diffusers, scaled for the noise schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.tiny import tiny_images
from tests.twins import tiny_mix
from vlmtune.cli import app
from vlmtune.config.autoencoder import VaeRecipe, load_vae_recipe
from vlmtune.errors import DataError, RecipeError
from vlmtune.models.targets import Normalisation, VaeTarget, load_vae
from vlmtune.training.autoencoder import train_vae

ROOT = Path(__file__).parents[2]


def recipe_of(folder: Path, **changes) -> VaeRecipe:
    base = {"name": "v", "dir": str(folder / "vae"), "mix": str(tiny_mix(folder)), "side": 16}
    sizes = {"widths": (8, 8), "batch_size": 4, "steps": 2, "lr": 2e-3}
    return VaeRecipe.model_validate(base | sizes | changes)


def test_it_learns_and_is_opened_as_a_target(tmp_path):
    recipe = recipe_of(tmp_path)
    for number, name in enumerate(tiny_images(tmp_path / "images", 6)):  # plain colours are easy
        Image.new("RGB", (20, 20), (40 * number, 200 - 30 * number, 90)).save(tmp_path / "images" / name)
    before = train_vae(recipe, tmp_path / "cache")
    after = train_vae(recipe.model_copy(update={"steps": 60}), tmp_path / "cache")
    assert after.pictures == 6 and after.psnr > before.psnr + 2
    assert json.loads((tmp_path / "vae" / "vae.json").read_text())["psnr"] == after.psnr

    target = VaeTarget(Normalisation((0.5,) * 3, (0.5,) * 3), 4, load_vae(recipe.dir))
    assert (target.scale, target.shift) == pytest.approx((after.scaling_factor, after.shift_factor))
    pixels = torch.stack([torch.full((3, 16, 16), value) for value in (-0.8, -0.2, 0.3, 0.9)])
    tokens = target.encode(pixels, torch.zeros(4, *target.latent))
    assert tokens.shape == (4, 16, 16) and 0.1 < tokens.std() < 10  # about the unit variance that noise has


def test_the_same_seed_gives_the_same_vae(tmp_path):
    recipe = recipe_of(tmp_path)
    first, second = train_vae(recipe, tmp_path / "cache"), train_vae(recipe, tmp_path / "cache")
    assert first == second
    assert train_vae(recipe.model_copy(update={"seed": 1}), tmp_path / "cache") != first


def test_a_mix_without_pictures_is_refused(tmp_path):
    recipe = recipe_of(tmp_path)
    chats = json.loads((tmp_path / "chats.json").read_text())[::3]  # text only
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    with pytest.raises(DataError, match="no picture"):
        train_vae(recipe, tmp_path / "cache")


def test_the_recipe_on_disk_can_be_read_and_changed(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = ROOT / "recipes" / "ross" / "tiny_vae.yaml"
    recipe = load_vae_recipe(path, ["steps=7", "dir=elsewhere"])
    assert (recipe.steps, str(recipe.output), recipe.mix) == (
        7,
        "elsewhere",
        "data_mixes/easy_vqa_captions.yaml",
    )
    assert load_vae_recipe(path).output == Path("runs/tiny_vae")
    text = path.read_text()
    assert "vlmtune vae recipes/ross/tiny_vae.yaml" in text and "Hardware:" in text and "Inputs:" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("widths=[12]", "multiples of 8"),
        ("side=66", "halved"),
        ("stepz=3", "stepz"),
        ("mix=nowhere.yaml", "no file"),
    ],
)
def test_faults_are_named(change, message):
    with pytest.raises(RecipeError, match=message):
        load_vae_recipe(ROOT / "recipes" / "ross" / "tiny_vae.yaml", [change])


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmtune.run.CACHE", tmp_path / "cache")
    recipe = recipe_of(tmp_path)
    path = tmp_path / "vae.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    result = CliRunner().invoke(app, ["vae", str(path), "steps=1"])
    assert result.exit_code == 0, result.output
    assert "6 pictures" in result.output and (tmp_path / "vae" / "config.json").exists()
