"""YAML as a tree whose every value remembers the line that wrote it.

The scalars are YAML 1.2's, not PyYAML's 1.1: `1e-4` is a number, `no` and `12:30` are text, and dates do not
exist. Aliases and tags are refused: they hide where a value comes from (and `extends` does their work).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlmtune.config.locate import like, shown_path
from vlmtune.errors import Fault

MAX_DEPTH = 40
"""Levels of nesting; far above any recipe, far below the recursion limits of those who read the tree."""

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars above and without aliases."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own name and form)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not used here", problem_mark=mark)
        return super().compose_node(parent, index)


for _kind, (_pattern, _first) in _RESOLVERS.items():
    Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _first)


class Place(NamedTuple):
    """Where a value was written: a line of a file, or (line None) the command line."""

    name: str
    line: int | None
    folder: Path
    """Absolute folder that relative paths written here start from."""

    def __str__(self) -> str:
        return self.name if self.line is None else f"{self.name}:{self.line}"


@dataclass(frozen=True, slots=True)
class Tree:
    """A value (a mapping or list of trees, or a scalar), where its key stands, and its path as written."""

    value: Any
    where: Place
    path: tuple[str, ...] = ()

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def deepest(self, keys: Sequence[str | int]) -> tuple[Tree, tuple[str | int, ...]]:
        """The last tree that exists on the way along the keys, and the keys that are left."""
        if keys:
            head, *rest = keys
            if isinstance(self.value, dict) and head in self.value:
                return self.value[head].deepest(rest)
            if isinstance(self.value, list) and isinstance(head, int) and head < len(self.value):
                return self.value[head].deepest(rest)
        return self, tuple(keys)

    def find(self, keys: Sequence[str | int]) -> Tree | None:
        """The tree at the keys, or None."""
        tree, left = self.deepest(keys)
        return None if left else tree

    def replaced(self, keys: Sequence[str], value: Any) -> Tree:
        """The tree with the value at the keys, which exist, exchanged."""
        if not keys:
            return replace(self, value=value)
        child = self.value[keys[0]].replaced(keys[1:], value)
        return replace(self, value={**self.value, keys[0]: child})


def merge(base: Tree, over: Tree, plugs: Mapping[tuple[str, ...], str], at: tuple[str, ...] = ()) -> Tree:
    """`over` laid on `base`: mappings merge, lists and scalars replace.

    `plugs` tells which key chooses the kind of the mapping at a path: where that changes, the old options
    mean nothing to the new kind, so the mapping replaces too.
    """
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    old, new = (tree.find((plugs.get(at, ""),)) for tree in (base, over))
    if old is not None and new is not None and old.plain() != new.plain():
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = merge(merged[key], child, plugs, (*at, key)) if key in merged else child
    return replace(over, value=merged)


def read_file(path: Path, faults: list[Fault]) -> Tree | None:
    """The tree of a YAML file; None, with a fault, when it cannot be read."""
    name = shown_path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        faults.append(Fault(f"not UTF-8 text (byte {error.start})", name, "Save the file as UTF-8."))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        faults.append(Fault(f"cannot be read: {reason}", name, like(str(path), Path())))
    else:
        folder = Path(os.path.abspath(path)).parent
        return read_text(text, lambda line: Place(name, line, folder), (), faults)
    return None


def read_text(
    text: str, place: Callable[[int], Place], path: tuple[str, ...], faults: list[Fault]
) -> Tree | None:
    """The tree of YAML text whose lines are at `place`; None, with a fault, when it is not YAML."""
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        reason = ", ".join(filter(None, (error.context, error.problem)))
        faults.append(Fault(f"not valid YAML: {reason}", str(place(line)), _YAML_REMEDY))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        faults.append(Fault(f"not valid YAML: {error.reason}", str(place(line)), _YAML_REMEDY))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        faults.append(Fault(f"not valid YAML: {reason}", str(place(1)), _YAML_REMEDY))
    else:
        if node is None:
            return Tree(None, place(1), path)
        return _Grower(place, faults).grow(node, place(node.start_mark.line + 1), path)
    return None


_YAML_REMEDY = "Check the indentation, the colons and the quotes at and above this line."


@dataclass(frozen=True, slots=True)
class _Grower:
    """Turns PyYAML's nodes into trees and notes what does not belong in a recipe."""

    place: Callable[[int], Place]
    faults: list[Fault]

    def grow(self, node: yaml.Node, where: Place, path: tuple[str, ...]) -> Tree:
        if len(path) > MAX_DEPTH:
            self._refuse(f"{'.'.join(path[:3])}... is nested more than {MAX_DEPTH} levels deep", where)
            return Tree(None, where, path)
        if isinstance(node, yaml.ScalarNode):
            return Tree(self._scalar(node, where, path), where, path)
        if node.tag not in (_TAG + "map", _TAG + "seq"):
            self._refuse(f"the tag {node.tag} is not used here", where, "Remove it.")
        if isinstance(node, yaml.MappingNode):
            return Tree(self._mapping(node, path), where, path)
        items = enumerate(node.value)
        return Tree([self.grow(item, self._at(item), (*path, str(i))) for i, item in items], where, path)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Tree]:
        children: dict[str, Tree] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse("a key must be a plain word", self._at(key), "Write `key: value`.")
                continue
            name, below = key.value, (*path, key.value)
            if name in children:
                first = children[name].where
                self._refuse(f"{'.'.join(below)} is given twice", self._at(key), f"The first is at {first}.")
            children[name] = self.grow(value, self._at(key), below)
        return children

    def _scalar(self, node: yaml.ScalarNode, where: Place, path: tuple[str, ...]) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind not in _VALUES:
            self._refuse(f"the tag {node.tag} is not used here", where, "Remove it.")
            return text
        try:
            return _VALUES[kind](text)
        except (ValueError, KeyError, OverflowError):
            self._refuse(f"{'.'.join(path)}: {text[:40]} is not a usable {kind}", where)
            return None

    def _at(self, node: yaml.Node) -> Place:
        return self.place(node.start_mark.line + 1)

    def _refuse(self, what: str, where: Place, remedy: str = "") -> None:
        self.faults.append(Fault(what, str(where), remedy))


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


_VALUES: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": int,
    "float": _finite,
    "str": str,
}
