"""recipe.lock.yaml, and the hashes that tell whether a stage is already done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmtune.config.loader import load_mix
from vlmtune.config.locate import locate
from vlmtune.config.schema import Recipe
from vlmtune.config.tree import Loader

_NO_WEIGHTS: dict[str, Any] = {
    "run": {
        *("dir", "keep", "log_every", "log_samples", "save_every", "trackers", "probe", "rehearse"),
        *("liger", "compile"),  # the same mathematics
    },
    **dict.fromkeys(("name", "paper", "reason", "evaluation", "export"), True),
}
"""Keys that leave a stage's weights as they are (of evaluation, the held-out split counts: see stage_key)."""


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the text that our loader would not read back as text."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def lock_text(recipes: Sequence[Recipe], versions: Mapping[str, str], hashes: Mapping[str, str]) -> str:
    """The resolved recipes with versions and hashes, as a file that load_recipe reads back as they are."""
    stages = {recipe.stage: recipe.model_dump(mode="json", exclude={"name", "stage"}) for recipe in recipes}
    body = stages["train"] if list(stages) == ["train"] else {"stages": stages}
    lock = {"versions": dict(versions), "hashes": dict(hashes)}
    whole = {"name": recipes[0].name, **body, "lock": lock}
    text = yaml.dump(whole, Dumper=_Dumper, sort_keys=False, width=110)
    return f"# Written by vlmtune. To repeat the run: vlmtune train recipe.lock.yaml\n{text}"


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mix_hash(path: Path) -> str:
    """The sha256 of what a mix says and of its annotation files; images and hub data do not count."""
    mix = load_mix(path)
    said = mix.model_dump(mode="json", exclude={"description"})
    names = [source.get("path") for source in said["sources"]]
    files = [locate(name, path.absolute().parent) for name in names if name]
    return _hash([said, [file_hash(file) for file in files if file]])


def stage_key(recipe: Recipe, inputs: Mapping[str, str]) -> str:
    """The sha256 of everything that decides a stage's weights.

    `inputs` are the hashes of what the recipe does not hold itself: the stage before, base weights. Mixes
    count by their content, not their path; logging, saving, scoring and export do not count.
    """
    content = recipe.model_dump(mode="json", exclude=_NO_WEIGHTS)
    content["held_out"] = recipe.evaluation.held_out.model_dump(mode="json", include={"fraction", "most"})
    for stream in filter(None, content["data"].values()):
        del stream["workers"]
        stream["mix"] = mix_hash(Path(stream["mix"]))
    return _hash([content, dict(inputs)])


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
