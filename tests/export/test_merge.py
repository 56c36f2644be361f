"""A step folder with adapters becomes a folder that stock transformers opens, with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from tests.models.adapted import adapted, answers, distance, save, shake, tuning
from tests.tiny import tiny_model
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.evaluation.generate import open_model
from vlmtune.export.hf import export_model
from vlmtune.export.merge import merge_adapters
from vlmtune.export.probe import probe_batch
from vlmtune.models.adapters import merged_weight


def step(folder: Path, config, **model):
    """The model of a step folder with adapters, as after a training."""
    made, processor = adapted(config, **model)
    shake(made)
    save(made, processor, folder / "model")
    (folder / "manifest.json").write_text(json.dumps({"kind": "step", "step": 3, "recipe": "tiny"}))
    return made, processor


@pytest.mark.parametrize(
    ("mode", "tower", "tied"), [("lora", "clip", False), ("dora", "siglip", True), ("qlora", "clip", True)]
)
def test_the_merged_folder_is_the_model_with_its_adapters(
    tmp_path: Path, mode: str, tower: str, tied: bool
) -> None:
    """LLaVA#462 #1581: the merge was another model. ms-swift#9187, peft#2647: it lost the fully tuned tower."""
    config = tuning(
        vision={"mode": "full"}, projector={"mode": "lora", "rank": 2}, language={"mode": mode, "rank": 4}
    )
    model, processor = step(tmp_path / "step", config, tower=tower, tied=tied)
    report = merge_adapters(tmp_path / "step", tmp_path / "out")
    assert report.difference.largest <= 1e-4 and report.stock

    reopened = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(reopened) is LlavaForConditionalGeneration
    assert distance(answers(reopened, processor), answers(model, processor)) <= 1e-4
    ours = {name: weight for name, weight in model.named_parameters() if "vision_tower" in name}
    theirs = reopened.state_dict()
    assert ours and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())

    plain = tiny_model(tower=tower, tied=tied)
    base = export_model(*plain, tmp_path / "base", None, probe_batch(*plain), {}).path
    names, expected = (load_file(folder / "model.safetensors").keys() for folder in (tmp_path / "out", base))
    assert names == expected


def test_the_manifest_and_the_card_say_what_was_merged(tmp_path: Path) -> None:
    config = tuning(vision={"mode": "lora", "rank": 2}, language={"mode": "qlora", "rank": 4, "alpha": 6})
    step(tmp_path / "step", config)
    report = merge_adapters(tmp_path / "step", tmp_path / "out", "bfloat16", {"mixes": ["toy"]})
    assert report.difference.largest > 1e-4  # what bfloat16 costs
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    said = {
        "vision": "Lora of rank 2, alpha 4",
        "language": "Qlora of rank 4, alpha 6; the weights are the 4-bit ones it was trained on, dequantised",
    }
    assert manifest["adapters"] == said and manifest["mixes"] == ["toy"] and manifest["step"] == 3
    assert manifest["largest_logit_difference"] == report.difference.largest
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"{part}: {text}" in card for part, text in said.items())


def test_qlora_is_merged_into_the_weights_it_was_trained_on(tmp_path: Path) -> None:
    """Into the unquantised base it would be another model."""
    from bitsandbytes.functional import dequantize_4bit

    model, _ = step(tmp_path / "step", tuning(language={"mode": "qlora", "rank": 4}))
    merge_adapters(tmp_path / "step", tmp_path / "out")
    layer = model.model.language_model.layers[0].self_attn.v_proj
    four_bits = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    found = found["language_model.model.layers.0.self_attn.v_proj.weight"]
    torch.testing.assert_close(found, four_bits + update)
    torch.testing.assert_close(found, merged_weight(layer))


def test_a_step_folder_with_adapters_opens_for_questions(tmp_path: Path) -> None:
    model, processor = step(tmp_path / "step", tuning(language={"mode": "dora", "rank": 4}))
    opened, other = open_model(str(tmp_path / "step"))
    assert distance(answers(opened, other), answers(model, processor)) == 0.0


def test_what_holds_no_adapters_is_refused(tmp_path: Path) -> None:
    model, processor = tiny_model()
    save(model, processor, tmp_path / "step" / "model")
    with pytest.raises(CheckpointError, match=r"no adapters to merge.*Use vlmtune export"):
        merge_adapters(tmp_path / "step", tmp_path / "out")
    with pytest.raises(RecipeError, match="int3"):
        merge_adapters(tmp_path / "step", tmp_path / "out", "int3")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_is_another_model_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    step(tmp_path / "step", tuning(language={"mode": "lora", "rank": 4}))

    def wrong(layer):
        return 1.1 * merged_weight(layer)

    monkeypatch.setattr("vlmtune.models.adapters.merged_weight", wrong)
    with pytest.raises(CheckpointError, match="differ"):
        merge_adapters(tmp_path / "step", tmp_path / "out")
    assert not (tmp_path / "out").exists()
