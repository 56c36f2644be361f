"""Every recipe on disk: parses, says what it is, and its tiny twin trains, exports and is scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.twins import tiny_twin
from vlmtune.config.loader import load_recipe, recipe_schema
from vlmtune.run import run

ROOT = Path(__file__).parents[2]
VAES = [ROOT / "recipes" / "ross" / "tiny_vae.yaml"]
"""Recipes of their own kind: `vlmtune vae` reads them (tests/training/test_autoencoder.py)."""
RECIPES = sorted(
    path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "launch" and path not in VAES
)
LAUNCH = sorted((ROOT / "recipes" / "launch").glob("*.yaml"))


def name(path):
    return str(path.relative_to(ROOT / "recipes"))


def test_all_recipes_are_collected():
    """torchtune's config test validated 3 of 197 files."""
    everything = {path for path in (ROOT / "recipes").rglob("*.yaml")}
    assert everything == {*RECIPES, *VAES, *LAUNCH} and len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_says_what_it_is(path):
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=../recipe.schema.json\n")
    assert f"vlmtune train recipes/{name(path)}" in text or "make demo" in text
    assert "Hardware:" in text and "Inputs:" in text and "Reproduced:" in text
    first = load_recipe(path)[0]
    assert first.paper or first.reason


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_tiny_twin_trains_exports_and_is_scored(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vlmtune.run.CACHE", tmp_path / "cache")
    twins = tuple(tiny_twin(stage, tmp_path / "twin") for stage in load_recipe(path))
    report = run(twins)
    assert (report.folder / "export" / "config.json").is_file()
    assert (report.folder / "report.md").is_file()
    assert report.scores.overall.questions == 24
    again = run(twins)  # every stage is done: nothing trains again
    phases = {row["phase"] for row in json.loads((report.folder / "phases.json").read_text())}
    assert phases >= {"export", "evaluate"} and again.scores == report.scores


@pytest.mark.parametrize("path", LAUNCH, ids=name)
def test_launch_files_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


def test_the_schema_on_disk_is_the_schema_in_force():
    """`make schema` writes it; editors complete from it."""
    assert json.loads((ROOT / "recipes" / "recipe.schema.json").read_text()) == recipe_schema()


def test_every_number_quoted_from_the_paper_names_its_place():
    """Sections, tables or released scripts; a deviation is marked `# differs:`."""
    for path in (ROOT / "recipes" / "llava15").glob("*.yaml"):
        body = path.read_text().partition("\n\n")[2]
        for line in body.splitlines():
            code, _, comment = line.partition("#")
            if any(key in code for key in ("lr:", "batch_size:", "epochs:", "max_length:")):
                assert comment.strip(), f"{path.name}: {line}"


def test_mix_files_have_a_source_each():
    for path in (ROOT / "data_mixes").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["sources"]
