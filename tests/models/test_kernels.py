"""Cheaper computation changes nothing: checkpoints, Liger, torch.compile."""

from __future__ import annotations

import torch

from tests.tiny import tiny_model
from vlmtune.models.kernels import checkpoint_activations


def test_a_frozen_tower_under_checkpoints_is_not_differentiated() -> None:
    """transformers makes embeddings' outputs require gradients: the tower would be recomputed for nothing."""
    model, _ = tiny_model()
    model.model.vision_tower.requires_grad_(False)
    pixels = torch.randn(2, 3, 32, 32)
    seen: list[bool] = []
    for block in model.model.vision_tower.encoder.layers:
        block.register_forward_hook(lambda _, given, out: seen.append(out.requires_grad))
    checkpoint_activations(model.train())
    features = model.get_image_features(pixel_values=pixels).pooler_output
    assert seen == [False] * 3 and features[0].requires_grad
