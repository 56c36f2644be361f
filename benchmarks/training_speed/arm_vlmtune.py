"""vlmtune's own engine, data and objective, put together as `vlmtune train` does it, with isolated packing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from meter import Meter
from workload import LEARNING_RATE, SEED, Workload

from vlmtune.config.loader import load_mix
from vlmtune.config.schema import Recipe
from vlmtune.data.loader import ChatData, ChatStream
from vlmtune.models.attention import use_attention
from vlmtune.models.build import load_model
from vlmtune.models.tuning import apply_tuning
from vlmtune.models.vision import token_counter
from vlmtune.objectives import build_objective
from vlmtune.training.distributed import build_accelerator
from vlmtune.training.engine import Engine, Setup
from vlmtune.training.optim import build_optimizer
from vlmtune.types import ChatBatch


@dataclass(frozen=True)
class MeteredStream:
    """A stream that ends one step before the engine's last, so that no checkpoint is written, as in the peers."""

    inner: ChatStream
    meter: Meter

    @property
    def steps_per_epoch(self) -> int:
        return self.inner.steps_per_epoch

    def steps(self, start: int, stop: int) -> Iterator[list[ChatBatch]]:
        for micros in self.inner.steps(start, stop - 1):
            yield micros
            self.meter.step_done()

    def heaviest(self) -> list[ChatBatch]:
        return self.inner.heaviest()

    def held_out(self) -> dict[str, Any]:
        return {}


def recipe_of(workload: Workload, checkpointing: bool) -> Recipe:
    """The recipe with the settings of `arm_trainer.settings`."""
    scale = workload.scale
    chat = {
        "mix": str(workload.folder / "mix.yaml"),
        "batch_size": scale.samples_per_step,
        "micro_tokens": scale.micro_tokens,
        "max_length": scale.max_length,
        "packing": "isolated",
        "workers": 0,
    }
    return Recipe.model_validate(
        {
            "name": "training-speed",
            "model": {"checkpoint": str(workload.folder / "model")},
            "data": {"chat": chat},
            "optim": {"lr": LEARNING_RATE, "max_grad_norm": 1.0},
            "schedule": {"type": "constant", "steps": workload.steps + 1, "warmup": 0.0},
            "run": {
                "precision": "bf16",
                "seed": SEED,
                "log_every": 1,
                "activation_checkpointing": checkpointing,
            },
            "evaluation": {"held_out": {"fraction": 0.0}},
        }
    )


def train(workload: Workload, meter: Meter, checkpointing: bool) -> None:
    """Trains one epoch of the workload."""
    recipe, folder = recipe_of(workload, checkpointing), workload.folder
    chat = recipe.data.chat
    assert chat is not None
    accelerator = build_accelerator(recipe.run, str(folder))
    model, processor = load_model(folder / "model")
    meter.watch(model)
    apply_tuning(model, recipe.tuning)
    use_attention(model, recipe.model.attention)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mix, counter = load_mix(folder / "mix.yaml"), token_counter(model.config)
    held_out = recipe.evaluation.held_out
    data = ChatData(chat, mix, folder, processor, counter, held_out, SEED, folder / "cache")
    objective = build_objective(recipe.objective, model, processor, SEED)
    objective.register_forward_pre_hook(lambda _, args: meter.fed(args[0].labels))
    objective.train()
    optimizer = build_optimizer(objective.named_parameters(), recipe.tuning, recipe.optim)
    stream = MeteredStream(data.stream(0, 1), meter)
    Engine(
        accelerator, Setup(recipe, objective, optimizer, stream, processor, folder, {}), 0, workload.steps + 1
    ).fit()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    meter.losses += [json.loads(line)["loss"] for line in lines]
