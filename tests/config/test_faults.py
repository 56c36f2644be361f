"""Every fault of a recipe in one report: the line, the dotted path, the reason and the nearest name."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.config.conftest import BASE, Write, faults
from vlmtune.config import load_recipe
from vlmtune.config.plugins import PROJECTOR_TYPES
from vlmtune.config.schema import Recipe
from vlmtune.errors import RecipeError

FIVE = """\
extends: base.yaml
name: five
model:
  projector: {type: mpl2x}
tuning:
  visoin: {mode: frozen}
run:
  precision: bf61
  seed: abc
evaluation:
  mix: data_mixes/eazy.yaml
"""
FIVE_FAULTS = {
    "recipes/five.yaml:4: model.projector.type is 'mpl2x', which is not known. Did you mean mlp2x?",
    "recipes/five.yaml:6: tuning.visoin is not a known key. Did you mean vision?",
    "recipes/five.yaml:8: run.precision is 'bf61'. Did you mean bf16? Known: fp32, bf16",
    "recipes/five.yaml:9: run.seed is 'abc'. It should be a whole number",
    "recipes/five.yaml:11: evaluation.mix: no file 'data_mixes/eazy.yaml'. Did you mean data_mixes/easy",
}
CHECK = """
import sys
from pathlib import Path
from vlmtune.config.loader import load_recipe
from vlmtune.errors import RecipeError
try:
    load_recipe(Path(sys.argv[1]))
except RecipeError as error:
    print(error)
print("heavy", sorted({"torch", "transformers", "numpy", "accelerate", "PIL"} & set(sys.modules)))
"""


def test_five_faults_in_one_report_without_torch(write: Write):
    write("recipes/five.yaml", FIVE)
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(root)!r})\n{CHECK}",
        "recipes/five.yaml",
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    *found, heavy = lines
    assert len(found) == 5
    assert all(any(line.startswith(fault) for line in found) for fault in FIVE_FAULTS)
    assert heavy == "heavy []"


def test_a_misspelt_part_is_told_word_for_word(write: Write):
    write("recipes/five.yaml", FIVE)
    said = "tuning.visoin is not a known key. Did you mean vision? Known: vision, projector, language"
    assert f"recipes/five.yaml:6: {said}" in faults(Path("recipes/five.yaml"))


def test_every_projector_type_is_among_the_choices(write: Write):
    (found,) = faults(Path("recipes/base.yaml"), "model.projector.type=x")
    assert all(name in found.split("Known: ")[1].split(", ") for name in PROJECTOR_TYPES)
    assert found.endswith("or an import path with a dot (my_pkg.module.Name)")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("model.projector=linear", "model.projector is 'linear'. Write {type: linear}"),
        ("model.projector={factor: 2}", None),  # the type is inherited
        ("objective.chunk=7", None),  # so is the default's
        ("tuning.language.lr=1e-5", None),
        ("tuning.vision.lr=1e-5", "tuning.vision.mode is missing. Known: frozen, full, lora, dora, qlora"),
        ("model.projector.type=null", "model.projector.type is empty, which is not known. Known: linear,"),
        ("model.projector.type=[1]", "model.projector.type is [1], which is not known. Known: linear,"),
        (
            "model.projector.type=custom",
            "model.projector.type is 'custom', which is not known. Known: linear,",
        ),
        (
            "model.projector.type=my..pkg",
            "model.projector.type is 'my..pkg', which is not known. Known: linear,",
        ),
        ("model.projector.type=my.Projector", None),
        ("tuning.vision=frozen", "tuning.vision is 'frozen'. Write {mode: frozen}"),
        ("tuning.vision=null", "tuning.vision is empty. Write {mode: frozen}"),
        ("tuning.vision={lr: 1}", "tuning.vision.mode is missing. Known: frozen, full, lora, dora, qlora"),
        (
            "tuning.vision={mode: fulll}",
            "tuning.vision.mode is 'fulll', which is not known. Did you mean full?",
        ),
        ("data.chat.transforms=[null]", "data.chat.transforms.0 is empty. Write {type: shuffle_turns}"),
        ("data.chat.transforms=x", "data.chat.transforms is 'x'. It should be a list"),
        (
            "model.language.tokenizer=5",
            "model.language.tokenizer is 5. It should be text or a mapping with the keys",
        ),
        (
            "model.language.tokenizer={vocab: 5}",
            "model.language.tokenizer.vocab is not a known key. Did you mean vocab_size",
        ),
        ("model.vision=null", "model: give checkpoint, or all of vision, projector and language"),
        ("run=null", "run is empty. It should be a mapping with the keys dir, seed,"),
        ("optim.betas=[0.9]", "optim.betas.1 is missing"),
        ("optim.betas=[1, 2, 3]", "optim.betas is [1, 2, 3]. It should have at most 2 items"),
        ("optim.lr=0", "optim.lr is 0. It should be greater than 0"),
        ("run.seed=1.5", "run.seed is 1.5. It should be a whole number"),
        ("run.probe=7", "run.probe is 7. It should be true or false"),
        (
            "run.trackers=[wandbb]",
            "run.trackers.0 is 'wandbb'. Did you mean wandb? Known: tensorboard, wandb, trackio",
        ),
        ("name=5", "name is 5. It should be text (put it in quotes)"),
        ("name=a b", "name is 'a b'. It should have the form ^[A-Za-z0-9]"),
        (f"paper=[{'x' * 99}]", f"paper is ['{'x' * 55}... It should be text"),
    ],
)
def test_reasons_in_plain_words(write: Write, override: str, fault: str | None):
    if fault is None:
        assert load_recipe(Path("recipes/base.yaml"), [override])
    else:
        (found,) = faults(Path("recipes/base.yaml"), override)
        assert found.startswith(f"command line: {override}: {fault}")


def test_no_message_speaks_pydantic(write: Write):
    words = ("Input", "instance of", "Extra inputs", "pydantic", "Value error", "_type_tag")
    told = 0
    for key in ("name", *Recipe.model_fields):
        for value in ("5", "[1]", "null", "{x: 1}", "text"):
            if key != "stage":
                try:
                    load_recipe(Path("recipes/base.yaml"), [f"{key}={value}"])
                except RecipeError as error:
                    told += 1
                    assert not any(word in str(error) for word in words)
    assert told > 30


KEYS = """
    name model model.vision model.projector model.projector.type model.language.tokenizer tuning tuning.vision
    tuning.language.mode data data.chat data.chat.mix data.chat.transforms objective.type optim.betas optim.lr
    schedule run.dir evaluation.mix export stages stages.align stages.tune.optim stages.new extends stage lock
    x.y
"""
keys = st.sampled_from(KEYS.split())
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just("mlp2x")
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "mode", "a"]), inner, max_size=3)
    ),
    max_leaves=5,
).map(repr)
anything = st.tuples(keys, values | st.text(max_size=10)).map("=".join) | st.text(max_size=12)
fuzz = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def recipes_or_faults(path: Path, overrides: list[str]) -> None:
    try:
        found = load_recipe(path, overrides)
    except RecipeError as error:
        assert error.faults
        assert all(fault.what and fault.where for fault in error.faults)
    else:
        assert found
        assert all(isinstance(recipe, Recipe) for recipe in found)


@given(overrides=st.lists(anything, max_size=3))
@fuzz
def test_any_overrides_give_recipes_or_faults(write: Write, overrides: list[str]):
    recipes_or_faults(Path("recipes/base.yaml"), overrides)


@given(seed=st.integers(0, 2**32), cuts=st.integers(1, 6))
@fuzz
def test_any_mutation_of_a_recipe_gives_recipes_or_faults(write: Write, seed: int, cuts: int):
    rng = random.Random(seed)
    text = FIVE + BASE.replace("name: base", "paper: x").split("model:")[0] + BASE.split("schedule")[1]
    for _ in range(cuts):
        start = rng.randrange(len(text) + 1)
        stop = start + rng.randrange(6)
        text = (
            text[:start]
            + "".join(rng.choices("\n :-[]{}#&*!'\"ab01~.,\t\0é", k=rng.randrange(5)))
            + text[stop:]
        )
    recipes_or_faults(write("recipes/fuzz.yaml", text), [])
    write("data_mixes/easy.yaml", text)
    recipes_or_faults(Path("recipes/base.yaml"), [])
