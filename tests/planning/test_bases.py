"""Shipped configs have the published sizes; what is not known is an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from tests.tiny import TEXTS, template_text, tiny_config
from vlmtune.config.loader import load_recipe
from vlmtune.config.schema import ModelConfig
from vlmtune.errors import RecipeError
from vlmtune.models.build import build_model
from vlmtune.models.towers import config_from
from vlmtune.models.vlm import VLM, VLMConfig
from vlmtune.planning.bases import model_config, shipped

PUBLISHED = {
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "lmsys/vicuna-13b-v1.5": 13_015_864_320,
    "Qwen/Qwen2-7B-Instruct": 7_615_616_512,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "openai/clip-vit-large-patch14-336": 303_507_456,
    "google/siglip-so400m-patch14-384": 428_225_600,
    "google/siglip2-base-patch16-224": 92_884_224,
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
}


def weights_of(config: VLMConfig) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in VLM(config).parameters())


@pytest.mark.parametrize("name", shipped())
def test_shipped_shapes_have_the_published_number_of_weights(name: str) -> None:
    shape = shipped()[name]
    assert shape["parameters"] == PUBLISHED.get(name, shape["parameters"])
    if "vision" in shape:
        found = weights_of(model_config(ModelConfig(checkpoint=name), Path()))
    else:
        config = config_from(shape["config"], "")
        with torch.device("meta"):
            model = (AutoModelForCausalLM if "tokenizer" in shape else AutoModel).from_config(config)
        found = sum(weight.numel() for weight in model.parameters())
    assert found == shape["parameters"]
    assert len(shipped()) >= 15


def test_a_run_that_does_not_exist_yet_is_read_off_its_recipe() -> None:
    folder = Path("recipes/llava15")
    (recipe,) = load_recipe(folder / "finetune_7b.yaml")
    assert not Path(recipe.model.checkpoint).exists()
    config = model_config(recipe.model, folder)
    assert (config.text_config.vocab_size, config.image_seq_length) == (32064, 576)
    assert weights_of(config) == PUBLISHED["llava-hf/llava-1.5-7b-hf"]


def test_a_model_from_scratch_and_its_folder_are_planned_as_they_are_built(tmp_path: Path) -> None:
    config = tiny_config("siglip2")
    model, processor = build_model(config, 0, template_text("vicuna_v1"), lambda: TEXTS)
    built = sum(weight.numel() for weight in model.parameters())
    model.save_pretrained(tmp_path)
    assert weights_of(model_config(ModelConfig(checkpoint=str(tmp_path)), tmp_path)) == built
    rows = 512 - len(processor.tokenizer)  # a new tokenizer may stay below the size it is given
    planned = model_config(config, tmp_path)
    assert weights_of(planned) == built + 2 * rows * planned.text_config.hidden_size


@pytest.mark.parametrize("checkpoint", ["runs/nobody/export", "somebody/unheard-of"])
def test_an_unknown_base_names_the_known_ones(checkpoint: str) -> None:
    with pytest.raises(RecipeError, match=r"model.checkpoint: the sizes of .* lmsys/vicuna-7b-v1.5"):
        model_config(ModelConfig(checkpoint=checkpoint), Path("recipes/llava15"))
