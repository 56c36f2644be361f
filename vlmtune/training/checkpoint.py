"""The one save path: a step folder is written aside, renamed when complete, and never unpickled.

    step_000500/
      model/                  Hugging Face folder (weights, config, processor, template), loads as it is
      objective.safetensors   what only training needs (absent if nothing)
      optimizer.safetensors   moments by parameter name
      manifest.json           kind, step, stage key, versions

Nothing else is needed to resume bit for bit: the data cursor and every generator are functions of (seed, step).
Tensors are whole and named by parameter, whatever strategy wrote them: any other, on any number of processes, goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmtune.errors import CheckpointError
from vlmtune.models.saving import save_model, saved_names
from vlmtune.objectives.base import Objective
from vlmtune.training.strategies import Parallel

_PREFIX = "step_"
_ASIDE = ".partial"
_MODEL = "model."


def step_folders(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = (path for path in folder.glob(f"{_PREFIX}*") if not path.name.endswith(_ASIDE))
    return sorted(path for path in found if (path / "manifest.json").is_file())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint or export."""
    file = path / "manifest.json"
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"not a complete checkpoint ({error})", str(file), "Take an older step folder, or train again."
        ) from error


def save_step(folder: Path, step: int, strategy: Parallel, processor: Any, manifest: dict[str, Any]) -> Path:
    """The folder of the finished checkpoint. All ranks call it together: they gather, the main process writes."""
    final = folder / f"{_PREFIX}{step:06d}"
    aside = final.with_name(final.name + _ASIDE)
    main, objective = strategy.accelerator.is_main_process, strategy.objective
    if main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    # One after the other, so that the main process never holds both weights and moments.
    weights = strategy.weights(_MODEL + name for name in saved_names(objective.exported()))
    if main:
        state = {name.removeprefix(_MODEL): value for name, value in weights.items()}
        save_model(objective.exported(), processor, aside / "model", state)
        del state
    del weights
    helpers = strategy.weights(_helper_names(objective))
    moments = strategy.moments()
    if main:
        if helpers:
            save_file(helpers, aside / "objective.safetensors")
        save_file(moments, aside / "optimizer.safetensors")
        (aside / "manifest.json").write_text(json.dumps({"kind": "step", "step": step, **manifest}, indent=1))
        _flush(aside)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
    strategy.accelerator.wait_for_everyone()
    return final


def rotate(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what an interrupted save left."""
    for path in folder.glob(f"{_PREFIX}*{_ASIDE}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in step_folders(folder)[:-keep]:
        shutil.rmtree(path)


def restore_helpers(path: Path, objective: Objective) -> None:
    """Puts what only training needs in place, before the objective is prepared; the model was built from `path`.

    Raises CheckpointError when a tensor is missing or unexpected.
    """
    helpers = path / "objective.safetensors"
    saved = load_file(helpers) if helpers.exists() else {}
    _demand_equal(set(saved), set(_helper_names(objective)), helpers)
    objective.load_state_dict(saved, strict=False)


def restore_moments(path: Path, strategy: Parallel) -> None:
    """Puts the optimizer's state in place, whatever strategy and world size wrote it.

    Raises CheckpointError when it is not that of the weights trained here.
    """
    file = path / "optimizer.safetensors"
    with TensorFile(file) as moments:
        trained = {name for name, weight in strategy.objective.named_parameters() if weight.requires_grad}
        _demand_equal({key.partition(":")[2] for key in moments}, trained, file)
        strategy.load_moments(moments)


@final
class TensorFile(Mapping[str, Tensor]):
    """A safetensors file, open inside `with`; a tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")

    def __enter__(self) -> TensorFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def _helper_names(objective: Objective) -> list[str]:
    return [name for name in objective.state_dict() if not name.startswith(_MODEL)]


def _demand_equal(saved: set[str], expected: set[str], where: Path) -> None:
    if saved != expected:
        missing, extra = sorted(expected - saved)[:3], sorted(saved - expected)[:3]
        raise CheckpointError(
            f"holds other tensors than this run trains (missing {missing}, unexpected {extra})",
            str(where),
            "Resume with the recipe that wrote it, or start in a fresh run.dir.",
        )


def _flush(folder: Path) -> None:
    """Makes the files durable before the rename makes them visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
