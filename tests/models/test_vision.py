"""Towers: what each family drops and reads, and the fixed-grid twin of SigLIP2."""

from __future__ import annotations

import pickle

import pytest
import torch
from transformers import Siglip2VisionConfig
from transformers.models.siglip2 import Siglip2VisionModel

from tests.tiny import IMAGE_SIZE, TOWERS, tiny_model
from vlmtune.config.schema import VisionConfig
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.towers import config_from, fixed_grid, load_tower
from vlmtune.models.vision import resolve_feature_layer, token_counter, tower_family


@pytest.mark.parametrize(
    ("tower", "select"), [("clip", "default"), ("dinov2", "default"), ("siglip", "full")]
)
def test_only_the_class_token_is_dropped(tower: str, select: str) -> None:
    """SigLIP under the strategy `default` would lose a real patch: 15 of 16."""
    model, _ = tiny_model(tower)
    assert model.config.vision_feature_select_strategy == select
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    patches = states[:, -16:]
    assert patches.shape == (2, 16, 32)
    expected = model.model.multi_modal_projector(patches)
    found = torch.stack(model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(found, expected)


def test_the_counter_travels_to_loader_processes() -> None:
    counter = token_counter(tiny_model()[0].config)
    assert pickle.loads(pickle.dumps(counter))(640, 480) == 16


def test_unknown_family_lists_the_known_ones() -> None:
    config = config_from({"model_type": "vit"}, "model.vision.config")
    with pytest.raises(CheckpointError, match=r"'vit'.*clip_vision_model, siglip_vision_model, dinov2"):
        tower_family(config)


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_feature_layer_out_of_range(layer: int) -> None:
    config = config_from(TOWERS["clip"], "model.vision.config")
    with pytest.raises(RecipeError, match=f"no hidden state {layer}.*1 to 3"):
        resolve_feature_layer(config, layer)


def test_feature_layer_defaults_to_the_family() -> None:
    config = config_from(TOWERS["clip"], "model.vision.config")
    assert [resolve_feature_layer(config, layer) for layer in (None, 1, 3, -3)] == [-2, 1, 3, -3]


def test_a_misspelt_size_is_refused() -> None:
    """transformers keeps `hidden_sise` in silence, and the tower has the default width."""
    with pytest.raises(RecipeError, match="Did you mean 'hidden_size'"):
        config_from(TOWERS["clip"] | {"hidden_sise": 16}, "model.vision.config")
    with pytest.raises(RecipeError, match="hidden_size"):
        config_from(TOWERS["clip"] | {"hidden_size": "wide"}, "model.vision.config")
    with pytest.raises(RecipeError, match="klip"):
        config_from({"model_type": "klip"}, "model.vision.config")


def naflex_inputs(pixels: torch.Tensor, patch: int) -> dict[str, torch.Tensor]:
    """Pixels as SigLIP2's own image processor cuts them: patches of (row, column, channel)."""
    n, channels, height, width = pixels.shape
    grid = pixels.reshape(n, channels, height // patch, patch, width // patch, patch)
    patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch * patch * channels)
    shape = torch.tensor([[height // patch, width // patch]] * n)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
        "spatial_shapes": shape,
    }


@pytest.mark.parametrize("image_size", [None, 24, 48])
def test_fixed_grid_computes_what_naflex_does(image_size: int | None) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    naflex = Siglip2VisionModel(Siglip2VisionConfig(num_patches=16, patch_size=8, **sizes)).eval()
    fixed = fixed_grid(naflex, image_size)
    pixels = torch.randn(2, 3, fixed.config.image_size, fixed.config.image_size)
    assert fixed.config.image_size == (image_size or 32)
    expected = naflex(**naflex_inputs(pixels, 8), output_hidden_states=True)
    found = fixed(pixels, output_hidden_states=True)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)


def test_siglip2_is_a_plain_siglip_tower_from_the_start() -> None:
    tower = load_tower(VisionConfig(config=TOWERS["siglip2"]), torch.float32)
    assert tower.config.model_type == "siglip_vision_model"
    assert tower.config.image_size == IMAGE_SIZE


def test_only_siglip2_changes_its_image_size() -> None:
    assert (
        load_tower(VisionConfig(config=TOWERS["siglip2"], image_size=48), torch.float32).config.image_size
        == 48
    )
    with pytest.raises(RecipeError, match="multiple of 8"):
        load_tower(VisionConfig(config=TOWERS["siglip2"], image_size=50), torch.float32)
    with pytest.raises(RecipeError, match="sees 32 pixels, not 48"):
        load_tower(VisionConfig(config=TOWERS["clip"], image_size=48), torch.float32)
