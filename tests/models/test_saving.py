"""A checkpoint holds all that was trained, and opens only on the base it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.adapted import FROZEN, adapted, answers, distance, save, shake, tuning
from tests.models.test_build import parts, save_language, save_tower
from tests.tiny import template_text, tiny_model
from vlmtune.config.schema import ModelConfig
from vlmtune.config.tuning import TuningConfig
from vlmtune.errors import CheckpointError
from vlmtune.export.merge import merge_adapters
from vlmtune.models.adapters import adapt
from vlmtune.models.build import build_model, load_model, weights_digest
from vlmtune.models.saving import TRAINED_FILE, saved_names
from vlmtune.models.tuning import apply_tuning, is_adapter, part_of
from vlmtune.models.vlm import VLM

VICUNA = template_text("vicuna_v1")
LORA = {"mode": "lora", "rank": 4}
MIXED = tuning(vision=LORA, projector={"mode": "full"}, language={"mode": "dora", "rank": 3})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model on disk, as a first stage leaves it."""
    folder = tmp_path_factory.mktemp("saving") / "base"
    model, processor = tiny_model(seed=5)
    save(model, processor, folder)
    return folder


def tuned(config: TuningConfig, checkpoint: Path, trained: bool = True) -> tuple[VLM, object]:
    """A model on the base in `checkpoint`, with weights as after a training."""
    model, processor = build_model(ModelConfig(checkpoint=str(checkpoint)), 3, VICUNA)
    adapt(model, config, 3)
    apply_tuning(model, config)
    if trained:
        shake(model)
    return model, processor


def assert_same(a: VLM, b: VLM) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def edit(folder: Path, change) -> None:
    """Writes adapters.json or trained.safetensors again, changed."""
    weights = load_file(folder / TRAINED_FILE)
    save_file(change(weights), folder / TRAINED_FILE)


# ---------------------------------------------------------------- what is in it


def test_without_adapters_everything_is_saved(tmp_path: Path) -> None:
    model, processor = tiny_model(tied=True)
    assert set(saved_names(model)) == model.state_dict().keys()
    save(model, processor, tmp_path)
    assert not (tmp_path / "adapters.json").exists()
    again, _ = load_model(tmp_path)
    assert_same(again, model)


def test_all_that_was_trained_is_saved_and_nothing_else(tmp_path: Path, base: Path) -> None:
    """LLaVA#1200 #808, Qwen2-VL-Finetune#231: checkpoints held adapters only, the projector was lost."""
    model, processor = tuned(MIXED, base)
    save(model, processor, tmp_path)
    names = load_file(tmp_path / TRAINED_FILE).keys()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and names == trained
    assert {part_of(name) for name in names} == {"vision", "projector", "language"}
    assert all(is_adapter(name) for name in names if part_of(name) != "projector")
    assert not list(tmp_path.glob("model*.safetensors"))


def test_a_part_trained_whole_is_saved_whole(tmp_path: Path, base: Path) -> None:
    """NeXT#345, LLaVA#1694 #1533: the tower was read again from its hub name, its training lost."""
    config = tuning(vision={"mode": "full"}, language=LORA)
    model, processor = tuned(config, base)
    save(model, processor, tmp_path)
    tower = {name for name in model.state_dict() if part_of(name) == "vision"}
    assert {name for name in load_file(tmp_path / TRAINED_FILE) if part_of(name) == "vision"} == tower
    again, _ = load_model(tmp_path)
    assert_same(again, model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_saved_once(tmp_path: Path, tied: bool) -> None:
    model, processor = adapted(tuning(vision=LORA, language={"mode": "full"}), tied=tied)
    shake(model)
    save(model, processor, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / TRAINED_FILE)) != tied
    again, _ = load_model(tmp_path)
    assert_same(again, model)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied


def test_the_description_says_what_and_on_which_base(tmp_path: Path, base: Path) -> None:
    model, processor = tuned(MIXED, base)
    save(model, processor, tmp_path)
    said = json.loads((tmp_path / "adapters.json").read_text())
    assert {part: each["mode"] for part, each in said["tuning"].items()} == {
        "vision": "lora",
        "projector": "full",
        "language": "dora",
    }
    assert "layers.1.mlp.up_proj" in said["tuning"]["language"]["targets"]
    assert said["base"]["model"]["checkpoint"] == str(base)
    assert said["base"]["seed"] == 3 and said["base"]["sha256"] == {"checkpoint": weights_digest(base)}


# ---------------------------------------------------------------- coming back


@pytest.mark.parametrize("mode", ["lora", "dora", "qlora"])
def test_a_reload_is_bit_equal(tmp_path: Path, base: Path, mode: str) -> None:
    model, processor = tuned(
        tuning(projector={"mode": "full"}, language={"mode": mode, "rank": 4, "targets": ["*.v_proj"]}), base
    )
    save(model, processor, tmp_path)
    again, other = load_model(tmp_path)
    assert_same(again, model)
    assert distance(answers(again, other), answers(model, processor)) == 0.0
    assert not again.training and again.adaptation == model.adaptation
    assert other.chat_template == processor.chat_template


def test_a_model_of_pretrained_parts_is_built_again(tmp_path: Path) -> None:
    """The projector was never saved with the base: it comes back from the seed, the new tokens' rows too."""
    save_tower(tmp_path / "tower")
    save_language(tmp_path / "language")
    model, processor = build_model(parts(tmp_path), 7, VICUNA)
    config = tuning(language=LORA)
    adapt(model, config, 7)
    apply_tuning(model, config)
    shake(model)
    save(model, processor, tmp_path / "step")
    said = json.loads((tmp_path / "step" / "adapters.json").read_text())["base"]["sha256"]
    assert said["vision"] == weights_digest(tmp_path / "tower") and set(said) == {
        "vision",
        "projector",
        "language",
    }
    torch.manual_seed(99)
    again, other = load_model(tmp_path / "step")
    assert_same(again, model)
    assert len(other.tokenizer) == len(processor.tokenizer)


def test_a_model_from_scratch_with_its_own_tokenizer_is_built_again(tmp_path: Path) -> None:
    model, processor = adapted(MIXED)
    shake(model)
    save(model, processor, tmp_path)
    again, other = load_model(tmp_path)
    assert_same(again, model)
    text = "Is there a red <image> circle?"
    assert other.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


def test_a_run_folder_can_be_moved(tmp_path: Path, base: Path) -> None:
    shutil.copytree(base, tmp_path / "run" / "first")
    model, processor = tuned(MIXED, tmp_path / "run" / "first")
    save(model, processor, tmp_path / "run" / "second")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    again, _ = load_model(tmp_path / "elsewhere" / "second")
    assert_same(again, model)


def test_the_next_stage_starts_from_merged_weights(tmp_path: Path, base: Path, caplog) -> None:
    model, processor = tuned(MIXED, base)
    save(model, processor, tmp_path / "one")
    expected = answers(model, processor)
    with caplog.at_level("INFO"):
        second, other = tuned(tuning(language={"mode": "lora", "rank": 2}), tmp_path / "one", trained=False)
    assert "merged into the weights" in caplog.text
    assert distance(answers(second, other), expected) <= 1e-5
    shake(second)
    save(second, other, tmp_path / "two")
    again, _ = load_model(tmp_path / "two")
    assert_same(again, second)
    edit(tmp_path / "one", lambda weights: {name: 2 * weight for name, weight in weights.items()})
    with pytest.raises(CheckpointError, match="another base: checkpoint differs"):
        load_model(tmp_path / "two")


def test_the_tower_of_a_model_with_adapters_is_a_plain_tower(tmp_path: Path, base: Path) -> None:
    model, processor = tuned(MIXED, base)
    save(model, processor, tmp_path / "step")
    save_language(tmp_path / "language")
    grafted, _ = build_model(parts(tmp_path, vision={"path": str(tmp_path / "step")}), 0, VICUNA)
    names = grafted.model.vision_tower.state_dict().keys()
    assert names == tiny_model()[0].model.vision_tower.state_dict().keys()
    pixels = torch.randn(2, 3, 32, 32)
    ours, theirs = (each.model.vision_tower(pixels).last_hidden_state for each in (grafted, model))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "config",
    [
        tuning(projector={"mode": "full"}, language={"mode": "qlora", "rank": 4}),
        tuning(vision={"mode": "full"}, projector={"mode": "lora", "rank": 2}),
    ],
    ids=["projector", "tower"],
)
def test_what_learns_on_a_bfloat16_base_is_float32(tmp_path: Path, base: Path, config: TuningConfig) -> None:
    """Adam at 2e-5 cannot move a bfloat16 weight: the projector beside LoRA would never learn."""
    model, processor = build_model(ModelConfig(checkpoint=str(base), dtype="bfloat16"), 3, VICUNA)
    adapt(model, config, 3)
    apply_tuning(model, config)
    types = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    assert types == {torch.float32}
    assert any(weight.dtype == torch.bfloat16 for weight in model.parameters())
    shake(model)
    save(model, processor, tmp_path / "model")
    again, other = load_model(tmp_path / "model")
    assert_same(again, model)
    assert distance(answers(again, other), answers(model, processor)) == 0.0
    report = merge_adapters(tmp_path, tmp_path / "out")
    assert report.difference.largest <= 0.05 * max(
        float(each.abs().max()) for each in answers(model, processor)
    )
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {weight.dtype for weight in stored} == {torch.bfloat16}


# ---------------------------------------------------------------- what is refused


def test_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    model, processor = tuned(MIXED, copy)
    save(model, processor, tmp_path / "step")
    other, _ = tiny_model(seed=6)
    other.save_pretrained(copy)
    with pytest.raises(CheckpointError, match="trained on another base: checkpoint differs"):
        load_model(tmp_path / "step")
    shutil.rmtree(copy)
    with pytest.raises(CheckpointError, match=r"base model of these adapters is gone: .*base"):
        load_model(tmp_path / "step")


def test_other_fresh_weights_are_refused(tmp_path: Path) -> None:
    """Another machine or torch may draw others from the same seed."""
    model, processor = adapted(tuning(language=LORA))
    save(model, processor, tmp_path)
    path = tmp_path / "adapters.json"
    said = json.loads(path.read_text())
    said["base"]["seed"] = 1
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="another base: vision, projector, language differs"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: {k: v for k, v in w.items() if "lora_A" not in k}, r"\d+ missing \(.*lora_A"),
        (lambda w: w | {"extra.weight": torch.zeros(1)}, r"1 unexpected \(extra.weight\)"),
        (lambda w: {k: torch.zeros(1) for k in w}, r"\d+ of another shape"),
    ],
)
def test_loading_is_strict(tmp_path: Path, base: Path, change, fault: str) -> None:
    """LLaVA#462: `strict=False` left adapters out without a word."""
    model, processor = tuned(tuning(language=LORA), base)
    save(model, processor, tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=fault):
        load_model(tmp_path)


def test_a_folder_imports_nothing_and_trusts_nobody(tmp_path: Path, base: Path) -> None:
    model, processor = tuned(tuning(projector={"mode": "full"}, language=LORA, vision=FROZEN), base)
    save(model, processor, tmp_path / "step")
    marker = tmp_path / "ran"
    (tmp_path / "planted_projector.py").write_text(f"open({str(marker)!r}, 'w')\n")
    path = tmp_path / "step" / "adapters.json"
    said = json.loads(path.read_text())
    said["base"]["model"] |= {"projector": {"type": "planted_projector.Thing"}, "trust_remote_code": True}
    path.write_text(json.dumps(said))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        again, _ = load_model(tmp_path / "step")
    assert not marker.exists() and again.origin is not None
    assert again.origin.config.trust_remote_code is False
