"""The recipe and the mix: their form, and how files become them. No torch below this package."""

from __future__ import annotations

from vlmtune.config.loader import load_mix, load_recipe, mix_schema, recipe_schema

__all__ = ["load_mix", "load_recipe", "mix_schema", "recipe_schema"]
