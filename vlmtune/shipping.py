"""What `vlmtune merge`, `vlmtune convert` and `--push` do, and what a model card says about a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlmtune.errors import RecipeError

if TYPE_CHECKING:
    from vlmtune.export.combine import Method


@dataclass(frozen=True, slots=True)
class Merging:
    """How several models are merged; None is what the method starts with."""

    method: str | None
    parts: Sequence[str] = ()
    base: Path | None = None
    weights: str | None = None
    ema: float | None = None
    t: float | None = None
    density: float | None = None
    scale: float | None = None
    seed: int | None = None

    def methods(self, count: int) -> dict[str, Method]:
        """The method of each part for so many models."""
        from vlmtune.export.combine import ema_weights
        from vlmtune.export.settings import part_methods

        given = {"t": self.t, "density": self.density, "scale": self.scale, "seed": self.seed}
        shared: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if self.weights is not None and self.ema is not None:
            raise RecipeError("--weights and --ema exclude each other", "vlmtune merge", "Give one of them.")
        if self.weights is not None:
            shared["weights"] = _numbers(self.weights)
        if self.ema is not None:
            shared["weights"] = ema_weights(count, self.ema)
        return part_methods(self.method or "average", shared, self.parts)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise RecipeError(f"{text!r} are not numbers", "--weights", "Such as --weights 0.3,0.7.") from error


def merge(
    paths: Sequence[Path],
    out: Path,
    how: Merging,
    dtype: str | None = None,
    shard_gb: float | None = None,
    probe: bool = True,
) -> str:
    """A line on `out`: the adapters of one step folder merged into its base, or several models into one.

    A run's folder stands for all its step folders, oldest first.
    """
    sources = [step for path in paths for step in _steps(path)]
    if not sources:
        raise RecipeError(
            "there is nothing to merge", "vlmtune merge", "Give a model and the folder to write."
        )
    if how.method is None and not how.parts and how.ema is None:
        if len(sources) > 1:
            raise RecipeError(
                f"there are {len(sources)} models to merge", "vlmtune merge", "Say how: --method average."
            )
        from vlmtune.export.merge import merge_adapters

        report = merge_adapters(sources[0], out, dtype, run_facts(sources[0]))
        return f"{report.path}: adapters merged, {report.difference}"
    import torch

    from vlmtune.export.average import Output, merge_models

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, None: None}
    if dtype not in kinds:
        raise RecipeError(f"no type {dtype!r}", "--dtype", "Known: float32, bfloat16, float16.")
    shard_bytes = None if shard_gb is None else int(shard_gb * 10**9)
    output = Output(out, kinds[dtype], shard_bytes, probe)
    merge_models(sources, how.methods(len(sources)), how.base, output)
    return f"{out}: {len(sources)} models merged{', reopened and run once' if probe else ''}"


def _steps(path: Path) -> list[Path]:
    from vlmtune.training.checkpoint import step_folders

    return step_folders(path) or [path]


def convert(
    path: Path, out: Path, to: str | None, base: Path | None, tower: str | None, template: str | None
) -> str:
    """A line on `out`, the other layout of `path`."""
    from vlmtune.data.render import template_text
    from vlmtune.export.convert import convert as convert_folder

    if to not in ("hf", "llava", None):
        raise RecipeError(f"there is no layout {to!r}", "--to", "Known: hf, llava.")
    text = None if template is None else template_text(template)
    report = convert_folder(path, out, to, base, tower, text)
    return f"{out}: layout {report.layout}, largest logit difference {report.max_abs_diff:.2g}"


def push(folder: Path, repo: str, private: bool) -> str:
    """A line on where `folder` was uploaded."""
    from vlmtune.export.push import push_folder

    return f"{push_folder(folder, repo, private)}: uploaded"


# ---------------------------------------------------------------- the card of a run


def run_facts(checkpoint: Path) -> dict[str, Any]:
    """What the run of a step folder says about it: base models, their licences, data, and scores.

    The scores are there only if they were measured on this very step.
    """
    run = next((each for each in checkpoint.parents if (each / "recipe.lock.yaml").is_file()), None)
    if run is None:
        return {}
    lock = yaml.safe_load((run / "recipe.lock.yaml").read_text(encoding="utf-8"))
    stages = [*lock["stages"].values()] if "stages" in lock else [lock]
    bases = _bases(stages[0].get("model", {}))
    licences = {path: licence for path in bases.values() if (licence := _licence(Path(path)))}
    mixes = [name.removeprefix("mix ") for name in lock["lock"]["hashes"] if name.startswith("mix ")]
    facts = {"bases": bases, "licences": licences, "mixes": mixes, "scores": _scores(run, checkpoint)}
    return {key: value for key, value in facts.items() if value}


def _bases(model: dict[str, Any]) -> dict[str, str]:
    """The pretrained models that a recipe names, by part; a hub id or a path."""
    if model.get("checkpoint"):
        return {"checkpoint": model["checkpoint"]}
    parts = ((part, model.get(part) or {}) for part in ("vision", "language"))
    return {part: options["path"] for part, options in parts if options.get("path")}


def _licence(folder: Path) -> str | None:
    """The licence in the card of a local model folder."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    before, *rest = card.read_text(encoding="utf-8").split("---\n", 2)
    if before or not rest:
        return None
    header = yaml.safe_load(rest[0])
    return header.get("license") if isinstance(header, dict) else None


def _scores(run: Path, checkpoint: Path) -> dict[str, Any]:
    """The numbers of metrics.json, if the export that they are of was written from `checkpoint`."""
    from vlmtune.export.folder import read_json

    metrics, step = read_json(run / "metrics.json"), read_json(checkpoint / "manifest.json")
    scored = read_json(Path(metrics.get("model", "")) / "manifest.json")
    if not step or any(scored.get(key) != step.get(key) for key in ("key", "step")):
        return {}
    names = ("mix", "questions", "accuracy", "accuracy_open", "vqa_accuracy")
    yes_no = metrics.get("yes_no") or {}
    found = {name: metrics.get(name) for name in names} | {"yes/no F1": yes_no.get("f1")}
    return {name: value for name, value in found.items() if value is not None}
