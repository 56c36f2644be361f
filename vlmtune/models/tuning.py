"""Which weights are trained: per part none, all or its adapters, never those that no gradient reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlmtune.config.tuning import Adapters, Frozen, Full, Part, PartTuning, Trained, TuningConfig
from vlmtune.models.projectors import projector_class
from vlmtune.models.questioner import train_row
from vlmtune.models.vision import projector_config, tower_family
from vlmtune.models.vlm import VLMConfig

if TYPE_CHECKING:
    from rich.table import Table

PART_PREFIXES: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "language": ("model.language_model.", "lm_head."),
}
ADAPTER = "default"
"""peft's name for the only adapter of a layer."""


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
    Adapters must be in place (see adapters.adapt).
    """
    modes = tuning.parts()
    unreached = unreached_prefixes(model.config)
    total, trainable, unreachable = ({part: 0 for part in PART_PREFIXES} for _ in range(3))
    for name, weight in model.named_parameters():
        part = part_of(name)
        chosen = isinstance(modes[part], Full) or (isinstance(modes[part], Adapters) and is_adapter(name))
        reached = not f"{name}.".startswith(unreached)
        weight.requires_grad_(chosen and reached and not _held(modes[part]))
        total[part] += weight_count(weight)
        trainable[part] += weight.numel() if weight.requires_grad else 0
        unreachable[part] += weight.numel() if chosen and not reached else 0
    for part, mode in modes.items():
        assert isinstance(mode, Full | Frozen) or _has_adapters(model, part), f"{part}: adapt the model first"
    if trains_row(model, tuning):
        train_row(model, model.config.questioner_token_id)
        trainable["language"] += model.config.get_text_config().hidden_size
    return tuple(
        _row(part, mode, total[part], trainable[part], unreachable[part]) for part, mode in modes.items()
    )


def trains_row(model: LlavaForConditionalGeneration, tuning: TuningConfig) -> bool:
    """Whether one row of the embeddings is trained by itself: the questioner's token, in a part that is not."""
    marked = isinstance(model.config, VLMConfig) and model.config.questioner_token_id is not None
    return marked and not isinstance(tuning.language, Full)


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its full name, is an adapter's."""
    return ".lora_" in name


def weight_count(weight: nn.Parameter) -> int:
    """Single weights; a byte of a 4-bit layer holds two."""
    state = vars(weight).get("quant_state")
    return weight.numel() if state is None else state.shape.numel()


def _held(mode: PartTuning) -> bool:
    return isinstance(mode, Adapters) and mode.no_grad


def _has_adapters(model: nn.Module, part: Part) -> bool:
    return any(is_adapter(name) and part_of(name) == part for name, _ in model.named_parameters())


def _row(part: Part, mode: PartTuning, total: int, trainable: int, unreachable: int) -> PartRow:
    lr, decay = (mode.lr, mode.weight_decay) if isinstance(mode, Trained) else (None, None)
    shown = f"{mode.mode} {mode.rank}" if isinstance(mode, Adapters) else mode.mode
    return PartRow(part, total, trainable, unreachable, shown, lr, decay)


def unreached_prefixes(config: LlavaConfig) -> tuple[str, ...]:
    """Full prefixes, each with a dot at its end, of the weights that the image tokens do not depend on."""
    vision = config.vision_config
    tower = tower_family(vision).unreached(vision.num_hidden_layers, config.vision_feature_layer)
    projector = projector_class(projector_config(config)).unreached
    return tuple(f"model.vision_tower.{name}." for name in tower) + tuple(
        f"model.multi_modal_projector.{name}." for name in projector
    )


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
