"""An Engine around a tiny objective, for tests that drive single steps."""

from __future__ import annotations

from pathlib import Path

from vlmtune.config.schema import Recipe
from vlmtune.training.engine import Engine, Setup
from vlmtune.training.optim import build_optimizer


def tiny_recipe(**changes) -> Recipe:
    """A recipe that names tiny parts; `changes` are top-level keys."""
    base = {
        "name": "tiny",
        "model": {"checkpoint": "nowhere"},
        "data": {
            "chat": {
                "mix": "nowhere.yaml",
                "batch_size": 8,
                "max_length": 256,
                "micro_tokens": 256,
                "workers": 0,
            }
        },
        "tuning": {"vision": {"mode": "full"}},
        "optim": {"lr": 1e-3},
        "schedule": {"steps": 10},
        "run": {"precision": "fp32", "log_every": 1},
    }
    return Recipe.model_validate(base | changes)


class Steps:
    """A stream that gives the same micro-batches at every step."""

    steps_per_epoch = 4

    def __init__(self, micros, held_out=None) -> None:
        self.micros, self.held = micros, held_out or {}

    def steps(self, start, stop):
        return (self.micros for _ in range(start, stop))

    def heaviest(self):
        return [self.micros[0], self.micros[-1]]

    def held_out(self):
        return self.held


def engine_of(accelerator, objective, micros=(), folder=Path("nowhere"), processor=None, **changes) -> Engine:
    """An engine of a tiny recipe from step 0 to its last."""
    recipe = tiny_recipe(**changes)
    optimizer = build_optimizer(objective.named_parameters(), recipe.tuning, recipe.optim)
    setup = Setup(recipe, objective, optimizer, Steps(list(micros)), processor, folder, {"key": "k"})
    return Engine(accelerator, setup, 0, recipe.schedule.steps)
