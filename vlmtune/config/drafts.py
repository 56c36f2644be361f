"""A recipe before it is checked: a file with all it extends, and the overrides of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from vlmtune.config.faults import nearest, shown
from vlmtune.config.locate import like, shown_path
from vlmtune.config.schema import Recipe
from vlmtune.config.shape import plugs
from vlmtune.config.tree import Place, Tree, merge, read_file, read_text
from vlmtune.errors import Fault

LOADER_KEYS = ("extends", "stages", "lock")
"""Top-level keys that are read here and are no part of a Recipe; `lock` is what recipe.lock.yaml adds."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What every stage shares, the stages' own blocks in file order, and the stages a list chose, if any."""

    body: Tree
    blocks: dict[str, Tree] = field(default_factory=dict)
    chosen: tuple[Tree, ...] | None = None
    complete: bool = True
    """False when a file of it could not be read."""

    def under(self, over: Draft) -> Draft:
        """`over` laid on this draft. A block that only `over` knows joins the stages chosen before."""
        chosen = over.chosen
        if chosen is None and self.chosen is not None:
            new = [Tree(name, block.where) for name, block in over.blocks.items() if name not in self.blocks]
            chosen = (*self.chosen, *new)
        blocks = dict(self.blocks)
        for name, block in over.blocks.items():
            blocks[name] = lay(blocks[name], block) if name in blocks else block
        return Draft(lay(self.body, over.body), blocks, chosen, self.complete and over.complete)

    def stage_names(self, overrides: Sequence[Draft], faults: list[Fault]) -> list[str]:
        """The stages to run, in order; empty when the recipe has none."""
        chosen = next((one.chosen for one in reversed([self, *overrides]) if one.chosen is not None), None)
        names = [name.value for name in chosen or ()]
        for number, name in enumerate(chosen or ()):
            self._check_name(name.value, name.where, faults)
            if name.value in names[:number]:
                faults.append(Fault(f"the stage {name.value} is listed twice", str(name.where), "Remove one"))
        for one in overrides:
            for name, block in one.blocks.items():
                self._check_name(name, block.where, faults)
        return [name for name in dict.fromkeys(names) if name in self.blocks] or [*self.blocks]

    def stage(self, name: str | None, overrides: Sequence[Draft]) -> Tree:
        """The whole tree of one stage: the body, the stage's block, then each override in turn."""
        layers = [self.blocks[name]] if name is not None else []
        for one in overrides:
            layers += [one.body, *([one.blocks[name]] if name in one.blocks else [])]
        tree = self.body
        for layer in layers:
            tree = replace(lay(tree, layer), where=self.body.where, path=())
        if name is None:
            return tree
        label = Tree(name, self.blocks[name].where, ("stages", name))
        return replace(tree, value={**tree.value, "stage": label})

    def _check_name(self, name: str, where: Place, faults: list[Fault]) -> None:
        if name not in self.blocks and self.complete:
            faults.append(Fault(f"{name} is not a stage", str(where), nearest(name, self.blocks)))


def lay(base: Tree, over: Tree) -> Tree:
    """`over` merged into `base` as the recipe's schema has it."""
    return merge(base, over, _plug_keys())


@cache
def _plug_keys() -> dict[tuple[str, ...], str]:
    return {plug.path: plug.key for plug in plugs(Recipe)}


def read_draft(path: Path, faults: list[Fault], inside: tuple[Path, ...] = ()) -> Draft:
    """The draft of a file and of everything it extends; `inside` are the files that extend it."""
    tree = read_file(path, faults)
    nothing = Draft(Tree({}, Place(shown_path(path), 1, path.absolute().parent)), complete=False)
    if tree is None:
        return nothing
    if not isinstance(tree.value, dict):
        faults.append(
            Fault(f"a recipe is a mapping, not {shown(tree.plain())}", str(tree.where), "Write `key: value`.")
        )
        return nothing
    draft: Draft | None = None
    for base in _bases(tree, faults):
        below = _read_base(base, (*inside, path.resolve()), faults)
        draft = below if draft is None else draft.under(below)
    own = split(tree, faults)
    return own if draft is None else draft.under(own)


def _bases(tree: Tree, faults: list[Fault]) -> list[Tree]:
    extends = tree.value.get("extends")
    if extends is None:
        return []
    listed = extends.value if isinstance(extends.value, list) else [extends]
    wrong = [one for one in listed if not (isinstance(one.value, str) and one.value)]
    faults += [
        Fault(
            f"{one.dotted} is {shown(one.plain())}", str(one.where), "It should be a path or a list of paths"
        )
        for one in wrong
    ]
    return [one for one in listed if one not in wrong]


def _read_base(name: Tree, inside: tuple[Path, ...], faults: list[Fault]) -> Draft:
    path = name.where.folder / name.value
    nothing = Draft(Tree({}, name.where), complete=False)
    try:
        found = path.resolve()
        exists = found.is_file()
    except (OSError, ValueError, RuntimeError):
        found, exists = path, False
    if not exists:
        what = f"{name.dotted}: no file {shown_path(path)}"
        faults.append(Fault(what, str(name.where), like(name.value, name.where.folder)))
        return nothing
    if found in inside:
        circle = " -> ".join(shown_path(one) for one in (*inside[inside.index(found) :], found))
        faults.append(Fault(f"extends goes round in a circle: {circle}", str(name.where), "Break it."))
        return nothing
    return read_draft(found, faults, inside)


def split(tree: Tree, faults: list[Fault]) -> Draft:
    """The draft of one mapping, without what it extends."""
    values = {key: child for key, child in tree.value.items() if key not in LOADER_KEYS}
    body = _without(replace(tree, value=values), {"stage": "Name stages by the keys under stages"}, faults)
    stages = tree.value.get("stages")
    if stages is None:
        return Draft(body)
    if (
        isinstance(stages.value, list)
        and stages.value
        and all(isinstance(one.value, str) for one in stages.value)
    ):
        return Draft(body, chosen=tuple(stages.value))
    if isinstance(stages.value, dict) and stages.value:
        return Draft(body, {name: _block(block, faults) for name, block in stages.value.items()})
    what = f"{stages.dotted} is {shown(stages.plain())}"
    faults.append(
        Fault(what, str(stages.where), "It should be a mapping of stages, or a list of their names")
    )
    return Draft(body)


def _block(block: Tree, faults: list[Fault]) -> Tree:
    """A stage's block; one without keys changes nothing."""
    if not isinstance(block.value, dict | None):
        what = f"{block.dotted} is {shown(block.plain())}"
        faults.append(Fault(what, str(block.where), "It should be a mapping of what this stage changes"))
    if not isinstance(block.value, dict):
        return replace(block, value={})
    belongs = "It belongs to the whole recipe: write it at the top of the file"
    return _without(block, dict.fromkeys(("name", "stage", *LOADER_KEYS), belongs), faults)


def _without(tree: Tree, refused: dict[str, str], faults: list[Fault]) -> Tree:
    """The mapping without the refused keys, each of which is a fault with its remedy."""
    for key, remedy in refused.items():
        if key in tree.value:
            child = tree.value[key]
            faults.append(Fault(f"{child.dotted} cannot be set here", str(child.where), remedy))
    return replace(tree, value={key: child for key, child in tree.value.items() if key not in refused})


def parse_override(text: str, folder: Path, faults: list[Fault]) -> Draft | None:
    """The draft that `key=value` stands for (the value is YAML); None, with a fault, when it is none."""
    where = Place(f"command line: {text}", None, folder)
    key, equals, value = text.partition("=")
    keys = tuple(key.split("."))
    if not equals or not all(one and one == one.strip() for one in keys):
        faults.append(Fault("not an override", str(where), "Write key=value, for example run.seed=1"))
        return None
    if keys[0] in ("extends", "lock"):
        faults.append(Fault(f"{keys[0]} cannot be set here", str(where), "Set it in the recipe file"))
        return None
    tree = read_text(value, lambda _: where, keys, faults)
    return None if tree is None else split(_nested(keys, tree, where), faults)


def _nested(keys: tuple[str, ...], tree: Tree, where: Place) -> Tree:
    for depth in reversed(range(len(keys))):
        children: Any = {keys[depth]: tree}
        tree = Tree(children, where, keys[:depth])
    return tree
