from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.conftest import Write, faults
from vlmtune.config import load_mix, load_recipe, loader
from vlmtune.config.plugins import LinearConfig, Mlp2xConfig
from vlmtune.config.schema import Recipe
from vlmtune.config.tuning import Full
from vlmtune.errors import RecipeError


def names(recipes: tuple[Recipe, ...]) -> list[str]:
    return [recipe.stage for recipe in recipes]


# ---------------------------------------------------------------- stages


def test_each_stage_is_the_body_with_its_block_over_it(write: Write):
    align, tune = load_recipe(Path("recipes/base.yaml"))
    assert (align.stage, tune.stage) == ("align", "tune")
    assert (align.optim.lr, tune.optim.lr) == (1e-3, 1e-4)
    assert (align.tuning.vision.mode, tune.tuning.vision) == ("frozen", Full(mode="full", lr=1e-5))
    assert align.model == tune.model


def test_without_stages_there_is_one_named_train(write: Write):
    write("recipes/base.yaml", Path("recipes/base.yaml").read_text().split("stages:")[0])
    assert names(load_recipe(Path("recipes/base.yaml"))) == ["train"]


def test_a_list_chooses_and_orders_the_stages(write: Write):
    child = write("recipes/child.yaml", "extends: base.yaml\nstages: [tune, align]\n")
    assert names(load_recipe(child)) == ["tune", "align"]
    assert names(load_recipe(child, ["stages=[tune]"])) == ["tune"]


def test_a_new_block_joins_the_stages_chosen_below(write: Write):
    write("recipes/child.yaml", "extends: base.yaml\nstages: [tune]\n")
    grand = write("recipes/grand.yaml", "extends: child.yaml\nstages: {polish: {optim: {lr: 1e-6}}}\n")
    assert [(one.stage, one.optim.lr) for one in load_recipe(grand)] == [("tune", 1e-4), ("polish", 1e-6)]


def test_an_empty_block_changes_nothing(write: Write):
    child = write("recipes/child.yaml", "extends: base.yaml\nstages:\n  align:\n  more:\n")
    assert [(one.stage, one.optim.lr) for one in load_recipe(child)][2] == ("more", 1e-4)


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        ("[tun]", "recipes/child.yaml:2: tun is not a stage. Did you mean tune? Known: align, tune"),
        ("[tune, tune]", "recipes/child.yaml:2: the stage tune is listed twice. Remove one"),
        ("[]", "recipes/child.yaml:2: stages is []. It should be a mapping of stages"),
        ("tune", "recipes/child.yaml:2: stages is 'tune'. It should be a mapping of stages"),
        ("[[a]]", "recipes/child.yaml:2: stages is [['a']]. It should be a mapping of stages"),
        ("{align: 5}", "recipes/child.yaml:2: stages.align is 5. It should be a mapping"),
        ("{1x: {}}", "recipes/child.yaml:2: stages.1x is '1x'. It should have the form ^[A-Za-z]"),
        ("{tune: {name: b}}", "recipes/child.yaml:2: stages.tune.name cannot be set here. It belongs"),
        ("{tune: {extends: b}}", "recipes/child.yaml:2: stages.tune.extends cannot be set here. It belongs"),
        (
            "{tune: {optm: {}}}",
            "recipes/child.yaml:2: stages.tune.optm is not a known key. Did you mean optim?",
        ),
    ],
)
def test_wrong_stages_are_named(write: Write, stages: str, fault: str):
    found = faults(write("recipes/child.yaml", f"extends: base.yaml\nstages: {stages}\n"))
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_the_stage_is_not_the_users_to_name(write: Write):
    found = faults(write("recipes/child.yaml", "extends: base.yaml\nstage: x\n"))
    assert found == ["recipes/child.yaml:2: stage cannot be set here. Name stages by the keys under stages"]


# ---------------------------------------------------------------- extends


def test_extends_merges_files_in_order(write: Write):
    write("recipes/more/fast.yaml", "optim: {lr: 5e-4, weight_decay: 0.1}\nrun: {seed: 3}\n")
    child = write(
        "recipes/child.yaml",
        """\
        extends: [base.yaml, more/fast.yaml]
        name: child
        stages: [tune]
        run: {precision: fp32}
        """,
    )
    (recipe,) = load_recipe(child)
    assert (recipe.name, recipe.optim.lr, recipe.optim.weight_decay) == ("child", 5e-4, 0.1)
    assert (recipe.run.seed, recipe.run.precision) == (3, "fp32")


def test_another_projector_drops_the_old_ones_options(write: Write):
    child = write("recipes/child.yaml", "extends: base.yaml\nmodel: {projector: {type: mlp2x}}\n")
    assert load_recipe(child)[0].model.projector == Mlp2xConfig(type="mlp2x")
    assert load_recipe(child, ["model.projector.type=linear"])[0].model.projector == LinearConfig(
        type="linear"
    )


def test_another_schedule_keeps_its_length(write: Write):
    """`schedule.type` is a plain choice, not another kind of mapping."""
    schedule = load_recipe(Path("recipes/base.yaml"), ["schedule.type=constant"])[0].schedule
    assert (schedule.type, schedule.epochs) == ("constant", 1)


def test_a_fault_is_placed_in_the_file_that_wrote_it(write: Write):
    write("recipes/base.yaml", Path("recipes/base.yaml").read_text().replace("batch_size", "batchsize"))
    found = faults(write("recipes/child.yaml", "extends: base.yaml\nrun: {seed: x}\n"))
    assert found[0].startswith(
        "recipes/base.yaml:7: data.chat.batch_size is missing. Samples per optimizer step"
    )
    assert found[1].startswith(
        "recipes/base.yaml:9: data.chat.batchsize is not a known key. Did you mean batch_size?"
    )
    assert found[2] == "recipes/child.yaml:2: run.seed is 'x'. It should be a whole number"
    assert len(found) == 3  # once, although both stages inherit them


def test_a_clash_is_placed_where_it_arose(write: Write):
    found = faults(write("recipes/child.yaml", "extends: base.yaml\nrun: {}\nschedule: {steps: 5}\n"))
    assert found == ["recipes/child.yaml:3: schedule: give exactly one of epochs and steps."]


def test_a_missing_section_is_placed_at_the_recipe_not_at_a_stage_or_override(write: Write):
    text = (
        Path("recipes/base.yaml")
        .read_text()
        .replace("optim: {lr: 1e-4}", "")
        .replace("optim: {lr: 1e-3}", "")
    )
    write("recipes/base.yaml", text)
    (found,) = faults(write("recipes/child.yaml", "# a comment\nextends: base.yaml\n"), "run.seed=1")
    assert found == "recipes/child.yaml:2: optim is missing. AdamW."


def test_extending_in_a_circle_is_refused(write: Write):
    write("recipes/a.yaml", "extends: b.yaml\nname: a\n")
    write("recipes/b.yaml", "name: b\nextends: a.yaml\n")
    (found,) = faults(Path("recipes/a.yaml"))
    circle = "recipes/a.yaml -> recipes/b.yaml -> recipes/a.yaml"
    assert found == f"recipes/b.yaml:2: extends goes round in a circle: {circle}. Break it."


def test_a_base_shared_by_two_is_no_circle(write: Write):
    write("recipes/a.yaml", "extends: base.yaml\n")
    write("recipes/b.yaml", "extends: base.yaml\n")
    assert len(load_recipe(write("recipes/c.yaml", "extends: [a.yaml, b.yaml]\n"))) == 2


def test_a_missing_base_does_not_hide_other_faults_nor_invent_any(write: Write):
    found = faults(write("recipes/child.yaml", "extends: bass.yaml\nrun: {sed: 1}\n"))
    assert (
        found[0]
        == "recipes/child.yaml:1: extends: no file recipes/bass.yaml. Did you mean recipes/base.yaml?"
    )
    assert found[1].startswith("recipes/child.yaml:2: run.sed is not a known key. Did you mean seed?")
    assert len(found) == 2


@pytest.mark.parametrize("extends", ["5", "[base.yaml, [x]]", "''", "{a: b}"])
def test_extends_of_the_wrong_kind_is_refused(write: Write, extends: str):
    found = faults(write("recipes/child.yaml", f"name: x\nextends: {extends}\n"))
    assert "recipes/child.yaml:2: extends" in found[0]
    assert "It should be a path or a list of paths" in found[0]


# ---------------------------------------------------------------- overrides


def test_overrides_reach_every_stage_or_one(write: Write):
    align, tune = load_recipe(
        Path("recipes/base.yaml"), ["run.seed=7", "optim.lr=2e-2", "stages.tune.run.keep=9"]
    )
    assert (align.optim.lr, tune.optim.lr) == (2e-2, 2e-2)  # also over the stage block's own lr
    assert (align.run.seed, tune.run.seed, align.run.keep, tune.run.keep) == (7, 7, 2, 9)


def test_the_later_override_wins(write: Write):
    align, tune = load_recipe(Path("recipes/base.yaml"), ["stages.align.optim.lr=3e-3", "optim.lr=1.0"])
    assert (align.optim.lr, tune.optim.lr) == (1.0, 1.0)
    align, tune = load_recipe(Path("recipes/base.yaml"), ["optim.lr=1.0", "stages.align.optim.lr=3e-3"])
    assert (align.optim.lr, tune.optim.lr) == (3e-3, 1.0)


def test_override_values_are_yaml(write: Write):
    given = [
        "run={seed: 4, trackers: [wandb]}",
        "paper='2310.03744'",
        "schedule.epochs=null",
        "schedule.steps=5",
    ]
    recipe = load_recipe(Path("recipes/base.yaml"), given)[0]
    assert (recipe.run.seed, recipe.run.trackers, recipe.paper) == (4, ("wandb",), "2310.03744")
    assert recipe.schedule.steps == 5


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("run.sede=1", "run.sede is not a known key. Did you mean seed? Known: dir, seed,"),
        ("optm.lr=1", "optm is not a known key. Did you mean optim? Known: name,"),
        ("run.seed=x", "run.seed is 'x'. It should be a whole number"),
        ("run.precision=bf61", "run.precision is 'bf61'. Did you mean bf16? Known: fp32, bf16"),
        ("stages.algn.run.seed=1", "algn is not a stage. Did you mean align? Known: align, tune"),
        ("stages=[tunes]", "tunes is not a stage. Did you mean tune? Known: align, tune"),
        ("run.seed", "not an override. Write key=value, for example run.seed=1"),
        ("=1", "not an override. Write key=value"),
        ("run..seed=1", "not an override. Write key=value"),
        ("run.seed=[", "not valid YAML: while parsing a flow node, expected the node content"),
        ("extends=x.yaml", "extends cannot be set here. Set it in the recipe file"),
        ("stage=x", "stage cannot be set here."),
        ("run.seed.x=1", "run.seed is {'x': 1}. It should be a whole number"),
        (
            "data.chat.mix=data_mixes/eazy.yaml",
            "data.chat.mix: no file 'data_mixes/eazy.yaml'. Did you mean data_",
        ),
    ],
)
def test_wrong_overrides_are_named(write: Write, override: str, fault: str):
    found = faults(Path("recipes/base.yaml"), override)
    assert len(found) == 1
    assert found[0].startswith(f"command line: {override}: {fault}")


# ---------------------------------------------------------------- renamed keys


def test_a_renamed_key_tells_its_new_name(write: Write, monkeypatch: pytest.MonkeyPatch):
    moved = {"optim.learning_rate": ("optim.lr", "0.2"), "trainer.seed": ("run.seed", "0.3")}
    monkeypatch.setattr(loader, "RENAMED", moved)
    text = Path("recipes/base.yaml").read_text().replace("optim: {lr: 1e-4}", "optim: {learning_rate: 1e-4}")
    found = faults(write("recipes/base.yaml", f"{text}trainer:\n  seed: 1\n"))
    assert (
        found[0]
        == "recipes/base.yaml:10: optim.learning_rate is called optim.lr since version 0.2. Rename the key."
    )
    assert (
        found[1] == "recipes/base.yaml:19: trainer.seed is called run.seed since version 0.3. Rename the key."
    )
    assert len(found) == 2  # neither "not a known key" nor "optim.lr is missing" besides


def test_no_new_name_is_itself_unknown():
    for new, _ in loader.RENAMED.values():
        assert new.split(".")[0] in Recipe.model_fields


# ---------------------------------------------------------------- across fields


def test_the_mix_is_found_from_anywhere(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_recipe(Path("recipes/base.yaml"))[0].data.chat.mix == "data_mixes/easy.yaml"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load_recipe(tmp_path / "recipes/base.yaml")[0].data.chat.mix
    assert found == str(tmp_path / "data_mixes/easy.yaml")


def test_the_working_directory_comes_before_the_recipes_folder(write: Write):
    write("recipes/data_mixes/easy.yaml", "sources: []\n")
    assert load_recipe(Path("recipes/base.yaml"))[0].data.chat.mix == "data_mixes/easy.yaml"


def test_a_base_finds_the_mix_beside_itself(write: Write):
    write("lib/part.yaml", "data: {chat: {mix: own.yaml}}\n")
    write("lib/own.yaml", "sources: [{name: own, format: easy_vqa}]\n")
    child = write("recipes/child.yaml", "extends: [base.yaml, ../lib/part.yaml]\n")
    assert load_recipe(child)[0].data.chat.mix == "lib/own.yaml"


def test_the_mixes_faults_are_in_the_same_report(write: Write):
    write(
        "data_mixes/easy.yaml", "sources:\n  - {name: a, format: easy_vqa}\n  - {name: b, format: eazy_vqa}\n"
    )
    found = faults(
        write("recipes/child.yaml", "extends: base.yaml\nevaluation: {mix: gone.yaml}\nrun: {seed: -1}\n")
    )
    assert found[0].startswith(
        "data_mixes/easy.yaml:3: sources.1.format is 'eazy_vqa', which is not known. Did you mean easy_vqa?"
    )
    assert found[1] == "recipes/child.yaml:2: evaluation.mix: no file 'gone.yaml'. Check the path."
    assert found[2] == "recipes/child.yaml:3: run.seed is -1. It should be greater than or equal to 0"
    assert len(found) == 3


def test_the_objective_needs_its_stream(write: Write):
    (found,) = faults(write("recipes/child.yaml", "extends: base.yaml\ndata: {chat: null}\n"))
    assert found.startswith(
        "recipes/child.yaml:2: objective next_token reads the stream data.chat, which is not"
    )
    custom = load_recipe(Path("recipes/child.yaml"), ["objective={type: my.Loss, weight: 1}"])[0]
    assert custom.objective.type == "my.Loss"


def test_a_misspelt_stream_is_told_once(write: Write):
    text = Path("recipes/base.yaml").read_text().replace("chat:", "chta:")
    (found,) = faults(write("recipes/base.yaml", text))
    assert found.startswith("recipes/base.yaml:7: data.chta is not a known key. Did you mean chat?")


# ---------------------------------------------------------------- files that are no recipes


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "recipes/x.yaml:1: a recipe is a mapping, not empty"),
        ("- a\n- b\n", "recipes/x.yaml:1: a recipe is a mapping, not ['a', 'b']"),
        ("\n\njust text\n", "recipes/x.yaml:3: a recipe is a mapping, not 'just text'"),
        ("name: x\nmodel: {\n", "recipes/x.yaml:3: not valid YAML"),
        ("name: x\nname: y\n", "recipes/x.yaml:2: name is given twice. The first is at recipes/x.yaml:1"),
    ],
)
def test_files_that_are_no_recipes(write: Write, text: str, fault: str):
    assert faults(write("recipes/x.yaml", text))[0].startswith(fault)


def test_a_missing_recipe_names_its_neighbour(write: Write):
    (found,) = faults(Path("recipes/bse.yaml"))
    assert (
        found
        == "recipes/bse.yaml: cannot be read: No such file or directory. Did you mean recipes/base.yaml?"
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("sources: []\n", "m.yaml:1: sources is []. It should have at least 1 item"),
        ("- a\n", "m.yaml:1: a mix is a mapping, not ['a']"),
        ("sources:\n- llava_json\n", "m.yaml:2: sources.0 is 'llava_json'. Write {format: llava_json}"),
        (
            "sources:\n- {name: a}\n",
            "m.yaml:2: sources.0.format is missing. Known: llava_json, chat_jsonl, hf_dataset",
        ),
        ("sources:\n- {name: a, format: llava_json}\n", "m.yaml:2: sources.0.path is missing"),
        (
            "sources:\n- name: a\n  format: hf_dataset\n  path: p\n  columns: {imagse: x}\n",
            "m.yaml:5: sources.0.columns.imagse is not a known key. Did you mean images? Known: images",
        ),
        (
            "sources:\n- {name: a, format: easy_vqa}\n- {name: a, format: easy_vqa}\n",
            "m.yaml:1: the file: two sources have the same name; sample keys would clash",
        ),
        (
            "sources:\n- {name: a, format: easy_vqa, weight: 1, count: 2}\n",
            "m.yaml:2: sources.0: give weight or count, not both",
        ),
    ],
)
def test_faults_of_a_mix(write: Write, text: str, fault: str):
    with pytest.raises(RecipeError) as caught:
        load_mix(write("m.yaml", text))
    assert str(caught.value).startswith(fault)


def test_a_mix_is_read(write: Write):
    mix = load_mix(Path("data_mixes/easy.yaml"))
    assert [(source.name, source.format) for source in mix.sources] == [("easy", "easy_vqa")]
