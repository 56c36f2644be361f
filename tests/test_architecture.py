"""The house rules (floors, sizes, names, habits), read from the syntax trees of vlmtune/.

Each rule is a function from modules to offences (`file:line: what is wrong`), and each test shows both that
the house obeys and that the rule catches a snippet that does not. A line that has to break a habit because
transformers or another library dictates its form says so: `# foreign: who wants it`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from tests.house import Module, imports, obeyed

# ---------------------------------------------------------------- imports

_BELOW = {"__init__", "types", "errors", "config"}
FLOORS: dict[str, set[str]] = {
    "__init__": set(),
    "types": {"errors"},
    "errors": {"types"},
    "config": {"types", "errors"},
    "data": _BELOW,
    "models": _BELOW,
    "objectives": _BELOW | {"models"},
    "training": _BELOW | {"data", "models", "objectives"},
    "export": _BELOW | {"data", "models"},
    "evaluation": _BELOW | {"data", "models"},
    "synthesis": _BELOW | {"data"},
    "planning": _BELOW | {"data", "models", "objectives"},
}
"""The rooms each room may import (section 2 of the design)."""
ROOF = {
    "cli",
    "cli_shipping",
    "__main__",
    "run",
    "provenance",
    "inspection",
    "diagnosis",
    "shipping",
    "reconstruct",
}
"""The command line and what its commands do; the roof may import all, and nobody imports the roof."""
HEAVY = {"torch", "transformers", "accelerate", "numpy", "safetensors", "tokenizers", "PIL", "matplotlib"}
OPTIONAL = {
    *("flash_attn", "bitsandbytes", "deepspeed", "liger_kernel", "easy_vqa", "datasets", "matplotlib"),
    *("wandb", "tensorboard", "trackio", "peft", "diffusers"),
}


def own_room(name: str) -> str | None:
    """The room of an imported name of ours; None for others' names."""
    first, *rest = name.split(".")
    if first != "vlmtune":
        return None
    return rest[0] if rest and rest[0] in FLOORS.keys() | ROOF else "__init__"


def upward_imports(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.room not in FLOORS.keys() | ROOF:
            yield f"{module.path}:1: {module.room} has no floor: add it to FLOORS and to the design"
        for one in imports(module):
            room = own_room(one.name)
            if room not in (None, module.room) and module.room in FLOORS and room not in FLOORS[module.room]:
                yield module.at(one.node, f"{module.room} must not import {room} ({one.name})")


def test_rooms_import_only_lower_floors():
    obeyed(upward_imports, breaks={"vlmtune/data/x.py": "from vlmtune.models.vlm import VLM"})
    obeyed(upward_imports, breaks={"vlmtune/models/x.py": "def f():\n    import vlmtune.data.images"})
    obeyed(upward_imports, breaks={"vlmtune/evaluation/x.py": "from ..export import hf"})
    obeyed(upward_imports, breaks={"vlmtune/objectives/x.py": "from vlmtune import data"})
    obeyed(upward_imports, breaks={"vlmtune/training/x.py": "from vlmtune.cli import main"})
    obeyed(
        upward_imports,
        breaks={"vlmtune/extras/x.py": ""},
        keeps={
            "vlmtune/training/x.py": "from vlmtune import __version__\nfrom vlmtune.data import loader",
            "vlmtune/data/x.py": "from vlmtune.data.images import open_image\nfrom . import sources",
            "vlmtune/cli.py": "def f():\n    from vlmtune.training import engine",
        },
    )


def heavy_below(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.room in ("__init__", "types", "errors", "config"):
            for one in imports(module):
                if one.name.split(".")[0] in HEAVY and not one.typing:
                    yield module.at(one.node, f"{one.name} is too heavy for the lowest floors")


def test_the_recipe_layer_never_imports_torch():
    obeyed(
        heavy_below,
        breaks={"vlmtune/config/x.py": "def f():\n    from transformers import AutoConfig"},
        keeps={"vlmtune/types.py": "import typing\nif typing.TYPE_CHECKING:\n    from torch import Tensor"},
    )


def eager_roof(modules: list[Module]) -> Iterator[str]:
    cheap = {*sys.stdlib_module_names, "typer", "rich", "click"}
    for module in modules:
        for one in imports(module) if module.room in ("cli", "cli_shipping", "__main__") else ():
            ours = own_room(one.name) in _BELOW | {"cli", "cli_shipping"}
            if one.top and one.name.split(".")[0] not in cheap and not ours:
                yield module.at(one.node, f"{one.name} must be imported inside the command that needs it")


def test_the_command_line_starts_without_heavy_imports():
    obeyed(
        eager_roof,
        breaks={"vlmtune/cli.py": "from vlmtune.training.engine import fit"},
        keeps={"vlmtune/cli.py": "import typer\ndef f():\n    import torch"},
    )


def eager_optional(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for one in imports(module):
            if one.top and one.name.split(".")[0] in OPTIONAL:
                yield module.at(one.node, f"{one.name} is optional or slow: import it where it is used")


def test_optional_libraries_are_imported_late():
    obeyed(
        eager_optional,
        breaks={"vlmtune/models/x.py": "try:\n    import flash_attn\nexcept ImportError:\n    pass"},
        keeps={"vlmtune/models/x.py": "def f():\n    from flash_attn import flash_attn_varlen_func"},
    )


def lacks_future(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        annotated = [
            node
            for node in module.nodes
            if isinstance(node, ast.AnnAssign)
            or (isinstance(node, ast.arg) and node.annotation)
            or (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns)
        ]
        if annotated and not any(one.name == "__future__.annotations" for one in imports(module)):
            yield module.at(annotated[0], "annotations need `from __future__ import annotations`")


def test_annotations_come_from_the_future():
    obeyed(
        lacks_future,
        breaks={"vlmtune/data/x.py": "x: int = 1"},
        keeps={
            "vlmtune/data/x.py": "__all__ = []",
            "vlmtune/data/y.py": "from __future__ import annotations\nx: int = 1",
        },
    )


# ---------------------------------------------------------------- sizes and names


def too_big(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if len(module.lines) > 400:
            yield f"{module.path}:401: the file has {len(module.lines)} lines; at most 400"
        for node in module.nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > 60:
                yield module.at(node, f"{node.name} has {length} lines; at most 60")
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([one for one in given if one.arg not in ("self", "cls")])
            if count > 8 and not module.foreign(node):
                yield module.at(node, f"{node.name} has {count} parameters; at most 8")


def test_files_functions_and_signatures_stay_small():
    nine = "def f(a, b, c, d, *, e, f, g, h, i): pass"
    obeyed(too_big, breaks={"vlmtune/data/x.py": "x = 1\n" * 401})
    obeyed(too_big, breaks={"vlmtune/data/x.py": "def f():\n" + "    x = 1\n" * 60})
    obeyed(
        too_big,
        breaks={"vlmtune/data/x.py": nine},
        keeps={
            "vlmtune/data/x.py": f"{nine}  # foreign: transformers\ndef g(self, a, b, c, d, e, f, g, h): pass"
        },
    )


FORBIDDEN = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "factory", "registry"}


def misplaced(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if len(module.parts) > 3:
            yield f"{module.path}:1: folders go two deep at most"
        if set("_".join(module.parts).split("_")) & FORBIDDEN:
            yield f"{module.path}:1: a module's name says what is in it, not that something is"


def test_modules_have_telling_names_and_shallow_folders():
    obeyed(misplaced, breaks={"vlmtune/a/b/c/d.py": ""})
    obeyed(misplaced, breaks={"vlmtune/data/utils.py": ""})
    obeyed(misplaced, breaks={"vlmtune/data/image_helpers.py": ""}, keeps={"vlmtune/a/b/c.py": ""})


def foreign_words(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for node in module.nodes:
            name = defined_name(node)
            if re.match(r"connector$|mm_|data_args$", name) and not module.foreign(node):
                yield module.at(node, f"{name}: the field says vision, projector, language")


def defined_name(node: ast.AST) -> str:
    """The name that a node gives to something; empty when it gives none."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.id if isinstance(node, ast.Name) else node.attr
    return ""


def test_names_are_the_fields_standard():
    obeyed(foreign_words, breaks={"vlmtune/models/x.py": "self.connector = 1"})
    obeyed(
        foreign_words,
        breaks={"vlmtune/models/x.py": "def f(mm_hidden): pass"},
        keeps={"vlmtune/models/x.py": "y = inputs.mm_token_type_ids\nself.multi_modal_projector = y"},
    )


# ---------------------------------------------------------------- habits


def prints(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for node in module.nodes:
            if isinstance(node, ast.Name) and node.id == "print" and module.room != "cli":
                yield module.at(node, "print outside cli.py: use logging.getLogger(__name__)")


def test_only_the_command_line_prints():
    snippet = "print('x')"
    obeyed(prints, breaks={"vlmtune/data/x.py": snippet}, keeps={"vlmtune/cli.py": snippet})


def open_signatures(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for node in module.nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.args.kwarg is None:
                continue
            public = not node.name.startswith("_") or node.name.startswith("__")
            if public and not module.foreign(node):
                yield module.at(node, f"{node.name} takes **{node.args.kwarg.arg}: name its parameters")


def test_public_functions_name_their_parameters():
    keeps = "def _f(**k): pass\ndef forward(**k):  # foreign: transformers' attention interface\n    pass"
    for snippet in ("def f(**kwargs): pass", "class A:\n    def __init__(self, **kwargs): pass"):
        obeyed(open_signatures, breaks={"vlmtune/data/x.py": snippet}, keeps={"vlmtune/data/x.py": keeps})


def guessed_attributes(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for node in module.nodes:
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or len(node.args) < 2:
                continue
            literal = isinstance(node.args[1], ast.Constant)
            if node.func.id in ("getattr", "hasattr") and literal and not module.foreign(node):
                yield module.at(
                    node, f"{node.func.id} with a literal: our own types are known; others' need # foreign:"
                )


def test_attributes_are_not_guessed():
    obeyed(
        guessed_attributes,
        breaks={"vlmtune/data/x.py": "getattr(recipe, 'seed', 0)"},
        keeps={
            "vlmtune/data/x.py": "getattr(config, 'bos', None)  # foreign: transformers\ngetattr(a, name)"
        },
    )


def unsafe(modules: list[Module]) -> Iterator[str]:
    loads = {"torch.load", "yaml.load", "yaml.unsafe_load", "numpy.load", "np.load", "eval", "exec"}
    for module in modules:
        for one in imports(module):
            if one.name.split(".")[0] in (
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "joblib",
                "shelve",
                "marshal",
            ):
                yield module.at(one.node, f"{one.name}: a checkpoint is never unpickled")
            if one.name in loads:
                yield module.at(one.node, f"{one.name}: read files by safe means")
        for node in module.nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func) in loads:
                words = ast.unparse(node)
                safe = ast.unparse(node.func).endswith("p.load") and "allow_pickle" not in words
                foreign = module.foreign(node) and "weights_only=True" in words
                if not safe and not foreign:
                    yield module.at(node, f"{ast.unparse(node.func)}: read files by safe means")
            trusted = isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
            if trusted and isinstance(node.value, ast.Constant) and node.value.value is not False:
                yield module.at(node, "trust_remote_code is the recipe's to allow")


def test_nothing_is_unpickled_and_no_code_is_trusted():
    for snippet in (
        "torch.load('x')",
        "from torch import load",
        "import pickle",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "np.load(p, allow_pickle=True)",
        "torch.load('x', weights_only=True)",
        "torch.load('x')  # foreign: another program's pickle",
    ):
        obeyed(
            unsafe,
            breaks={"vlmtune/models/x.py": snippet},
            keeps={
                "vlmtune/models/x.py": "f(p, trust_remote_code=config.trusted)\nnp.load(p, mmap_mode='r')\n"
                "torch.load(p, weights_only=True)  # foreign: another program's pickle"
            },
        )


def behaviour_from_names(modules: list[Module]) -> Iterator[str]:
    """Literals looked for in paths, and stages compared with a literal."""
    for module in modules:
        for node in module.nodes:
            if not isinstance(node, ast.Compare) or module.foreign(node):
                continue
            sides = [node.left, *node.comparators]
            words = [
                one.value for one in sides if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
            names = {ast.unparse(one).split(".")[-1].removesuffix("()") for one in sides}
            substring = any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
            letters = any(re.search("[A-Za-z]", word) for word in words)
            if (
                letters
                and substring
                and names & {"path", "folder", "dir", "directory", "name_or_path", "checkpoint"}
            ):
                yield module.at(node, f"{ast.unparse(node)}: a path's name decides nothing")
            if words and "stage" in names:
                yield module.at(node, f"{ast.unparse(node)}: a stage's name decides nothing")


def test_no_behaviour_comes_from_names_of_folders_or_stages():
    obeyed(behaviour_from_names, breaks={"vlmtune/models/x.py": "if 'lora' in config.path: pass"})
    obeyed(
        behaviour_from_names,
        breaks={"vlmtune/training/x.py": "x = recipe.stage == 'align'"},
        keeps={"vlmtune/models/x.py": "'.' in path\nkey in path\nmode == 'full'\nstage == other"},
    )


# ---------------------------------------------------------------- classes and copies

BASES = {"Section", "VlmtuneError"}
"""Bases without abstract methods: fields and messages only. Never made themselves."""


def is_abstract(node: ast.ClassDef) -> bool:
    bases = {
        ast.unparse(base).split("[")[0].split(".")[-1]
        for base in (*node.bases, *(k.value for k in node.keywords))
    }
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
    marked = any("abstractmethod" in ast.unparse(mark) for one in methods for mark in one.decorator_list)
    return (
        marked
        or bool(bases & {"ABC", "ABCMeta", "Protocol"})
        or node.name in BASES
        or node.name.startswith("_")
    )


def wrong_bases(modules: list[Module]) -> Iterator[str]:
    """Inheritance from concrete classes of ours, long chains, and bases that are made themselves."""
    classes = {
        node.name: (module, node)
        for module in modules
        for node in module.nodes
        if isinstance(node, ast.ClassDef)
    }
    used: set[str] = set()
    for name, (module, node) in classes.items():
        for base in our_bases(node, classes):
            used.add(base)
            if not is_abstract(classes[base][1]):
                yield module.at(
                    node, f"{name} inherits from the concrete {base}: classes are abstract or final"
                )
            if base not in BASES and set(our_bases(classes[base][1], classes)) - BASES:
                yield module.at(node, f"{name} is more than one step below a base of ours ({base})")
    for module in modules:
        for node in module.nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in used:
                yield module.at(node, f"{ast.unparse(node.func)} is a base and is never made itself")


def our_bases(node: ast.ClassDef, classes: dict[str, tuple[Module, ast.ClassDef]]) -> list[str]:
    names = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
    return [name for name in names if name in classes and name != node.name]


def test_classes_are_abstract_or_final():
    abstract = "class A(ABC):\n    pass\n"
    obeyed(wrong_bases, breaks={"vlmtune/models/x.py": "class A: pass\nclass B(A): pass"})
    obeyed(wrong_bases, breaks={"vlmtune/models/x.py": f"{abstract}class B(A, ABC): pass\nclass C(B): pass"})
    obeyed(
        wrong_bases,
        breaks={"vlmtune/models/x.py": f"{abstract}class B(A): pass\nx = A()"},
        keeps={
            "vlmtune/models/x.py": f"{abstract}class B(A): pass\nclass VLM(LlavaModel): pass\nB()",
            "vlmtune/config/x.py": "class Section: pass\nclass _S(Section): pass\nclass T(_S): pass",
        },
    )


COPIED = 11
"""Lines in a row that, met twice, are a copied block."""


def copied(modules: list[Module]) -> Iterator[str]:
    seen: dict[tuple[str, ...], str] = {}
    for module in modules:
        lines = [(number, line.strip()) for number, line in enumerate(module.lines, 1)]
        written = [
            (number, line)
            for number, line in lines
            if line and not line.startswith(("#", "import ", "from "))
        ]
        for start in range(len(written) - COPIED + 1):
            block = tuple(line for _, line in written[start : start + COPIED])
            place = f"{module.path}:{written[start][0]}"
            if (first := seen.setdefault(block, place)) != place:
                yield f"{place}: {COPIED} lines are copied from {first}"


def test_nothing_is_copied():
    block = "".join(f"x{i} = f({i})\n" for i in range(COPIED))
    obeyed(
        copied,
        breaks={"vlmtune/data/x.py": block, "vlmtune/models/y.py": f"\n\nif True:\n    # why\n{block}"},
        keeps={"vlmtune/data/x.py": block, "vlmtune/models/y.py": block.replace("x0 ", "y0 ")},
    )
