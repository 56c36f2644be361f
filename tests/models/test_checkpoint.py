"""Saving and opening: bit-equal, strict, in every layout of names, and never running a folder's code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from tests.tiny import LANGUAGES, PROJECTORS, TOWERS, tiny_model
from vlmtune.errors import CheckpointError
from vlmtune.models.build import load_model, weights_digest
from vlmtune.models.vlm import VLM, VLMConfig


def save(folder: Path, **parts: object) -> VLM:
    model, processor = tiny_model(**parts)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def test_the_tokenizer_is_the_same(tmp_path) -> None:
    """AutoTokenizer picks a class by the language model's type (Qwen2's splits otherwise)."""
    save(tmp_path, language="qwen2")
    text = "<s>  A red <image>\ncircle, 2024!</s>"
    before = tiny_model(language="qwen2")[1].tokenizer
    after = load_model(tmp_path)[1].tokenizer
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.special_tokens_map == before.special_tokens_map
    assert after.padding_side == "left"


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def equal_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("tower", TOWERS)
def test_round_trip_is_bit_equal(tmp_path, tower: str, projector: str, language: str, tied: bool) -> None:
    model = save(tmp_path, tower=tower, projector=projector, language=language, tied=tied)
    again, _ = load_model(tmp_path)
    assert isinstance(again, VLM)
    assert equal_weights(model, again)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert again.config.projector == model.config.projector
    ids = torch.full((1, model.config.image_seq_length + 3), model.config.image_token_id)
    ids[:, :3] = torch.arange(4, 7)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_auto_class_opens_our_folder(tmp_path) -> None:
    model = save(tmp_path, projector="resampler")
    assert equal_weights(model, AutoModelForImageTextToText.from_pretrained(tmp_path))


def v4_hub_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As llava-hf/* on the hub: one more level in the tower, and buffers that old versions saved."""
    renamed = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", k): v for k, v in weights.items()}
    positions = torch.arange(17)[None]
    return renamed | {"vision_tower.vision_model.embeddings.position_ids": positions}


def in_memory_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As state_dict(), zero_to_fp32.py and transformers 4.52 write them."""
    rules = (
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model", "model.language_model"),
        (r"^(vision_tower|multi_modal_projector)", r"model.\1"),
    )
    for pattern, new in rules:
        weights = {re.sub(pattern, new, name): weight for name, weight in weights.items()}
    return weights


@pytest.mark.parametrize("layout", [v4_hub_names, in_memory_names])
def test_every_layout_of_names_is_read(tmp_path, layout) -> None:
    model = save(tmp_path)
    edit_weights(tmp_path, layout)
    assert equal_weights(model, load_model(tmp_path)[0])


def test_a_stock_llava_is_read_as_mlp2x(tmp_path) -> None:
    model = save(tmp_path)
    stock_config = {k: v for k, v in model.config.to_dict().items() if k not in ("projector", "model_type")}
    stock = LlavaForConditionalGeneration(LlavaConfig(**stock_config)).eval()
    stock.load_state_dict(model.state_dict())
    stock.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava"
    again, processor = load_model(tmp_path)
    assert again.config.projector == {"type": "mlp2x"}
    assert equal_weights(again, stock)
    inputs = processor(images=[torch.zeros(3, 40, 60)], text="<image> hello", return_tensors="pt")
    torch.testing.assert_close(again(**inputs).logits, stock(**inputs).logits)


def test_a_stock_config_over_another_projector(tmp_path) -> None:
    """transformers itself leaves the swapped projector random, with a printed notice."""
    save(tmp_path, projector="resampler")
    edit_json(tmp_path / "config.json", model_type="llava", projector=None)
    with pytest.raises(CheckpointError, match=r"missing \(model.multi_modal_projector.*unexpected"):
        load_model(tmp_path)


def test_missing_weights_are_never_random(tmp_path) -> None:
    save(tmp_path)
    edit_weights(tmp_path, lambda w: {k: v for k, v in w.items() if "vision_tower" not in k})
    with pytest.raises(CheckpointError, match=r"missing \(model.vision_tower"):
        load_model(tmp_path)


def test_unexpected_weights_are_never_dropped(tmp_path) -> None:
    save(tmp_path)
    edit_weights(tmp_path, lambda w: w | {"lora_a.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(lora_a.weight\)"):
        load_model(tmp_path)


def test_weights_of_another_shape(tmp_path) -> None:
    save(tmp_path)
    edit_weights(tmp_path, lambda w: w | {"multi_modal_projector.linear_2.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"1 of another shape .*linear_2\.bias"):
        load_model(tmp_path)


def test_only_safetensors_are_opened(tmp_path) -> None:
    model = save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_model(tmp_path)


def test_a_folders_code_does_not_run(tmp_path) -> None:
    save(tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "planted.py").write_text(f"open({str(marker)!r}, 'w')\nclass Thing: pass\n")
    auto_map = {"AutoConfig": "planted.Thing", "AutoModelForImageTextToText": "planted.Thing"}
    edit_json(tmp_path / "config.json", auto_map=auto_map)
    load_model(tmp_path)
    edit_json(tmp_path / "config.json", auto_map=auto_map, model_type="planted")
    with pytest.raises(CheckpointError):
        load_model(tmp_path)
    assert not marker.exists()


def test_a_hub_model_that_is_not_here() -> None:
    with pytest.raises(CheckpointError, match=r"(?s)llava-hf/nothing-7b.*download the hub model first"):
        load_model("llava-hf/nothing-7b")


def test_another_kind_of_model(tmp_path) -> None:
    model, _ = tiny_model()
    model.model.language_model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the model is a 'llama'"):
        load_model(tmp_path)


def test_processor_and_weights_of_different_models(tmp_path) -> None:
    save(tmp_path)
    _, other = tiny_model(template="llama3")
    other.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="come from different models"):
        load_model(tmp_path)


def test_pixels_of_another_size(tmp_path) -> None:
    save(tmp_path)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"] |= {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"\(40, 40\) pixels, the tower takes \(32, 32\)"):
        load_model(tmp_path)


def test_old_processors_without_counts_are_completed(tmp_path) -> None:
    """llava-hf processors of before 4.46 have no patch_size, and count no image tokens."""
    save(tmp_path)
    edit_json(tmp_path / "processor_config.json", patch_size=None, num_additional_image_tokens=0)
    _, processor = load_model(tmp_path)
    ids = processor(images=[torch.zeros(3, 40, 60)], text="<image>", return_tensors="pt")["input_ids"]
    assert (ids == processor.image_token_id).sum() == 16


def test_dtype_is_the_saved_one_or_the_asked_one(tmp_path) -> None:
    model, processor = tiny_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.bfloat16
    assert load_model(tmp_path, torch.float32)[0].dtype == torch.float32


def test_models_never_share_a_config() -> None:
    config = VLMConfig(**tiny_model()[0].config.to_dict())
    first, second = VLM(config), VLM(config)
    first.config.text_config.use_cache = False
    assert second.config.text_config.use_cache and config.text_config.use_cache
    assert first.config.text_config is first.model.language_model.config


def test_digest_changes_with_a_weight(tmp_path) -> None:
    save(tmp_path)
    before = weights_digest(tmp_path)
    assert before == weights_digest(tmp_path)
    edit_weights(tmp_path, lambda w: w | {"multi_modal_projector.linear_2.bias": torch.ones(64)})
    assert weights_digest(tmp_path) != before
    with pytest.raises(CheckpointError, match="no safetensors"):
        weights_digest(tmp_path / "nothing")
