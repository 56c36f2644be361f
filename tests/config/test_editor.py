from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlmtune.config import mix_schema, recipe_schema
from vlmtune.config.plugins import PROJECTOR_TYPES
from vlmtune.config.schema import Recipe


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for child in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from nodes(child)


def test_the_recipe_schema_knows_every_key_a_file_may_hold():
    schema = recipe_schema()
    assert set(schema["properties"]) == {*Recipe.model_fields, "extends", "stages", "lock"} - {"stage"}
    assert set(schema["$defs"]["Stage"]["properties"]) == {*Recipe.model_fields} - {"stage", "name"}
    assert schema["properties"]["stages"]["anyOf"][0]["additionalProperties"] == {"$ref": "#/$defs/Stage"}


def test_every_key_is_optional_and_unknown_ones_stay_refused():
    schema = recipe_schema()
    assert not any(isinstance(node.get("required"), list) for node in nodes(schema))
    assert not any("oneOf" in node for node in nodes(schema))
    closed = [name for name, node in schema["$defs"].items() if node.get("additionalProperties") is False]
    assert set(schema["$defs"]) - set(closed) == {"Custom"}
    assert schema["additionalProperties"] is False


def test_references_lead_somewhere():
    for schema in (recipe_schema(), mix_schema()):
        names = [
            node["$ref"].removeprefix("#/$defs/")
            for node in nodes(schema)
            if isinstance(node.get("$ref"), str)
        ]
        assert len(names) > 3
        assert set(names) <= set(schema["$defs"])


def test_docstrings_and_choices_reach_the_editor():
    defs = recipe_schema()["$defs"]
    assert defs["RunConfig"]["properties"]["keep"]["description"].startswith("Checkpoints kept")
    assert defs["RunConfig"]["properties"]["precision"]["enum"] == ["fp32", "bf16"]
    types = {node.get("properties", {}).get("type", {}).get("const") for node in defs.values()}
    assert set(PROJECTOR_TYPES) <= types


def test_the_mix_schema_lists_the_formats():
    schema = mix_schema()
    formats = {node.get("properties", {}).get("format", {}).get("const") for node in schema["$defs"].values()}
    assert formats >= {"llava_json", "chat_jsonl", "hf_dataset", "easy_vqa"}
    assert schema["required"] == ["sources"]
