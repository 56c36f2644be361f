"""Counted operations against torch's own counter over a real forward and backward."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.planning.test_footprint import FULL, LORA, TOWER_TOO, batch_of, real_model
from vlmtune.config.plugins import NextTokenConfig
from vlmtune.config.tuning import TuningConfig
from vlmtune.models.attention import use_attention
from vlmtune.models.kernels import checkpoint_activations
from vlmtune.objectives.next_token import NextToken
from vlmtune.planning.batches import Micro, Shape
from vlmtune.planning.flops import costs, total

FROZEN_LANGUAGE = TuningConfig.model_validate({"language": {"mode": "frozen"}})
SAMPLES = tuple(
    Shape(text + 16 * images, images, text) for text, images in ((70, 1), (40, 0), (100, 2), (25, 1))
)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tuning", [FULL, FROZEN_LANGUAGE, TOWER_TOO, LORA])
@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_counted_operations_are_those_torch_counts(
    tuning: TuningConfig, checkpointing: bool, packing: str
) -> None:
    model, processor = real_model("clip", "llama", tuning)
    planned = total(costs(model, checkpointing).of(Micro(SAMPLES, packing)))
    batch = batch_of(model, packing)
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    use_attention(model, "eager")
    if checkpointing:
        checkpoint_activations(model)
    objective = NextToken(NextTokenConfig(), model, processor).train()
    with FlopCounterMode(display=False) as counter:
        loss = objective(batch, objective.counts(batch)).loss
        forward = counter.get_total_flops()
        loss.backward()
    # The loss makes its gradients in the forward pass; torch's count of the rest is ours, but for what it skips
    # at the borders: gradients of the first layer's input, of a segment's first token.
    assert planned.computed == pytest.approx(counter.get_total_flops(), rel=0.04)
    assert planned.forward < forward < planned.forward * 1.35


def test_frozen_parts_are_counted_once_and_twice() -> None:
    model, _ = real_model("clip", "llama", FROZEN_LANGUAGE)
    parts = costs(model, checkpointing=False).of(Micro(SAMPLES, "isolated"))
    assert parts["vision"].backward == 0  # nothing before it learns
    assert parts["language"].backward == parts["language"].forward  # the projector's gradient passes through
    model, _ = real_model("clip", "llama", FULL)
    parts = costs(model, checkpointing=True).of(Micro(SAMPLES, "isolated"))
    assert parts["language"].backward == 2 * parts["language"].forward
    assert 0.7 < parts["language"].again / parts["language"].forward < 1  # all but each block's last product
    assert parts["vision"].again == 0
