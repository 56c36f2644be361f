"""Groups per part, and schedules that end where they say."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_model
from tests.training.setups import tiny_recipe
from vlmtune.config.plugins import NextTokenConfig
from vlmtune.config.schema import ScheduleConfig
from vlmtune.models.tuning import apply_tuning
from vlmtune.objectives import build_objective
from vlmtune.training.optim import build_optimizer, lr_factor, set_lr


def test_each_part_has_its_own_rate_and_decay():
    model, processor = tiny_model()
    recipe = tiny_recipe(
        tuning={"vision": {"mode": "frozen"}, "projector": {"mode": "full", "lr": 0.5, "weight_decay": 0.25}},
        optim={"lr": 0.125, "weight_decay": 0.1},
    )
    apply_tuning(model, recipe.tuning)
    objective = build_objective(NextTokenConfig(), model, processor, 0)
    optimizer = build_optimizer(objective.named_parameters(), recipe.tuning, recipe.optim)
    seen = {(group["part"], group["weight_decay"]): group["lr"] for group in optimizer.param_groups}
    assert seen == {
        ("projector", 0.25): 0.5,
        ("projector", 0.0): 0.5,
        ("language", 0.1): 0.125,
        ("language", 0.0): 0.125,
    }
    grouped = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    assert grouped == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert set_lr(optimizer, 0.5) == 0.25


def test_vectors_are_never_decayed():
    model, processor = tiny_model()
    recipe = tiny_recipe(optim={"lr": 1e-3, "weight_decay": 0.1})
    objective = build_objective(NextTokenConfig(), model, processor, 0)
    for group in build_optimizer(objective.named_parameters(), recipe.tuning, recipe.optim).param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule_rises_once_and_falls_to_its_end(kind, total):
    config = ScheduleConfig(type=kind, steps=total, warmup=0.1, min_lr_ratio=0.2)
    factors = [lr_factor(step, total, config) for step in range(total)]
    peak = factors.index(max(factors))
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if total > 1:  # a single step is its own warm-up
        assert lr_factor(total, total, config) == pytest.approx(1.0 if kind == "constant" else 0.2)
