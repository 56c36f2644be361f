"""The method of each part, from what the command line says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from vlmtune.errors import RecipeError
from vlmtune.export.combine import METHODS, Method
from vlmtune.export.weights import PARTS


def part_methods(default: str, shared: Mapping[str, Any], parts: Sequence[str] = ()) -> dict[str, Method]:
    """The method of every part. `default` is that of the parts which `parts` does not name.

    `shared` are settings of all methods that have them; each of `parts` is `part=method`, with settings of its
    own behind it: `language=ties,density=0.3`. Raises RecipeError for a word that means nothing.
    """
    chosen = {part: (default, {}) for part in PARTS.values()} | dict(map(_parsed, parts))
    methods = {part: _method(name, {**shared, **own}, own) for part, (name, own) in chosen.items()}
    idle = [key for key in shared if not any(key in _settings(type(each)) for each in methods.values())]
    if idle:
        raise RecipeError(
            f"--{idle[0]} changes nothing",
            "vlmtune merge",
            f"No part is merged by a method that has {idle[0]}.",
        )
    return methods


def _parsed(text: str) -> tuple[str, tuple[str, dict[str, float]]]:
    head, *settings = text.split(",")
    part, _, method = head.partition("=")
    if part not in PARTS.values():
        raise RecipeError(
            f"there is no part {part!r}", f"--part {text}", f"Parts: {', '.join(PARTS.values())}."
        )
    try:
        pairs = {key: float(value) for key, value in (each.split("=") for each in settings)}
    except ValueError as error:
        raise RecipeError(
            "a setting is a name, = and a number", f"--part {text}", "Such as language=ties,density=0.3."
        ) from error
    return part, (method, pairs)


def _method(name: str, settings: Mapping[str, Any], own: Mapping[str, Any]) -> Method:
    if name not in METHODS:
        raise RecipeError(f"there is no method {name!r}", "vlmtune merge", f"Methods: {', '.join(METHODS)}.")
    kind = METHODS[name]
    known = _settings(kind)
    for key in own:
        if key not in known:
            raise RecipeError(
                f"{name} has no setting {key!r}", "--part", f"It has: {', '.join(known) or 'none'}."
            )
    return kind(**{key: value for key, value in settings.items() if key in known})


def _settings(kind: type[Method]) -> list[str]:
    return [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
