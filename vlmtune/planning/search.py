"""The settings beside a recipe's own: what each needs, and the fastest that fits.

Every setting is the recipe with overrides, read by the recipe's own loader: what is printed can be typed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from vlmtune.config.loader import load_recipe
from vlmtune.config.schema import Recipe
from vlmtune.config.tuning import Full
from vlmtune.planning.estimate import Draft, Estimate, Estimator, runs
from vlmtune.planning.strategies import STRATEGIES, Strategy

_ADAPTERS = {
    "LoRA": "tuning.language={mode: lora, rank: 128, lr: 2e-4}",
    "QLoRA": "tuning.language={mode: qlora, rank: 128, lr: 2e-4}",
}
"""LLaVA's finetune_lora.sh, and the same on 4-bit weights."""
_BUDGETS = (4.0, 2.0, 1.0, 0.5)
"""Micro-batch budgets that are tried, as multiples of the recipe's."""
_SHOWN = {"ddp", "zero2", "zero3"}
"""Strategies that adapters are shown under."""


@dataclass(frozen=True)
class Source:
    """Where a stage's recipe is read from."""

    path: Path
    overrides: tuple[str, ...]
    stage: int

    def read(self, more: Sequence[str] = ()) -> Recipe:
        """The stage with more overrides."""
        return load_recipe(self.path, [*self.overrides, *more])[self.stage]


@dataclass(frozen=True)
class Found:
    """A setting that fits."""

    estimate: Estimate
    overrides: tuple[str, ...]
    """Beside those already given."""


def compare(source: Source, estimator: Estimator) -> list[tuple[str, Estimate]]:
    """The recipe under every strategy that can run it, then with adapters in place of full tuning."""
    own = source.read()
    rows = [(_kind(own), each) for each in _under(own, STRATEGIES.values(), estimator)]
    if isinstance(own.tuning.language, Full):
        few = [strategy for name, strategy in STRATEGIES.items() if name in _SHOWN]
        for kind, override in _ADAPTERS.items():
            rows += [(kind, each) for each in _under(source.read([override]), few, estimator)]
    return rows


def cheapest(source: Source, estimator: Estimator) -> Found | None:
    """The setting that fits and takes least time for a step; one that trains the same weights before any other.

    None when nothing fits. Trained weights that are bfloat16 without float32 masters are no setting to advise.
    Activations are measured from the fastest on, until one fits.
    """
    for tuning in _tunings(source.read()):
        drafts = [
            (overrides, strategy, estimator.draft(recipe, strategy))
            for overrides, recipe in _variants(source, tuning)
            for strategy in STRATEGIES.values()
            if runs(recipe, strategy)
        ]
        drafts.sort(key=lambda each: _preference(*each))
        for overrides, strategy, draft in drafts:
            if draft.least > draft.machine.memory or not draft.learns:
                continue
            estimate = estimator.estimate(draft.recipe, strategy)
            if estimate.fits:
                return Found(estimate, overrides)
    return None


def _preference(overrides: Sequence[str], strategy: Strategy, draft: Draft) -> tuple[float, float, int]:
    """Time of a step to two digits, then the recipe as it is, then the simpler strategy."""
    return float(f"{draft.seconds + draft.waiting:.2g}"), len(overrides), [*STRATEGIES].index(strategy.name)


def _under(recipe: Recipe, strategies: Sequence[Strategy], estimator: Estimator) -> Iterator[Estimate]:
    return (estimator.estimate(recipe, strategy) for strategy in strategies if runs(recipe, strategy))


def _tunings(own: Recipe) -> list[tuple[str, ...]]:
    """The recipe's own way first; adapters where the language model is trained whole."""
    others = [(override,) for override in _ADAPTERS.values()] if isinstance(own.tuning.language, Full) else []
    return [(), *others]


def _variants(source: Source, tuning: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Recipe]]:
    """Overrides and recipe for each budget of a micro-batch, with and without checkpointing."""
    own = source.read()
    stream = own.data.chat
    assert stream is not None  # the loader has seen to it
    budgets = dict.fromkeys(
        max(round(stream.micro_tokens * factor), stream.max_length) for factor in _BUDGETS
    )
    for budget, checkpointing in product(budgets, (False, True)):
        overrides = [*tuning]
        if budget != stream.micro_tokens:
            overrides.append(f"data.chat.micro_tokens={budget}")
        if checkpointing != own.run.activation_checkpointing:
            overrides.append(f"run.activation_checkpointing={str(checkpointing).lower()}")
        yield tuple(overrides), source.read(overrides)


def _kind(recipe: Recipe) -> str:
    return recipe.tuning.language.mode


__all__ = ["Found", "Source", "cheapest", "compare"]
