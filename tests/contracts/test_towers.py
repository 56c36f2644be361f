"""What holds for every tower family in the table."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from tests.tiny import IMAGE_SIZE, TOWERS, tiny_model
from vlmtune.models.towers import config_from
from vlmtune.models.vision import TOWER_FAMILIES

TINY = {str(options["model_type"]): options for options in TOWERS.values()}


def test_every_family_is_tested() -> None:
    assert len(TOWER_FAMILIES) >= 3
    assert TOWER_FAMILIES.keys() <= TINY.keys()


@pytest.mark.parametrize("model_type", TOWER_FAMILIES)
def test_the_row_describes_the_tower(model_type: str) -> None:
    family = TOWER_FAMILIES[model_type]
    assert family.model_type == model_type
    tower = AutoModel.from_config(config_from(TINY[model_type], "test"))
    blocks = tower.get_submodule(family.layers)
    assert len(blocks) == tower.config.num_hidden_layers
    names = [name for name, _ in (*tower.named_modules(), *tower.named_parameters())]
    assert set(family.unreached(3, -2)) <= set(names)
    states = tower(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE), output_hidden_states=True).hidden_states
    assert len(states) == len(blocks) + 1
    assert states[family.feature_layer].shape[1] == 16 + family.prefix_tokens


@pytest.mark.parametrize("tower", TOWERS)
def test_features_do_not_depend_on_what_is_called_unreached(tower: str) -> None:
    model, _ = tiny_model(tower)
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    before = model.get_image_features(pixels).pooler_output[0]
    family = TOWER_FAMILIES[model.config.vision_config.model_type]
    unreached = tuple(f"{name}." for name in family.unreached(3, model.config.vision_feature_layer))
    with torch.no_grad():
        for name, weight in model.model.vision_tower.named_parameters():
            if f"{name}.".startswith(unreached):
                weight.add_(1.0)
    assert torch.equal(before, model.get_image_features(pixels).pooler_output[0])
