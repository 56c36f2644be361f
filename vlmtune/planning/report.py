"""A plan for people (tables) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmtune.planning.estimate import HOST, LINK, RUNTIME, Estimate
from vlmtune.planning.plan import Plan
from vlmtune.planning.search import Found

_SHOWN_RANKS = 8


def show(plans: Sequence[Plan], console: Console | None = None) -> None:
    """Writes the plans to the terminal."""
    console = console or Console()
    for plan in plans:
        console.rule(f"{plan.recipe.name} {plan.recipe.stage}")
        for part in _parts(plan):
            console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


def _parts(plan: Plan) -> Iterator[Table | str]:
    estimate = plan.estimate
    yield _memory(estimate)
    yield _verdict(estimate)
    if not estimate.learns:
        yield (
            f"{estimate.setting.strategy.name} trains bfloat16 weights without float32 masters: small steps are rounded"
            " away. Use zero1, zero2 or zero3, or model.dtype=float32"
        )
    yield f"samples: {plan.lengths.total:,}; {plan.lengths.origin}"
    yield _ranks(plan)
    yield _evenness(plan)
    yield from (f"HANG {fault}" for fault in plan.hangs)
    yield _operations(plan)
    yield _time(plan)
    yield _comparison(plan.others)
    yield _advice(plan)


def _memory(estimate: Estimate) -> Table:
    """Bytes of the recipe's setting, by part."""
    setting, saved = estimate.setting, estimate.footprint.saved
    title = f"memory of each of {setting.world} ranks under {setting.strategy.name}, GiB"
    table = Table(
        "", "weights", "gradients", "optimizer", "activations", "all", title=title, title_justify="left"
    )
    for part, held in estimate.parts.items():
        row = (held.parameters, held.gradients, held.optimizer, saved[part])
        table.add_row(part, *map(gib, row), gib(sum(row)))
    rest = {
        "loss, kept for the backward pass": saved["loss"],
        "logits of a chunk": estimate.footprint.logits,
        "working (a block again, gradients on their way)": estimate.footprint.working,
        "buffers between ranks": estimate.buffers,
        "CUDA, NCCL, cuBLAS (assumed)": RUNTIME,
    }
    for name, size in rest.items():
        table.add_row(name, "", "", "", "", gib(size))
    table.add_section()
    table.add_row("all", *map(gib, _sums(estimate)), gib(estimate.total))
    return table


def _sums(estimate: Estimate) -> tuple[int, int, int, int]:
    held = estimate.held
    return held.parameters, held.gradients, held.optimizer, estimate.footprint.activations


def _verdict(estimate: Estimate) -> str:
    """Whether it fits, and for which micro-batch."""
    worst, host = estimate.worst, estimate.held.host
    verdict = "fits" if estimate.fits else "does NOT fit"
    where = f"; {gib(host)} GiB of host memory a rank" if host else ""
    return (
        f"{gib(estimate.total)} GiB {verdict} in {gib(estimate.machine.memory)} GiB{where}. Worst micro-batch: "
        f"{worst.computed:,} tokens in {len(worst.samples)} samples, {worst.images} images"
    )


def _ranks(plan: Plan) -> Table:
    """What the first ranks do in the simulated steps."""
    title = f"batches of {len(plan.schedule.steps)} simulated steps"
    table = Table(
        "rank",
        "micro-batches",
        "tokens",
        "padding",
        "images",
        "blank images",
        title=title,
        title_justify="left",
    )
    rows = plan.schedule.ranks()
    for row in rows[:_SHOWN_RANKS]:
        cells = (
            f"{row.micro_batches:,}",
            f"{row.tokens:,}",
            f"{row.padding:.1%}",
            f"{row.images:,}",
            f"{row.blank:,}",
        )
        table.add_row(str(row.rank), *cells)
    if len(rows) > _SHOWN_RANKS:
        table.add_row(f"... {len(rows) - 1}", "", "", "", "", "")
    return table


def _evenness(plan: Plan) -> str:
    calls = "differ: see below" if plan.hangs else "are the same on all ranks: no rank waits for ever"
    return f"the busiest rank computes {plan.schedule.imbalance:.1%} more than the mean; the modules called {calls}"


def _operations(plan: Plan) -> Table:
    """Operations of a step by part, recomputation apart."""
    title = "operations of a step over all ranks, PFLOP"
    table = Table("", "forward", "backward", "recomputed", title=title, title_justify="left")
    for name, cost in plan.estimate.operations.items():
        table.add_row(name, *(f"{value / 1e15:.3f}" for value in (cost.forward, cost.backward, cost.again)))
    return table


def _time(plan: Plan) -> str:
    machine, estimate = plan.estimate.machine, plan.estimate
    speed = machine.gpus * machine.tflops * 1e12
    return (
        f"{plan.steps:,} steps of {estimate.seconds:.2f} s: {plan.hours:.1f} hours at {machine.mfu:.0%} of "
        f"{machine.gpus} x {machine.tflops:g} TFLOP/s, padding and recomputation counted (useful: "
        f"{estimate.useful / estimate.seconds / speed:.0%}); {estimate.waiting:.2f} s of traffic a step if none of it "
        f"is hidden ({LINK / 1e9:.0f} GB/s between GPUs, {HOST / 1e9:.0f} GB/s to the host: assumed)"
    )


COLUMNS = (
    "language model",
    "launch",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "other",
    "all",
    "fits",
)


def _comparison(rows: Sequence[tuple[str, Estimate]]) -> Table:
    table = Table(*COLUMNS, title="other settings, GiB on each rank", title_justify="left")
    for row in comparison_rows(rows):
        table.add_row(*row)
    return table


def comparison_rows(rows: Sequence[tuple[str, Estimate]]) -> Iterator[tuple[str, ...]]:
    """The cells of each setting, under COLUMNS."""
    for kind, each in rows:
        sums = _sums(each)
        cells = map(gib, (*sums, each.total - sum(sums), each.total))
        yield kind, each.setting.strategy.name, *cells, "yes" if each.fits else "no"


def _advice(plan: Plan) -> str:
    """The fastest setting that fits, as it can be typed."""
    best = plan.best
    if best is None:
        return "nothing that was tried fits: more GPUs, a smaller model, or a shorter data.chat.max_length"
    estimate = best.estimate
    return (
        f"fastest that fits: {gib(estimate.total)} GiB, {estimate.seconds:.2f} s a step and "
        f"{estimate.waiting:.2f} s of traffic\n  {_command(best)}"
    )


def _command(best: Found) -> str:
    setting = best.estimate.setting
    changes = " ".join(f"'{each}'" if " " in each else each for each in best.overrides)
    launch = f"accelerate launch --config_file {setting.strategy.launch} --num_processes {setting.world}"
    return f"{launch} -m vlmtune train RECIPE {changes}".rstrip()


def gib(size: int) -> str:
    """GiB, to two decimals."""
    return f"{size / 2**30:.2f}"


# ---------------------------------------------------------------- JSON


def json_text(plans: Sequence[Plan]) -> str:
    """All plans as one JSON list."""
    return json.dumps([as_json(plan) for plan in plans], indent=1)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan in numbers; memory in bytes on one rank."""
    return {
        "recipe": plan.recipe.name,
        "stage": plan.recipe.stage,
        "memory": _memory_json(plan.estimate),
        "parts": {part: _held_json(held) for part, held in plan.estimate.parts.items()},
        "samples": {"total": plan.lengths.total, "origin": plan.lengths.origin},
        "ranks": [asdict(row) for row in plan.schedule.ranks()],
        "imbalance": plan.schedule.imbalance,
        "hangs": [str(fault) for fault in plan.hangs],
        "operations": {name: asdict(cost) for name, cost in plan.estimate.operations.items()},
        "steps": plan.steps,
        "seconds_per_step": plan.estimate.seconds,
        "hours": plan.hours,
        "settings": [{"language": kind} | _memory_json(each) for kind, each in plan.others],
        "best": None
        if plan.best is None
        else _memory_json(plan.best.estimate) | {"overrides": plan.best.overrides},
    }


def _memory_json(estimate: Estimate) -> dict[str, Any]:
    return {
        "strategy": estimate.setting.strategy.name,
        **_held_json(estimate.held),
        "activations": dict(estimate.footprint.saved),
        "logits": estimate.footprint.logits,
        "working": estimate.footprint.working,
        "buffers": estimate.buffers,
        "runtime": RUNTIME,
        "total": estimate.total,
        "fits": estimate.fits,
        "seconds": estimate.seconds,
        "traffic_seconds": estimate.waiting,
        "worst": {"tokens": estimate.worst.computed, "images": estimate.worst.images},
    }


def _held_json(held: Any) -> dict[str, int]:
    sizes = ("parameters", "gradients", "optimizer", "host")
    return dict(zip(sizes, (held.parameters, held.gradients, held.optimizer, held.host), strict=True))


__all__ = ["COLUMNS", "as_json", "comparison_rows", "gib", "json_text", "show"]
