"""The one save path: a step folder is written aside, renamed when complete, and never unpickled.

    step_000500/
      model/                  Hugging Face folder (weights, config, processor, template), loads as it is
      objective.safetensors   what only training needs (absent if nothing)
      optimizer.safetensors   moments by parameter name; optimizer-00001-of-00008.safetensors and so on where ranks
                              share them, each written by its rank, without gathering
      manifest.json           kind, step, stage key, versions

Nothing else is needed to resume bit for bit: the data cursor and every generator are functions of (seed, step).
Tensors are named by parameter and read as wholes, whatever strategy wrote them: any other, on any number of processes,
goes on. All ranks write into one folder: several nodes need a shared file system.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmtune.errors import CheckpointError
from vlmtune.models.saving import save_model, saved_names
from vlmtune.objectives.base import Objective
from vlmtune.training.parallel import Parallel, Piece

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
    strategy.accelerator.wait_for_everyone()
    weights = strategy.weights(_MODEL + name for name in saved_names(objective.exported()))
    if main:
        state = {name.removeprefix(_MODEL): value for name, value in weights.items()}
        save_model(objective.exported(), processor, aside / "model", state)
        del state
    del weights
    helpers = strategy.weights(_helper_names(objective))
    if main and helpers:
        save_file(helpers, aside / "objective.safetensors")
    if main or strategy.shares_moments:
        save_moments(aside / _moments_name(strategy), strategy.moments())
    strategy.accelerator.wait_for_everyone()
    if main:
        (aside / "manifest.json").write_text(json.dumps({"kind": "step", "step": step, **manifest}, indent=1))
        _flush(aside)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
    strategy.accelerator.wait_for_everyone()
    return final


def save_moments(file: Path, pieces: Mapping[str, Piece]) -> None:
    """Writes a rank's part of the optimizer's state; what is not a whole tensor says where it belongs."""
    parts = {key: each for key, each in pieces.items() if each.value.shape != each.shape}
    places = {key: {"start": each.start, "shape": each.shape} for key, each in parts.items()}
    tensors = {
        key: each.value.flatten().contiguous() if key in parts else each.value for key, each in pieces.items()
    }
    # One key only: safetensors writes several in an order that changes from file to file.
    save_file(tensors, file, metadata={"pieces": json.dumps(places)})


def _moments_name(strategy: Parallel) -> str:
    if not strategy.shares_moments:
        return "optimizer.safetensors"
    rank, count = strategy.accelerator.process_index + 1, strategy.accelerator.num_processes
    return f"optimizer-{rank:05d}-of-{count:05d}.safetensors"


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
    with Moments(path) as moments:
        trained = {name for name, weight in strategy.objective.named_parameters() if weight.requires_grad}
        _demand_equal({key.partition(":")[2] for key in moments}, trained, path / "optimizer*.safetensors")
        strategy.load_moments(moments)


@final
class Moments(Mapping[str, Tensor]):
    """The optimizer's state in a step folder, open inside `with`: whole tensors, read when they are asked for.

    Raises CheckpointError when a rank's file is missing, and when the pieces of a tensor do not make it up.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._pieces: dict[str, list[tuple[int, Any]]] = {}
        self._shapes: dict[str, list[int]] = {}
        paths = sorted(folder.glob("optimizer*.safetensors"))
        written = int(paths[0].stem.rpartition("-of-")[2]) if paths and "-of-" in paths[0].stem else 1
        if len(paths) != written:
            raise self._error(f"{len(paths)} of {written} files of the optimizer's state are here")
        for path in paths:
            file = self._files.enter_context(safe_open(path, "pt"))
            places = json.loads((file.metadata() or {}).get("pieces", "{}"))
            self._shapes |= {key: place["shape"] for key, place in places.items()}
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                start = places[key]["start"] if key in places else 0
                self._pieces.setdefault(key, []).append((start, file))

    def __enter__(self) -> Moments:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.close()

    def __getitem__(self, name: str) -> Tensor:
        pieces = [
            (start, file.get_tensor(name))
            for start, file in sorted(self._pieces[name], key=lambda piece: piece[0])
        ]
        if name not in self._shapes:
            return pieces[0][1]
        ends = accumulate(len(value) for _, value in pieces)
        if [*(start for start, _ in pieces), math.prod(self._shapes[name])] != [0, *ends]:
            raise self._error(f"the pieces of {name} do not make up the tensor")
        return torch.cat([value for _, value in pieces]).view(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(what, str(self._folder), "Take an older step folder, or copy all of this one.")


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
