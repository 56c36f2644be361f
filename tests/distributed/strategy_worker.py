"""One process of a run under some strategy: trains until it is killed, or resumes; prints what it found as JSON.

strategy_worker.py kill FOLDER        20 steps beside a rank without images; then a run that dies after step 7
strategy_worker.py resume FOLDER      goes on with FOLDER/own, then with FOLDER/single
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

import vlmtune.run
import vlmtune.training.distributed
from tests.chat_batches import micro_batches
from tests.contracts.test_objectives import objective_and_samples
from tests.tiny import tiny_processor
from tests.training.setups import engine_of
from vlmtune.config.loader import load_recipe
from vlmtune.training import engine
from vlmtune.training.parallel import Parallel

KILLED_AFTER = 7
ADAPTED = (
    "export.enabled=false",
    "tuning={vision: {mode: frozen}, projector: {mode: full}, language: {mode: lora, rank: 4, dropout: 0.0}}",
)


def main() -> None:
    phase, folder = sys.argv[1], Path(sys.argv[2])
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        pretend_gpus()
    shard_everything()
    seen = watch()
    if phase == "kill":
        mixed(folder)
        report(seen)
        train(folder, "own", die_after=KILLED_AFTER)
        raise AssertionError("should have been killed")
    train(folder, "own")
    train(folder, "single", "export.enabled=false")
    train(folder, "half", "export.enabled=false", "run.precision=bf16")
    train(folder, "adapted", *ADAPTED)
    report(seen)


def pretend_gpus() -> None:
    """accelerate turns FSDP on for GPUs only; everything after that choice works on a CPU as it is."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def shard_everything() -> None:
    """ZeRO-3 leaves small weights whole, which all of a tiny model's are."""
    build = vlmtune.training.distributed.build_accelerator

    def built(*arguments):
        accelerator = build(*arguments)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            config = accelerator.state.deepspeed_plugin.deepspeed_config
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return accelerator

    vlmtune.training.distributed.build_accelerator = built


def watch() -> list[Parallel]:
    """Fills with every strategy that an engine builds."""
    seen, build = [], engine.build_strategy

    def built(*arguments):
        seen.append(build(*arguments))
        return seen[-1]

    engine.build_strategy = built
    return seen


def mixed(folder: Path) -> None:
    """Rank 0 has text only, rank 1 has images: another order of modules would hang or mix up collectives."""
    objective, samples = objective_and_samples("next_token")
    run = {"precision": "fp32", "log_every": 1, "save_every": 100}
    accelerator = vlmtune.training.distributed.build_accelerator(engine_config(run), str(folder / "mixed"))
    own = samples[::3] if accelerator.process_index == 0 else [s for i, s in enumerate(samples) if i % 3]
    micros = micro_batches(own, 2)
    assert any(batch.pixel_values is not None for batch in micros) == (accelerator.process_index == 1)
    trained = engine_of(
        accelerator, objective, micros, folder / "mixed", tiny_processor(), run=run, schedule={"steps": 20}
    )
    assert trained.fit().steps == 20
    accelerator.free_memory()


def engine_config(run: dict):
    from vlmtune.config.schema import RunConfig

    return RunConfig.model_validate(run)


def train(folder: Path, name: str, *overrides: str, die_after: int | None = None) -> None:
    step = engine.Engine._step

    def deadly(self, number, *arguments):
        if number == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number, *arguments)

    engine.Engine._step = deadly
    indexed, vlmtune.run.chat_data = vlmtune.run.chat_data, silent(vlmtune.run.chat_data)
    vlmtune.run.run(load_recipe(folder / "recipe.yaml", [f"run.dir={folder / name}", *overrides]))
    engine.Engine._step, vlmtune.run.chat_data = step, indexed


def silent(indexing):
    """LlamaFactory#8807, ms-swift#4076: a collective while indexing ends in a time-out on large data."""

    def guarded(*arguments):
        with no_collectives():
            return indexing(*arguments)

    return guarded


@contextmanager
def no_collectives():
    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier")
    kept = {name: getattr(torch.distributed, name) for name in names}

    def forbidden(*arguments, **options):
        raise AssertionError("a collective while indexing")

    try:
        for name in names:
            setattr(torch.distributed, name, forbidden)
        yield
    finally:
        for name, value in kept.items():
            setattr(torch.distributed, name, value)


def report(seen) -> None:
    accelerator = seen[-1].accelerator
    if accelerator.is_main_process:
        found = {
            "processes": accelerator.num_processes,
            "world": torch.distributed.get_world_size(),
            "backend": torch.distributed.get_backend(),
            "type": accelerator.distributed_type.value,
            "wrapped": sorted({type(each.module).__name__ for each in seen}),
            "optimizer": type(innermost(seen[-1].optimizer)).__name__,
            "strategies": sorted({each.name for each in seen}),
        }
        print("found " + json.dumps(found), flush=True)


def innermost(optimizer):
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
