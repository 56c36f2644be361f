"""What every part of the recipe is made of: frozen, no unknown keys, plug-ins told apart by name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen part of the recipe that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Custom(BaseModel):
    """A plug-in outside vlmtune, named by its import path (`my_pkg.losses.Focal`)."""

    model_config = ConfigDict(frozen=True, extra="allow")
    type: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")


def _tag(value: Any, key: str) -> str:
    """The kind that a mapping, or a section already made, names; empty for anything else."""
    if isinstance(value, dict):
        return str(value.get(key, ""))
    return str(vars(value).get(key, "")) if isinstance(value, BaseModel) else ""


def type_tag(value: Any) -> str:
    name = _tag(value, "type")
    return "custom" if "." in name else name


def mode_tag(value: Any) -> str:
    return _tag(value, "mode")
