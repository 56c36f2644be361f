from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.conftest import Write
from vlmtune.config import load_recipe
from vlmtune.config.lock import file_hash, lock_text, mix_hash, stage_key
from vlmtune.config.schema import Recipe

BASE = Path("recipes/base.yaml")


def one(*overrides: str) -> Recipe:
    return load_recipe(BASE, overrides)[0]


@pytest.mark.parametrize(
    "overrides", [[], ["stages=[tune]"], ['paper="1e-4"', "run.dir='no'", "optim.eps=1e-7"]]
)
def test_a_lock_is_a_recipe_that_repeats_the_run(write: Write, overrides: list[str]):
    recipes = load_recipe(BASE, overrides)
    text = lock_text(
        recipes, {"torch": "2.13.0"}, {"data_mixes/easy.yaml": mix_hash(Path("data_mixes/easy.yaml"))}
    )
    assert load_recipe(write("runs/base/recipe.lock.yaml", text)) == recipes
    assert "torch: 2.13.0" in text


def test_a_lock_without_stages(write: Write):
    write("recipes/base.yaml", BASE.read_text().split("stages:")[0])
    recipes = load_recipe(BASE, ["model.projector={type: my.Own, deep: {x: [1, 1e-9]}}"])
    text = lock_text(recipes, {}, {})
    assert "stages" not in text
    assert load_recipe(write("lock.yaml", text)) == recipes


@given(
    paper=st.text() | st.sampled_from(["\x85", "no", "1e-4", "null", "\u2028 x", " "]),
    lr=st.floats(1e-30, 1e30),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_and_number_survive_the_lock(write: Write, paper: str, lr: float):
    recipes = tuple(
        recipe.model_copy(update={"paper": paper, "optim": recipe.optim.model_copy(update={"lr": lr})})
        for recipe in load_recipe(BASE)
    )
    assert load_recipe(write("lock.yaml", lock_text(recipes, {}, {}))) == recipes


NO_WEIGHTS = """
    name=other paper=x run.dir=x run.keep=9 run.log_every=3 run.save_every=7 run.trackers=[wandb]
    run.probe=false run.rehearse=true data.chat.workers=0 evaluation.batch_size=3
    evaluation.mix=data_mixes/easy.yaml evaluation.held_out.every=7
    export.enabled=false
"""
WEIGHTS = """
    run.seed=1 run.precision=fp32 optim.lr=1 schedule.epochs=2 objective.chunk=7 model.vision.path=z
    model.template=chatml tuning.projector.lr=5 data.chat.micro_tokens=8192
    data.chat.augment.shift=1 evaluation.held_out.fraction=0 evaluation.held_out.most=9
"""


@pytest.mark.parametrize("override", NO_WEIGHTS.split())
def test_what_leaves_the_weights_alone_leaves_the_key(write: Write, override: str):
    assert one(override) != one()
    assert stage_key(one(override), {}) == stage_key(one(), {})


@pytest.mark.parametrize("override", WEIGHTS.split())
def test_what_changes_the_weights_changes_the_key(write: Write, override: str):
    assert stage_key(one(override), {}) != stage_key(one(), {})


def test_the_key_depends_on_the_inputs_and_not_on_their_order(write: Write):
    assert stage_key(one(), {"before": "a"}) != stage_key(one(), {"before": "b"})
    assert stage_key(one(), {"a": "1", "b": "2"}) == stage_key(one(), {"b": "2", "a": "1"})


def test_a_mix_counts_by_content_not_by_path(write: Write):
    before = stage_key(one(), {})
    Path("data_mixes/easy.yaml").rename("data_mixes/moved.yaml")
    write("data_mixes/easy.yaml", "sources: [{name: easy, format: easy_vqa, count: 5}]\n")
    assert stage_key(one("data.chat.mix=data_mixes/moved.yaml"), {}) == before
    assert stage_key(one(), {}) != before


def test_a_mix_hash_follows_the_annotations_and_not_the_comments(write: Write):
    text = "sources: [{name: a, format: llava_json, path: a.json}]\n"
    mix, annotations = write("mixes/m.yaml", text), write("mixes/a.json", "[]")
    before = mix_hash(mix)
    assert mix_hash(write("mixes/m.yaml", f"# a comment\ndescription: words\n{text}")) == before
    annotations.write_text("[1]")
    assert mix_hash(mix) != before


def test_a_file_hash_is_the_sha256_of_its_bytes(write: Write):
    known = (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's own example: abc
    )
    assert file_hash(write("abc", "abc")) == known
