"""Two ranks x {1, 2, 4} micro-batches through the real engine, against one process with the whole batch."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from tests.chat_batches import micro_batches
from tests.contracts.test_objectives import FOUND, objective_and_samples, step
from tests.training.setups import engine_of


def main() -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.num_processes
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    for name in FOUND:
        prove(accelerator, name)


def prove(accelerator: Accelerator, objective_name: str) -> None:
    """Asserts the law of one objective for every split of the samples."""
    rank = accelerator.process_index
    reference_objective, samples = objective_and_samples(objective_name)
    whole, reference = step(reference_objective, micro_batches(samples, 1))
    scale = torch.sqrt(sum((g**2).sum() for g in reference.values()))

    # Uneven over ranks: rank 0 has the short samples (and, last, text only), rank 1 the long ones with images.
    splits = {
        "uneven": (samples[:5], samples[5:]),
        "text-only rank": (samples[::3], [s for i, s in enumerate(samples) if i % 3]),
    }
    for name, parts in splits.items():
        for count in (1, 2, 4):
            objective, _ = objective_and_samples(objective_name)
            engine = engine_of(accelerator, objective)
            wrapped = engine.strategy.module
            assert type(wrapped).__name__ == "DistributedDataParallel", type(wrapped)
            micros = micro_batches(parts[rank], count)
            counted = engine._counts(micros)
            totals = {key: int(value) for key, value in counted.items() if key[0] != "_"}
            shares = engine._accumulate(micros, totals)
            loss = accelerator.reduce(torch.tensor(sum(shares.values())), "sum").item()
            assert abs(loss / whole - 1) < 1e-5, (name, count, loss, whole)
            grads = {key: p.grad for key, p in objective.named_parameters() if p.grad is not None}
            assert set(grads) == set(reference)
            error = torch.sqrt(sum(((grads[key] - reference[key]) ** 2).sum() for key in reference)) / scale
            assert error < 1e-5, (name, count, float(error))
            if accelerator.is_main_process:
                print(
                    f"law: {objective_name}, {name}, 2 ranks x {count} micro-batches: {float(error):.1e} off"
                )


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
