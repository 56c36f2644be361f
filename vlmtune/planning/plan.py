"""What a run will take, before it is launched: memory by rank, batches by rank, operations, steps and hours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmtune.config.loader import load_recipe
from vlmtune.config.schema import Recipe
from vlmtune.errors import Fault, RecipeError
from vlmtune.planning.bases import model_config
from vlmtune.planning.batches import Schedule
from vlmtune.planning.estimate import Estimate, Estimator, Machine, runs
from vlmtune.planning.lengths import Lengths, sample_lengths
from vlmtune.planning.search import Found, Source, cheapest, compare
from vlmtune.planning.strategies import STRATEGIES, Strategy

CACHE = Path(".cache/vlmtune")
"""Where a run keeps its indices too."""
_UNITS = {"": 1, "B": 1, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


@dataclass(frozen=True)
class Plan:
    """One stage's plan."""

    recipe: Recipe
    lengths: Lengths
    schedule: Schedule
    estimate: Estimate
    """Of the recipe as it is, under the chosen strategy."""
    others: tuple[tuple[str, Estimate], ...]
    """How the language model is trained, and the estimate, for other settings."""
    best: Found | None
    """The fastest setting that fits."""
    hangs: tuple[Fault, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        if self.recipe.schedule.steps is not None:
            return self.recipe.schedule.steps
        stream = self.recipe.data.chat
        assert stream is not None  # the loader has seen to it
        per_epoch = -(-self.lengths.total // stream.batch_size)
        return max(round(per_epoch * (self.recipe.schedule.epochs or 0)), 1)

    @property
    def hours(self) -> float:
        """By the stated MFU; loading, saving and traffic that is not hidden come on top."""
        return self.steps * self.estimate.seconds / 3600


def make_plans(
    path: Path,
    overrides: Sequence[str],
    machine: Machine,
    strategy: str | None = None,
    samples: int | None = None,
    cache: Path = CACHE,
) -> tuple[Plan, ...]:
    """A plan for each stage of the recipe. Raises RecipeError for a base whose sizes are not known here."""
    chosen = _strategy(strategy)
    count = len(load_recipe(path, overrides))
    sources = [Source(path, tuple(overrides), stage) for stage in range(count)]
    return tuple(_plan(source, machine, chosen, samples, cache) for source in sources)


def _plan(
    source: Source, machine: Machine, strategy: Strategy | None, samples: int | None, cache: Path
) -> Plan:
    recipe = source.read()
    if recipe.data.chat is None:
        raise RecipeError("only conversations can be planned", "data", "Give data.chat.")
    if strategy is not None and not runs(recipe, strategy):
        what = f"{strategy.name} cannot share out 4-bit weights or 8-bit moments"
        raise RecipeError(what, "--strategy", "Choose ddp, or another tuning or optimizer.")
    config = model_config(recipe.model, source.path.absolute().parent)
    lengths = sample_lengths(recipe, config, samples, cache)
    estimator = Estimator(config, lengths, machine)
    others = compare(source, estimator)
    own = [each for _, each in others if each.recipe == recipe]
    if strategy is None:
        estimate = next(
            (each for each in own if each.fits and each.learns), min(own, key=lambda each: each.total)
        )
    else:
        estimate = next(each for each in own if each.setting.strategy == strategy)
    schedule = estimator.schedule(recipe)
    best = cheapest(source, estimator)
    return Plan(recipe, lengths, schedule, estimate, tuple(others), best, tuple(schedule.hangs()))


def bytes_of(text: str) -> int:
    """The number of bytes that "80GiB", "24 GB" or "1000" stands for; raises RecipeError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise RecipeError(f"no amount of memory: {text!r}", "--memory", "Write it as 80GiB or 24GB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _strategy(name: str | None) -> Strategy | None:
    if name is None:
        return None
    for known, strategy in STRATEGIES.items():
        if known == name:
            return strategy
    raise RecipeError(f"no strategy {name!r}", "--strategy", f"Known: {', '.join(STRATEGIES)}.")


__all__ = ["Plan", "bytes_of", "make_plans"]
