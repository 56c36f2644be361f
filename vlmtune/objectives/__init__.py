"""Objectives by name: a bare name is a file here with one Objective class; a dotted name is imported as written."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from vlmtune.config.plugins import ObjectiveConfig
from vlmtune.config.section import Custom

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlavaProcessor

    from vlmtune.objectives.base import Objective


def build_objective(
    config: ObjectiveConfig, model: nn.Module, processor: LlavaProcessor, seed: int
) -> Objective:
    """The objective of the recipe around `model`; weights of its own are drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _class_of(config)(config, model, processor)


def _class_of(config: ObjectiveConfig) -> Callable[..., Objective]:
    from vlmtune.objectives.base import Objective

    if isinstance(config, Custom):
        module, _, name = config.type.rpartition(".")
        return importlib.import_module(module).__dict__[name]
    module = importlib.import_module(f"vlmtune.objectives.{config.type}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    )
    return found
