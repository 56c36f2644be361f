"""Optimizer groups by part, and learning rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from vlmtune.config.schema import OptimConfig, ScheduleConfig
from vlmtune.config.tuning import Full, PartTuning, Trained, TuningConfig
from vlmtune.models.adapters import demand_bitsandbytes
from vlmtune.models.questioner import EMBEDDINGS
from vlmtune.models.tuning import part_of


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], tuning: TuningConfig, config: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW with one group for each part and decay; vectors (biases, norms, DoRA's magnitudes) are never decayed.

    Parameters outside the model (an objective's own helpers) form the group `objective` at optim.objective_lr.
    Embeddings of which one row is trained are not decayed: the other rows would shrink.
    """
    settings: Mapping[str, PartTuning] = dict(tuning.parts())
    groups: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            part = part_of(name.removeprefix("model.")) if name.startswith("model.") else "objective"
            alone = name.endswith(EMBEDDINGS) and not isinstance(settings.get(part), Full)
            groups[part, parameter.ndim >= 2 and not alone].append(parameter)
    rows = []
    for (part, decays), parameters in groups.items():
        own = settings.get(part)
        lr, decay = (own.lr, own.weight_decay) if isinstance(own, Trained) else (None, None)
        if part == "objective":
            lr = config.objective_lr
        peak = config.lr if lr is None else lr
        decay = config.weight_decay if decay is None else decay
        rows.append(
            {
                "params": parameters,
                "lr": peak,
                "peak_lr": peak,
                "weight_decay": decay if decays else 0.0,
                "part": part,
            }
        )
    if config.type == "adamw_8bit":
        demand_bitsandbytes("optim.type adamw_8bit")
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(rows, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(rows, betas=config.betas, eps=config.eps, fused=True)


def lr_factor(step: int, total: int, config: ScheduleConfig) -> float:
    """The share of the peak learning rate at 0-based `step` of `total`.

    Warm-up rises linearly over ceil(warmup * total) steps and is already above 0 at step 0; cosine and linear then
    fall to `min_lr_ratio` at the end.
    """
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    if config.type == "constant":
        return 1.0
    done = (step - warm) / max(total - warm, 1)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if config.type == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * fall


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """The largest learning rate in force after every group is set to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return max((group["lr"] for group in optimizer.param_groups), default=0.0)
