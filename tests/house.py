"""The source files of vlmtune as syntax trees, for the rules of test_architecture.py."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Module:
    """A source file: its path from the repository's root, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return [*ast.walk(self.tree)]

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def parts(self) -> tuple[str, ...]:
        """The names below vlmtune: ("data", "images") for vlmtune/data/images.py."""
        return Path(self.path).with_suffix("").parts[1:]

    @property
    def room(self) -> str:
        return self.parts[0]

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"

    def foreign(self, node: ast.AST) -> bool:
        """Whether the node's first line says that another library dictates it."""
        return "# foreign:" in self.lines[node.lineno - 1]


Rule = Callable[[list[Module]], Iterator[str]]
HOUSE = [
    Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "vlmtune").rglob("*.py"))
]


def obeyed(rule: Rule, *, breaks: dict[str, str], keeps: dict[str, str] | None = None) -> None:
    """Asserts that the house obeys, that `breaks` (path -> text) offends, and that `keeps` does not."""
    assert len(HOUSE) > 20
    offences = [*rule(HOUSE)]
    assert not offences, "\n" + "\n".join(offences)
    assert [*rule([Module(path, text) for path, text in breaks.items()])], "the rule cannot fail"
    innocents = [*rule([Module(path, text) for path, text in (keeps or {}).items()])]
    assert not innocents, innocents


@dataclass(frozen=True)
class Import:
    node: ast.AST
    name: str
    """Full dotted name of what is imported."""
    top: bool
    """At import time, so neither inside a function nor for type checkers only."""
    typing: bool
    """Under `if TYPE_CHECKING`."""


def imports(module: Module) -> list[Import]:
    found: list[Import] = []

    def visit(node: ast.AST, top: bool, typing: bool) -> None:
        for name in imported_names(module, node):
            found.append(Import(node, name, top and not typing, typing))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside, typing or (guarded and child in node.body))

    visit(module.tree, True, False)
    return found


def imported_names(module: Module, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ["vlmtune", *module.parts][: -node.level] if node.level else []
    base = ".".join([*package, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]
