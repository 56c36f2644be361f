"""What holds for every projector in the table, on every tower."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.tiny import IMAGE_SIZE, PROJECTORS, TOWERS, tiny_model
from vlmtune.config.plugins import PROJECTOR_TYPES
from vlmtune.models import projectors
from vlmtune.models.projectors import Projector, build_projector
from vlmtune.models.vision import token_counter


def test_every_projector_is_tested_and_has_its_options() -> None:
    classes = {
        kind for kind in vars(projectors).values() if isinstance(kind, type) and issubclass(kind, Projector)
    }
    assert classes - {Projector} == set(projectors.PROJECTORS.values())
    assert projectors.PROJECTORS.keys() == PROJECTOR_TYPES.keys() == PROJECTORS.keys()
    assert len(PROJECTORS) >= 4


@pytest.mark.parametrize("name", PROJECTORS)
def test_shapes_gradients_and_every_weight_used(name: str) -> None:
    config = PROJECTOR_TYPES[name].model_validate(PROJECTORS[name])
    projector = build_projector(config, 12, 8, 36)
    features = torch.randn(3, 36, 12, requires_grad=True)
    tokens = projector(features)
    assert tokens.shape == (3, projector.num_tokens(36), 8)
    tokens.square().sum().backward()
    assert features.grad is not None and features.grad.abs().sum(dim=-1).min() > 0
    unreached = tuple(f"{module}." for module in projector.unreached)
    for path, weight in projector.named_parameters():
        used = not path.startswith(unreached)
        assert (weight.grad is not None and bool(weight.grad.any())) == used, path


@pytest.mark.parametrize("name", PROJECTORS)
def test_images_do_not_see_each_other(name: str) -> None:
    config = PROJECTOR_TYPES[name].model_validate(PROJECTORS[name])
    projector = build_projector(config, 12, 8, 36)
    features = torch.randn(3, 36, 12)
    torch.testing.assert_close(projector(features)[1:2], projector(features[1:2]))


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("tower", TOWERS)
def test_our_count_is_the_processors_and_the_models(tower: str, projector: str) -> None:
    """`Image features and image tokens do not match`: the count derived in two places."""
    model, processor = tiny_model(tower, projector)
    images = [Image.new("RGB", size) for size in ((64, 20), (9, 50))]
    inputs = processor(images=images, text="<image> and <image>", return_tensors="pt")
    counted = [token_counter(model.config)(*image.size) for image in images]
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert [len(tokens) for tokens in features] == counted
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == sum(counted)
    sizes = [(image.height, image.width) for image in images]
    assert processor._get_num_multimodal_tokens(sizes)["num_image_tokens"] == counted
    assert model.config.image_seq_length == counted[0]
    assert inputs["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.isfinite(model(**inputs).logits).all()
