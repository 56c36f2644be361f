"""YAML -> Recipe: extends, stages, overrides, and every error at once with its place and the nearest name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmtune.config.drafts import parse_override, read_draft
from vlmtune.config.editor import mix_schema, recipe_schema
from vlmtune.config.faults import Renamed, shown, validate
from vlmtune.config.locate import like, locate, shown_path
from vlmtune.config.mix import Mix
from vlmtune.config.schema import DataConfig, Recipe
from vlmtune.config.tree import Tree, read_file
from vlmtune.errors import Fault, RecipeError

RENAMED: Renamed = {}
"""Recipe keys of earlier versions; a recipe that uses one is told the new name."""

STREAMS = {"next_token": "chat", "reconstruction": "chat"}
"""The stream of data that each objective reads."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, ...]:
    """The recipes of a file, one per stage in order (one, of stage "train", without `stages`).

    Each override is `key=value`, or `stages.NAME.key=value` for one stage; the later one wins. The paths of
    mixes are resolved. Raises RecipeError with every fault of the recipe, what it extends and its mixes.
    """
    faults: list[Fault] = []
    path = Path(path)
    draft = read_draft(path, faults)
    folder = path.absolute().parent
    changes = [one for text in overrides if (one := parse_override(text, folder, faults)) is not None]
    names = draft.stage_names(changes, faults)
    recipes: list[Recipe] = []
    for name in names or [None]:
        tree = _with_mixes(draft.stage(name, changes), faults)
        _check_stream(tree, faults)
        recipe = validate(Recipe, tree, faults, renamed=RENAMED, complete=draft.complete)
        recipes += [recipe] if recipe else []
    if faults:
        raise RecipeError(dict.fromkeys(faults))
    return tuple(recipes)


def load_mix(path: Path) -> Mix:
    """The mix of a file. Raises RecipeError with every fault of it."""
    faults: list[Fault] = []
    mix = _read_mix(Path(path), faults)
    if mix is None or faults:
        raise RecipeError(faults)
    return mix


def _read_mix(path: Path, faults: list[Fault]) -> Mix | None:
    tree = read_file(path, faults)
    if tree is not None and not isinstance(tree.value, dict):
        what = f"a mix is a mapping, not {shown(tree.plain())}"
        faults.append(Fault(what, str(tree.where), "Write `sources:` and a list under it."))
        return None
    return None if tree is None else validate(Mix, tree, faults)


def _with_mixes(tree: Tree, faults: list[Fault]) -> Tree:
    """The tree with its mixes' paths resolved; a mix that is missing or wrong is a fault."""
    data = tree.find(["data"])
    streams = [*data.value] if data is not None and isinstance(data.value, dict) else []
    for keys in [*(("data", stream, "mix") for stream in streams), ("evaluation", "mix")]:
        mix = tree.find(keys)
        if mix is None or not isinstance(mix.value, str):
            continue
        found = locate(mix.value, mix.where.folder)
        if found is None:
            what = f"{mix.dotted}: no file {shown(mix.value)}"
            faults.append(Fault(what, str(mix.where), like(mix.value, mix.where.folder)))
        else:
            _read_mix(found, faults)
            tree = tree.replaced(keys, shown_path(found))
    return tree


def _check_stream(tree: Tree, faults: list[Fault]) -> None:
    """Adds a fault when the objective's stream is not configured (and is not just misspelt)."""
    data, chosen = tree.find(["data"]), tree.find(["objective", "type"])
    objective = chosen.value if chosen else "next_token"
    if data is None or not isinstance(data.value, dict) or not isinstance(objective, str):
        return
    stream = STREAMS.get(objective)
    misspelt = any(key not in DataConfig.model_fields for key in data.value)
    if stream is not None and data.plain().get(stream) is None and not misspelt:
        what = f"objective {objective} reads the stream data.{stream}, which is not configured"
        faults.append(
            Fault(what, str(data.where), f"Add `{stream}:` with `mix:` and `batch_size:` under data")
        )


__all__ = ["load_mix", "load_recipe", "mix_schema", "recipe_schema"]
