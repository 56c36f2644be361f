"""Cheaper computation changes nothing: checkpoints, Liger, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.chat_batches import encoded_samples, micro_batches
from tests.tiny import tiny_model, tiny_processor
from vlmtune.config.plugins import NextTokenConfig
from vlmtune.errors import RecipeError
from vlmtune.models.attention import use_attention
from vlmtune.models.kernels import checkpoint_activations, compile_blocks, liger_obstacle, use_liger
from vlmtune.models.vlm import VLM
from vlmtune.objectives.next_token import NextToken
from vlmtune.training.engine import to_device


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_liger_says_why_it_is_off() -> None:
    model, _ = tiny_model()
    assert use_liger(model, None) == (False, "no CUDA device: Triton compiles for GPUs")
    assert use_liger(model, False) == (False, "turned off")
    assert not model.fused_loss
    with pytest.raises(
        RecipeError, match=r"run.liger: Liger's kernels cannot run: no CUDA device.*vlmtune\[liger\]"
    ):
        use_liger(model, True)


def loss_and_gradients(model: VLM, device: str = "cpu") -> tuple[float, dict[str, Tensor]]:
    """Of a packed batch through the objective."""
    samples = encoded_samples(model.config.image_token_id, 16, 32, count=4)
    (batch,) = micro_batches(samples, 1)
    objective = NextToken(NextTokenConfig(), model.train(), tiny_processor())
    loss = objective(to_device(batch, torch.device(device)), objective.counts(batch)).loss
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return float(loss.detach()), found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_compiled_blocks_compute_the_same_and_keep_their_names() -> None:
    """Captured, not lowered: inductor takes a minute for a tiny model on a CPU."""
    plain, _ = tiny_model()
    use_attention(plain, "sdpa")
    model, _ = tiny_model()
    use_attention(model, "sdpa")
    names = list(model.state_dict())
    assert compile_blocks(model, backend="eager") == 2
    assert list(model.state_dict()) == names
    (loss, gradients), (expected, wanted) = loss_and_gradients(model), loss_and_gradients(plain)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_liger_computes_the_same_loss_and_gradients() -> None:
    plain, _ = tiny_model()
    if why := liger_obstacle(plain.config.text_config.model_type):
        pytest.skip(why)
    fused, _ = tiny_model()
    for model in (plain, fused):
        use_attention(model.to("cuda"), "sdpa")
    assert use_liger(fused, True) == (True, "asked for")
    (loss, gradients), (expected, wanted) = (
        loss_and_gradients(fused, "cuda"),
        loss_and_gradients(plain, "cuda"),
    )
    assert loss == pytest.approx(expected, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-2)
