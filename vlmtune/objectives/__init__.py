"""Objectives by name: a bare name is a file here with one Objective class; a dotted name is imported as written."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vlmtune.config.plugins import NextTokenConfig
from vlmtune.config.section import Custom

if TYPE_CHECKING:
    from torch import nn

    from vlmtune.objectives.base import Objective


def build_objective(config: NextTokenConfig | Custom, model: nn.Module) -> Objective:
    """The objective of the recipe around `model`."""
    from vlmtune.objectives.base import Objective

    if isinstance(config, Custom):
        module, _, name = config.type.rpartition(".")
        return importlib.import_module(module).__dict__[name](config, model)
    module = importlib.import_module(f"vlmtune.objectives.{config.type}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    )
    return found(config, model)
