"""JSON Schemas for editors (yaml-language-server): completion, and the docstrings of the fields on hover."""

from __future__ import annotations

from typing import Any

from vlmtune.config.mix import Mix
from vlmtune.config.schema import Recipe

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_EXTENDS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "Recipes under this one, relative to this file; a later one wins, this file over all.",
}
_STAGES = {
    "anyOf": [
        {"type": "object", "additionalProperties": {"$ref": "#/$defs/Stage"}, "minProperties": 1},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
    ],
    "description": "Stages in order, each with what it changes; or a list that chooses among inherited ones.",
}
_LOCK = {"type": "object", "description": "Versions and hashes; written by vlmtune into recipe.lock.yaml."}


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, in which every key is optional: `extends` or a stage may bring it."""
    schema = _partial(Recipe.model_json_schema())
    keys = {name: value for name, value in schema["properties"].items() if name != "stage"}
    stage = {name: value for name, value in keys.items() if name != "name"}
    schema["$defs"]["Stage"] = {
        "type": "object",
        "description": "What one stage changes.",
        "properties": stage,
        "additionalProperties": False,
    }
    properties = {"extends": _EXTENDS, **keys, "stages": _STAGES, "lock": _LOCK}
    return {"$schema": _DRAFT, **schema, "properties": properties}


def mix_schema() -> dict[str, Any]:
    """The JSON Schema of a data mix file."""
    return {"$schema": _DRAFT, **Mix.model_json_schema()}


def _partial(node: Any, *, names: bool = False) -> Any:
    """The schema without `required`, and with anyOf for oneOf: half a mapping fits several kinds.

    `names` says that the node's keys are the user's own names, not words of JSON Schema.
    """
    if isinstance(node, list):
        return [_partial(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        ("anyOf" if key == "oneOf" and not names else key): _partial(
            value, names=key in ("properties", "$defs") and not names
        )
        for key, value in node.items()
        if names or key != "required"
    }
