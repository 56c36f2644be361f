"""The three sources of a model: saved parts, a checkpoint, and nothing but a config and a seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Siglip2Config,
    Siglip2ImageProcessorPil,
)
from transformers.models.siglip2 import Siglip2Model

from tests.tiny import LANGUAGES, TEXTS, TOWERS, template_text, tiny_config, tiny_model
from vlmtune.config.schema import ModelConfig
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.build import build_model
from vlmtune.models.tokenizer import train_tokenizer
from vlmtune.models.towers import config_from, fixed_grid

VICUNA = template_text("vicuna_v1")
SMALL_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_tower(folder: Path, tower: str = "clip"):
    model = AutoModel.from_config(config_from(TOWERS[tower], "test")).eval()
    model.save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return model


def save_language(folder: Path, language: str = "llama", tied: bool = False):
    """512 rows, and a tokenizer as most on the hub: without image and padding tokens."""
    options = LANGUAGES[language] | {"tie_word_embeddings": tied, "vocab_size": 512}
    model = AutoModelForCausalLM.from_config(config_from(options, "test")).eval()
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(TEXTS, 512, VICUNA)
    tokenizer.add_tokens([f"word{i}" for i in range(512 - len(tokenizer))])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<image>"', '"<unused0>"').replace('"<pad>"', '"<unused1>"'))
    return model


def parts(tmp_path: Path, **changes: object) -> ModelConfig:
    whole = {
        "vision": {"path": str(tmp_path / "tower")},
        "projector": {"type": "mlp2x"},
        "language": {"path": str(tmp_path / "language")},
    }
    return ModelConfig.model_validate(whole | changes)


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    left, right = found.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_parts_keep_their_weights(tmp_path, tower: str, language: str, tied: bool) -> None:
    saved_tower = save_tower(tmp_path / "tower", tower)
    saved_language = save_language(tmp_path / "language", language, tied)
    model, processor = build_model(parts(tmp_path), 0, VICUNA)
    assert_same_weights(model.model.vision_tower, saved_tower)
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight
    assert (head is embedding) == tied == model.config.tie_word_embeddings

    assert head.shape[0] == 576 >= len(processor.tokenizer) > 512
    assert model.config.text_config.vocab_size == 576
    for part in (model.model.vision_tower, model.model.language_model):
        assert part.config._attn_implementation == "sdpa"
    old = saved_language.get_input_embeddings().weight
    assert torch.equal(embedding[:512], old)
    torch.testing.assert_close(embedding[512:], old.mean(dim=0).expand(64, -1))
    ids = torch.arange(9)[None]
    expected = saved_language(ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits[..., :512], expected)


def test_the_vision_half_of_a_dual_encoder(tmp_path) -> None:
    config = CLIPConfig(vision_config=TOWERS["clip"], text_config=SMALL_TEXT | {"vocab_size": 99})
    both = CLIPModel(config).eval()
    both.save_pretrained(tmp_path / "tower")
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "tower")
    save_language(tmp_path / "language")
    model, processor = build_model(parts(tmp_path), 0, VICUNA)
    assert_same_weights(model.model.vision_tower, both.vision_model)
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert model.config.vision_config.model_type == "clip_vision_model"


@pytest.mark.parametrize("image_size", [None, 48])
def test_siglip2_becomes_a_fixed_grid(tmp_path, image_size: int | None) -> None:
    text = SMALL_TEXT | {"vocab_size": 99, "projection_size": 32}
    both = Siglip2Model(Siglip2Config(vision_config=TOWERS["siglip2"], text_config=text)).eval()
    both.save_pretrained(tmp_path / "tower")
    Siglip2ImageProcessorPil().save_pretrained(tmp_path / "tower")
    save_language(tmp_path / "language")
    vision = {"path": str(tmp_path / "tower"), "image_size": image_size}
    model, processor = build_model(parts(tmp_path, vision=vision), 0, VICUNA)
    assert_same_weights(model.model.vision_tower, fixed_grid(both.vision_model, image_size))
    assert processor.image_processor.crop_size.height == (image_size or 32)


def test_a_tower_without_weights_is_never_random(tmp_path) -> None:
    save_language(tmp_path / "tower")
    save_language(tmp_path / "language")
    with pytest.raises(CheckpointError, match="no vision tower family 'llama'"):
        build_model(parts(tmp_path), 0, VICUNA)


def test_a_language_model_with_its_own_logits_is_refused(tmp_path) -> None:
    """Llava calls lm_head on the states; a scale in the model's own forward would be lost."""
    save_tower(tmp_path / "tower")
    save_language(tmp_path / "language")
    language = LANGUAGES["llama"] | {"model_type": "granite", "vocab_size": 512, "logits_scaling": 8.0}
    AutoModelForCausalLM.from_config(config_from(language, "test")).save_pretrained(tmp_path / "language")
    with pytest.raises(CheckpointError, match="computes its logits in a way that Llava does not"):
        build_model(parts(tmp_path), 0, VICUNA)


def test_missing_parts_are_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.language\.tokenizer: no tokenizer in"):
        build_model(parts(tmp_path), 0, VICUNA)
    save_language(tmp_path / "language")
    with pytest.raises(CheckpointError, match=r"model\.vision\.path: cannot load"):
        build_model(parts(tmp_path), 0, VICUNA)


def test_a_tokenizer_is_trained_for_new_models_only(tmp_path) -> None:
    save_tower(tmp_path / "tower")
    save_language(tmp_path / "language")
    language = {"path": str(tmp_path / "language"), "tokenizer": {"vocab_size": 512}}
    with pytest.raises(RecipeError, match="can only be trained for a language model from scratch"):
        build_model(parts(tmp_path, language=language), 0, VICUNA, lambda: TEXTS)


def test_a_new_language_model_on_a_pretrained_tokenizer(tmp_path) -> None:
    save_tower(tmp_path / "tower")
    save_language(tmp_path / "language")
    language = {"config": LANGUAGES["llama"], "tokenizer": str(tmp_path / "language")}
    model, processor = build_model(parts(tmp_path, language=language), 0, VICUNA)
    assert model.lm_head.out_features == len(processor.tokenizer) == 514


# ---------------------------------------------------------------- from scratch


def test_weights_are_drawn_from_the_seed() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (tiny_model(projector="resampler", seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(first, again)
    for a, b in zip(first.children(), other.children(), strict=True):
        assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_nothing_is_left_without_weights() -> None:
    model, _ = tiny_model()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_dtype_is_honoured() -> None:
    config = tiny_config().model_copy(update={"dtype": "bfloat16"})
    model, _ = build_model(config, 0, VICUNA, lambda: TEXTS)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("template", "end"), [("vicuna_v1", "</s>"), ("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")]
)
def test_generation_ends_where_the_template_ends_an_answer(template: str, end: str) -> None:
    model, processor = tiny_model(template=template)
    tokenizer = processor.tokenizer
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids(end)]
    assert not model.generation_config.do_sample
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert processor.chat_template == tokenizer.chat_template == template_text(template)


def test_a_pretrained_end_token_is_kept_beside_the_templates() -> None:
    """The plain template ends an answer with a newline; `</s>` still ends it too."""
    model, processor = tiny_model(template="plain")
    ends = processor.tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert set(ends) == {"</s>", "Ċ"}


def test_sizes_that_do_not_fit_are_recipe_errors() -> None:
    changes = {"projector": {"type": "resampler", "queries": 4, "heads": 5}}
    config = ModelConfig.model_validate(tiny_config().model_dump(mode="json") | changes)
    with pytest.raises(RecipeError, match=r"model\.projector\.heads: 5 heads do not divide"):
        build_model(config, 0, VICUNA, lambda: TEXTS)


# ---------------------------------------------------------------- from a checkpoint


def test_the_next_stage_takes_weights_but_not_the_template(tmp_path) -> None:
    """Each stage has its own template and its own end of an answer, over the weights of the one before."""
    model, processor = tiny_model(template="plain")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = tiny_config().model_copy(update={"checkpoint": str(tmp_path)})
    again, processor = build_model(config, 1, VICUNA)
    assert_same_weights(again, model)
    assert again.generation_config.eos_token_id == [processor.tokenizer.eos_token_id]
    assert processor.chat_template == VICUNA


def test_a_checkpoint_keeps_its_image_fit_unless_told_otherwise(tmp_path) -> None:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    kept, other = (
        build_model(ModelConfig(checkpoint=str(tmp_path), image_fit=fit), 0, VICUNA)[1].image_processor
        for fit in (None, "crop")
    )
    assert kept.to_dict() == processor.image_processor.to_dict()
    assert type(other) is CLIPImageProcessorPil
    assert (list(other.image_mean), other.crop_size.height) == ([0.5, 0.5, 0.5], 32)


def test_the_tower_of_a_llava_style_model_can_be_grafted(tmp_path: Path) -> None:
    whole, processor = tiny_model("siglip", "pixel_shuffle", seed=3)
    whole.save_pretrained(tmp_path / "tower")
    processor.save_pretrained(tmp_path / "tower")
    save_language(tmp_path / "language")
    model, _ = build_model(parts(tmp_path), 0, VICUNA)
    expected = whole.model.vision_tower.state_dict()
    grafted = model.model.vision_tower.state_dict()
    assert expected.keys() == grafted.keys()
    assert all(torch.equal(grafted[name], tensor) for name, tensor in expected.items())
