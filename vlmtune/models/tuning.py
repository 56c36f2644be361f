"""Which weights are trained: per part frozen or full, never those that no gradient reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlmtune.config.tuning import Full, PartTuning, TuningConfig
from vlmtune.models.vision import tower_family

if TYPE_CHECKING:
    from rich.table import Table

Part = Literal["vision", "projector", "language"]

PART_PREFIXES: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "language": ("model.language_model.", "lm_head."),
}


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part of the model as it is trained; counts are of single weights."""

    part: Part
    total: int
    trainable: int
    unreachable: int
    """Weights frozen although the part is trained, because the loss does not depend on them."""
    mode: str
    lr: float | None
    """None: the recipe's optim.lr."""
    weight_decay: float | None
    """None: the recipe's optim.weight_decay."""


def part_of(parameter: str) -> Part:
    """The part that a parameter belongs to, by its full name."""
    for part, prefixes in PART_PREFIXES.items():
        if parameter.startswith(prefixes):
            return part
    raise AssertionError(f"{parameter} belongs to no part")


def apply_tuning(model: LlavaForConditionalGeneration, tuning: TuningConfig) -> tuple[PartRow, ...]:
    """One row a part, after setting `requires_grad` of every weight.

    A trainable weight without gradient breaks DDP (unsynchronised or hanging ranks) with the right loss and
    no error: those behind the feature layer stay frozen. A tied lm_head counts once, as the embedding it is.
    """
    modes: dict[Part, PartTuning] = {
        "vision": tuning.vision,
        "projector": tuning.projector,
        "language": tuning.language,
    }
    unreached = unreached_prefixes(model.config)
    total, trainable, unreachable = ({part: 0 for part in PART_PREFIXES} for _ in range(3))
    for name, weight in model.named_parameters():
        part = part_of(name)
        full = isinstance(modes[part], Full)
        reached = not f"{name}.".startswith(unreached)
        weight.requires_grad_(full and reached)
        total[part] += weight.numel()
        trainable[part] += weight.numel() if full and reached else 0
        unreachable[part] += weight.numel() if full and not reached else 0
    return tuple(
        _row(part, mode, total[part], trainable[part], unreachable[part]) for part, mode in modes.items()
    )


def _row(part: Part, mode: PartTuning, total: int, trainable: int, unreachable: int) -> PartRow:
    lr, decay = (mode.lr, mode.weight_decay) if isinstance(mode, Full) else (None, None)
    return PartRow(part, total, trainable, unreachable, mode.mode, lr, decay)


def unreached_prefixes(config: LlavaConfig) -> tuple[str, ...]:
    """Full prefixes, each with a dot at its end, of the weights that the image features do not depend on."""
    vision = config.vision_config
    names = tower_family(vision).unreached(vision.num_hidden_layers, config.vision_feature_layer)
    return tuple(f"model.vision_tower.{name}." for name in names)


def table(rows: tuple[PartRow, ...]) -> Table:
    """The rows for the terminal."""
    from rich.table import Table

    shown = Table("part", "weights", "trained", "mode", "learning rate", "weight decay", "unreachable")
    for row in rows:
        rates = (
            "" if row.mode == "frozen" else "optim's" if rate is None else f"{rate:g}"
            for rate in (row.lr, row.weight_decay)
        )
        shown.add_row(
            row.part, f"{row.total:,}", f"{row.trainable:,}", row.mode, *rates, f"{row.unreachable:,}"
        )
    return shown
