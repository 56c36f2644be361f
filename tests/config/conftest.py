"""A working directory with a mix and a recipe of two stages, and the means to write more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from vlmtune.config import load_recipe
from vlmtune.errors import RecipeError

Write = Callable[[str, str], Path]

MIX = """\
description: colours and shapes
sources:
  - {name: easy, format: easy_vqa}
"""
BASE = """\
name: base
model:
  vision: {path: openai/clip}
  projector: {type: pixel_shuffle, factor: 3}
  language: {path: x/y}
data:
  chat:
    mix: data_mixes/easy.yaml
    batch_size: 8
optim: {lr: 1e-4}
schedule: {type: cosine, epochs: 1}
stages:
  align:
    optim: {lr: 1e-3}
  tune:
    tuning:
      vision: {mode: full, lr: 1e-5}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file below the working directory, which holds recipes/base.yaml and its mix."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")
        return path

    write("data_mixes/easy.yaml", MIX)
    write("recipes/base.yaml", BASE)
    return write


def faults(path: Path, *overrides: str) -> list[str]:
    """The faults of a recipe, as the lines a user reads."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [str(fault) for fault in caught.value.faults]
