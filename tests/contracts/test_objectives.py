"""What holds for every objective on disk: the law, and an export without helpers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlmtune.objectives as package
from tests.chat_batches import encoded_samples, micro_batches
from tests.tiny import IMAGE_SIZE, tiny_model
from vlmtune.config.plugins import NextTokenConfig, ReconstructionConfig
from vlmtune.config.tuning import Full, TuningConfig
from vlmtune.models.attention import use_attention
from vlmtune.models.tuning import apply_tuning
from vlmtune.models.vision import token_counter
from vlmtune.objectives import build_objective

PLUMBING = {"__init__", "base", "functional", "spine"}
CONFIGS = {
    "next_token": NextTokenConfig(chunk=7),
    "reconstruction": ReconstructionConfig.model_validate(
        {
            "type": "reconstruction",
            "target": {"type": "pixels"},
            "denoiser": {"depth": 2, "width": 32, "heads": 4},
        }
    ),
}
FOUND = sorted(path.stem for path in Path(package.__path__[0]).glob("*.py") if path.stem not in PLUMBING)


def test_every_objective_on_disk_is_tested():
    assert sorted(CONFIGS) == FOUND


def objective_and_samples(name):
    model, processor = tiny_model()
    use_attention(model, "sdpa")
    apply_tuning(model, TuningConfig(vision=Full(mode="full")))
    model.train()
    per_image = token_counter(model.config)(IMAGE_SIZE, IMAGE_SIZE)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    objective = build_objective(CONFIGS[name], model, processor, 0)
    objective.train()
    stir(objective)
    return objective, encoded_samples(image, per_image, IMAGE_SIZE)


def stir(objective):
    """Moves an objective's own weights off their first values: a layer that begins at zero passes no gradient."""
    generator = torch.Generator().manual_seed(5)
    for key, weight in objective.named_parameters():
        if not key.startswith("model."):
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)


def step(objective, batches):
    """Loss and gradients of one optimizer step over `batches`, as the engine does it on one rank."""
    totals: dict[str, int] = {}
    for batch in batches:
        for key, value in objective.counts(batch).items():
            totals[key] = totals.get(key, 0) + value
    objective.zero_grad()
    losses = []
    for batch in batches:
        output = objective(batch, totals)
        assert set(output.terms) and all(not term.requires_grad for term in output.terms.values())
        output.loss.backward()
        losses.append(output.loss.item())
    grads = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return sum(losses), grads


@pytest.mark.parametrize("packing", ["isolated", "none"])
@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("name", FOUND)
def test_the_law_over_micro_batches(name, count, packing):
    """Shares of 2, 4 and 8 uneven micro-batches (ranks included) add up to the loss of the whole batch."""
    objective, samples = objective_and_samples(name)
    whole, reference = step(objective, micro_batches(samples, 1))
    parts, grads = step(objective, micro_batches(samples, count, packing))
    assert parts == pytest.approx(whole, rel=1e-6)
    assert set(grads) == set(reference)
    scale = torch.sqrt(sum((g**2).sum() for g in reference.values()))
    error = torch.sqrt(sum(((grads[key] - reference[key]) ** 2).sum() for key in reference))
    assert error / scale < 1e-5


def test_the_law_is_not_the_mean_of_means():
    """The test above can fail: the usual mean of per-micro-batch means is far off on these samples."""
    objective, samples = objective_and_samples("next_token")
    whole, _ = step(objective, micro_batches(samples, 1))
    batches = micro_batches(samples, 4)
    means = [objective(batch, objective.counts(batch)).loss.item() for batch in batches]
    assert abs(sum(means) / len(means) / whole - 1) > 1e-3


@pytest.mark.parametrize("name", FOUND)
def test_the_export_holds_the_model_only(name):
    objective, _ = objective_and_samples(name)
    own = set(objective.exported().state_dict())
    assert own == set(tiny_model()[0].state_dict())


@pytest.mark.parametrize("name", FOUND)
def test_a_batch_without_labels_counts_nothing_and_adds_nothing(name):
    objective, samples = objective_and_samples(name)
    (batch,) = micro_batches(samples[:1], 1)
    batch.labels.fill_(-100)
    assert set(objective.counts(batch).values()) == {0}
    output = objective(batch, dict.fromkeys(objective.counts(batch), 10))
    assert output.loss.item() == 0.0
    output.loss.backward()
