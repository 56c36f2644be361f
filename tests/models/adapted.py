"""Tiny models with adapters, and a way to move their weights: what the tests of adapters share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.tiny import tiny_model
from vlmtune.config.tuning import TuningConfig
from vlmtune.export.compare import logits, probes
from vlmtune.export.probe import probe_batch
from vlmtune.models.adapters import adapt
from vlmtune.models.saving import save_model, saved_names
from vlmtune.models.tuning import apply_tuning, is_adapter
from vlmtune.models.vlm import VLM

FROZEN = {"mode": "frozen"}


def tuning(**parts: Any) -> TuningConfig:
    """Tuning of the named parts; the others are frozen."""
    return TuningConfig.model_validate({"vision": FROZEN, "projector": FROZEN, "language": FROZEN} | parts)


def adapted(config: TuningConfig, **model: Any) -> tuple[VLM, Any]:
    """A tiny model with the adapters of `config`, ready to train."""
    made, processor = tiny_model(**model)
    adapt(made, config, seed=0)
    apply_tuning(made, config)
    return made, processor


def shake(model: VLM, seed: int = 1) -> None:
    """Moves everything that is trained, as a training would: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.requires_grad or is_adapter(name):
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)


def answers(model: VLM, processor: Any) -> list[Tensor]:
    """The logits of the probe batch."""
    return logits(model, probes(model, probe_batch(model, processor)))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of a logit."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def save(model: VLM, processor: Any, folder) -> None:
    """As a checkpoint does."""
    state = model.state_dict()
    save_model(model, processor, folder, {name: state[name] for name in saved_names(model)})
