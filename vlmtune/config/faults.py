"""Pydantic's errors in plain words: the line, the dotted path, the reason and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vlmtune.config.schema import Recipe
from vlmtune.config.shape import Trace, choices, chooser, is_section, plugs, section, trace
from vlmtune.config.tree import Tree
from vlmtune.errors import Fault

Model = TypeVar("Model", bound=BaseModel)
Renamed = Mapping[str, tuple[str, str]]
"""Dotted keys of earlier versions: old -> (new, the version that renamed it)."""

_WANTED = {
    "string_type": "should be text (put it in quotes)",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping (`key: value` lines)",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
}


def validate(
    model: type[Model],
    tree: Tree,
    faults: list[Fault],
    *,
    renamed: Renamed | None = None,
    complete: bool = True,
) -> Model | None:
    """The tree as a model; None, with a fault for every error, when it is not one.

    `complete` False says that a part of the tree could not be read: what is missing is then no fault.
    """
    moved = [(old, *names) for old, names in (renamed or {}).items() if tree.find(old.split("."))]
    faults += [_moved(tree, *names) for names in moved]
    try:
        found = model.model_validate(_with_kinds(model, tree))
    except ValidationError as error:
        silent = {"missing", "value_error"} if not complete else set()
        told = [name for old, new, _ in moved for name in (old, new)]
        for one in map(_of_kinds, error.errors(include_url=False)):
            path = trace(model, one["loc"])
            dotted = ".".join(map(str, path.keys))
            known = one["type"] in silent or any(_on_one_line(dotted, name) for name in told)
            if not known and (fault := _fault(one, path, tree)):
                faults.append(fault)
        return None
    return None if moved else found


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean x? Known: x, y` for a name that is not among the known ones."""
    names = list(known)
    close = get_close_matches(name.lower(), names, n=1)
    return f"{f'Did you mean {close[0]}? ' if close else ''}Known: {', '.join(names) or 'none'}"


def shown(value: Any) -> str:
    """A value as a message quotes it: short, text in quotes."""
    text = "empty" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def known_keys(holder: Any) -> list[str]:
    """The keys a user may write in a section (the file's top level also takes extends and stages)."""
    names = [*holder.model_fields] if is_section(holder) else []
    return [*(name for name in names if name != "stage"), "extends", "stages"] if holder is Recipe else names


def _on_one_line(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _moved(tree: Tree, old: str, new: str, since: str) -> Fault:
    node, _ = tree.deepest(old.split("."))
    return Fault(f"{node.dotted} is called {new} since version {since}", str(node.where), "Rename the key.")


def _with_kinds(model: type[BaseModel], tree: Tree) -> Any:
    """The plain tree, where each mapping that has to choose its kind is one pydantic can ask for it.

    A mapping that does not choose, and fits the default's kind, is of that kind (`objective.chunk=256`).
    """
    root = {"": tree.plain()}
    for plug in plugs(model):
        for holder, key in _holders(root, ("", *plug.path)):
            value = holder[key]
            if value is None and plug.optional:
                continue
            if not isinstance(value, dict):
                holder[key] = {}
            elif plug.default and plug.key not in value and set(value) <= {*type(plug.default).model_fields}:
                holder[key] = {plug.key: plug.default.model_dump()[plug.key], **value}
    return root[""]


def _holders(holder: Any, path: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """Every (mapping or list, key) that the path leads to; `*` is every item."""
    head, *rest = path
    if isinstance(holder, list) and head == "*":
        keys: list[Any] = [*range(len(holder))]
    else:
        keys = [head] if isinstance(holder, dict) and head in holder else []
    for key in keys:
        yield from _holders(holder[key], rest) if rest else [(holder, key)]


def _of_kinds(error: Any) -> Any:
    """The error, where a dotted `type` that cannot be an import path counts as an unknown one."""
    if error["type"] == "string_pattern_mismatch" and error["loc"][-2:] == ("custom", "type"):
        return {**error, "type": "union_tag_invalid", "loc": error["loc"][:-2]}
    return error


def _fault(error: Any, path: Trace, tree: Tree) -> Fault | None:
    """The fault that an error of pydantic stands for; None for an echo of another error."""
    kind, context = error["type"], error.get("ctx", {})
    keys = [key for key in path.keys if key != "[key]"]  # pydantic's way to speak of a key itself
    node, left = tree.deepest(keys)
    name = ".".join((*node.path, *map(str, left))) or "the file"
    what, remedy = f"{name} is {shown(node.plain())}", ""
    if kind == "string_type" and path.branch:
        return None  # a union's other member says it better
    if kind == "union_tag_invalid":
        return _unknown_kind(node, path.end)
    if kind == "extra_forbidden":
        what, remedy = f"{name} is not a known key", nearest(str(keys[-1]), known_keys(path.parent))
    elif kind == "literal_error":
        what = f"{name} is not a known key" if "[key]" in path.keys else what
        remedy = nearest(str(error["input"]), re.findall("'([^']*)'", context["expected"]))
    elif kind == "missing":
        what, remedy = f"{name} is missing", _help(path)
    elif kind == "value_error":
        what = f"{name}: {context['error']}"
    else:
        remedy = f"It {_wanted(error, path)}"
    return Fault(what, str(node.where), remedy)


def _unknown_kind(node: Tree, union: Any) -> Fault:
    """What is wrong with a mapping that names no known kind of the union."""
    key, known = chooser(union), [label for label in choices(union) if label != "custom"]
    own = "" if len(known) == len(choices(union)) else ", or an import path with a dot (my_pkg.module.Name)"
    if not isinstance(node.value, dict):
        example = node.value if node.value in known else known[0]
        return Fault(
            f"{node.dotted} is {shown(node.plain())}", str(node.where), f"Write {{{key}: {example}}}"
        )
    chosen = node.find([key or ""])
    if chosen is None:
        return Fault(f"{node.dotted}.{key} is missing", str(node.where), f"Known: {', '.join(known)}{own}")
    what = f"{chosen.dotted} is {shown(chosen.plain())}, which is not known"
    return Fault(what, str(chosen.where), f"{nearest(str(chosen.value), known)}{own}")


def _help(path: Trace) -> str:
    """The docstring of the missing key."""
    field = path.parent.model_fields.get(str(path.keys[-1])) if is_section(path.parent) else None
    inner = section(field.annotation) if field else None
    return (field.description if field else "") or (inner.__doc__ if inner else "") or ""


def _wanted(error: Any, path: Trace) -> str:
    if error["type"] == "model_type":
        inner = section(path.end)
        keys = f" with the keys {', '.join(inner.model_fields)}" if inner else ""
        return f"should be {'text or ' if path.branch else ''}a mapping{keys}"
    if error["type"] == "string_pattern_mismatch":
        return f"should have the form {error['ctx']['pattern']}"
    said = re.sub(r"^(Input|String|Tuple|List) ", "", error["msg"])
    return _WANTED.get(error["type"], said)
