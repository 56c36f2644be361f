"""The one save path: a step folder is written aside, renamed when complete, and never unpickled.

    step_000500/
      model/                  Hugging Face folder (weights, config, processor, template), loads as it is
      objective.safetensors   what only training needs (absent if nothing)
      optimizer.safetensors   moments by parameter name
      manifest.json           kind, step, stage key, versions

Nothing else is needed to resume bit for bit: the data cursor and every generator are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmtune.errors import CheckpointError
from vlmtune.objectives.base import Objective

_PREFIX = "step_"
_ASIDE = ".partial"


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


def save_step(
    folder: Path,
    step: int,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    processor: Any,
    manifest: dict[str, Any],
) -> Path:
    """The folder of the finished checkpoint."""
    final = folder / f"{_PREFIX}{step:06d}"
    aside = final.with_name(final.name + _ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    objective.exported().save_pretrained(aside / "model")
    processor.save_pretrained(aside / "model")
    helpers = {name: value for name, value in objective.state_dict().items() if not name.startswith("model.")}
    if helpers:
        save_file(helpers, aside / "objective.safetensors")
    save_file(optimizer_tensors(objective, optimizer), aside / "optimizer.safetensors")
    (aside / "manifest.json").write_text(json.dumps({"kind": "step", "step": step, **manifest}, indent=1))
    _flush(aside)
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    return final


def rotate(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what an interrupted save left."""
    for path in folder.glob(f"{_PREFIX}*{_ASIDE}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in step_folders(folder)[:-keep]:
        shutil.rmtree(path)


def optimizer_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<entry>:<parameter name>` -> tensor."""
    names = {parameter: name for name, parameter in objective.named_parameters()}
    return {
        f"{entry}:{names[parameter]}": value.detach().contiguous()
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def restore(path: Path, objective: Objective, optimizer: torch.optim.Optimizer) -> int:
    """The number of optimizer steps done, after helpers and moments of `path` are in place.

    The model itself was built from `path / "model"`. Raises CheckpointError when a tensor is missing or unexpected.
    """
    helpers = path / "objective.safetensors"
    own = {name for name in objective.state_dict() if not name.startswith("model.")}
    saved = load_file(helpers) if helpers.exists() else {}
    _demand_equal(set(saved), own, helpers)
    objective.load_state_dict(saved, strict=False)
    _restore_optimizer(load_file(path / "optimizer.safetensors"), objective, optimizer, path)
    return int(read_manifest(path)["step"])


def _restore_optimizer(
    tensors: dict[str, Tensor], objective: nn.Module, optimizer: torch.optim.Optimizer, path: Path
) -> None:
    parameters = dict(objective.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    _demand_equal({key.partition(":")[2] for key in tensors}, trained, path / "optimizer.safetensors")
    for key, value in tensors.items():
        entry, _, name = key.partition(":")
        parameter = parameters[name]
        # The step counter of AdamW stays where it was saved; the moments live with their parameter.
        optimizer.state[parameter][entry] = value if value.ndim == 0 else value.to(parameter.device)


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
