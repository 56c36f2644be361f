"""The loss mathematics against its naive form, in fp64, forward and gradient, on odd shapes."""

from __future__ import annotations

import pytest
import torch

from vlmtune.objectives.functional import linear_cross_entropy, next_token_targets
from vlmtune.types import IGNORE


def naive_sum(hidden, weight, bias, targets):
    total = hidden.new_zeros(())
    for state, target in zip(hidden, targets, strict=True):
        logits = weight @ state + (0 if bias is None else bias)
        total = total - (logits[target] - torch.log(torch.exp(logits).sum()))
    return total


@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_cross_entropy_equals_the_naive_sum(chunk, with_bias):
    generator = torch.Generator().manual_seed(3)
    shapes = [(13, 7), (29, 7), (29,)]
    hidden, weight, bias = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes
    )
    inputs = [hidden, weight, *([bias] if with_bias else [])]
    targets = torch.randint(0, 29, (13,), generator=generator)
    ours = linear_cross_entropy(hidden, weight, targets, chunk, bias if with_bias else None)
    reference = naive_sum(hidden, weight, bias if with_bias else None, targets)
    torch.testing.assert_close(ours, reference)
    # A factor other than one shows that the backward pass scales.
    ours_grads = torch.autograd.grad(ours * 0.37, inputs)
    torch.testing.assert_close(ours_grads, torch.autograd.grad(reference * 0.37, inputs))


def test_frozen_head_gets_no_gradient_and_hidden_still_does():
    hidden = torch.randn(5, 3, requires_grad=True)
    weight = torch.randn(11, 3)
    linear_cross_entropy(hidden, weight, torch.arange(5), 2).backward()
    assert hidden.grad is not None and weight.grad is None


def test_no_supervised_token_gives_zero_loss_and_zero_gradient():
    """LLaVA#1231: the mean over zero tokens was NaN."""
    hidden = torch.zeros(0, 3, requires_grad=True)
    weight = torch.randn(11, 3, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), 4)
    loss.backward()
    assert loss.item() == 0.0
    assert weight.grad is not None and not weight.grad.any()


def test_bf16_stays_close_to_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator)
    weight = torch.randn(200, 32, generator=generator) * 0.1
    targets = torch.randint(0, 200, (64,), generator=generator)
    exact = linear_cross_entropy(hidden, weight, targets, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rough = linear_cross_entropy(hidden, weight, targets, 16)
    assert rough.dtype == torch.float32
    assert abs((rough / exact).item() - 1) < 5e-3


def test_targets_are_the_next_tokens():
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    labels = torch.tensor([[5, IGNORE, 7], [IGNORE, 8, IGNORE]])
    states, targets = next_token_targets(hidden, labels)
    assert targets.tolist() == [7, 8]
    assert torch.equal(states, torch.stack([hidden[0, 1], hidden[1, 0]]))
