"""Where a result comes from: versions, base models, mixes, and the seconds of each phase."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vlmtune import __version__
from vlmtune.config.locate import packaged
from vlmtune.config.lock import file_hash, lock_text, mix_hash
from vlmtune.config.plugins import PixelsTargetConfig, ReconstructionConfig
from vlmtune.config.schema import Recipe

_DEPENDENCIES = ("torch", "transformers", "accelerate", "tokenizers", "pillow")


def versions() -> dict[str, str]:
    """The versions of the packages that a result depends on."""
    return {"vlmtune": __version__} | {name: importlib.metadata.version(name) for name in _DEPENDENCIES}


def base_paths(recipe: Recipe) -> dict[str, str]:
    """The pretrained models that a recipe names, by part, and what its objective starts from."""
    model, aside = recipe.model, _objective_paths(recipe)
    if model.checkpoint:
        return {"checkpoint": model.checkpoint} | aside
    parts = {"vision": model.vision, "language": model.language}
    return {name: str(packaged(part.path)) for name, part in parts.items() if part and part.path} | aside


def _objective_paths(recipe: Recipe) -> dict[str, str]:
    own = recipe.objective
    if not isinstance(own, ReconstructionConfig) or own.weight == 0:
        return {}
    target = {} if isinstance(own.target, PixelsTargetConfig) else {"target": own.target.path}
    return target | ({"denoiser": own.weights} if own.weights else {})


def base_hashes(recipe: Recipe) -> dict[str, str]:
    """What identifies each base model: the digest of local weights, or hub id and revision."""
    hub = recipe.model.revision or "main"
    return {f"base {name}": _base_hash(path, hub) for name, path in base_paths(recipe).items()}


def _base_hash(path: str, revision: str) -> str:
    from vlmtune.models.build import weights_digest

    if Path(path).is_file():
        return file_hash(Path(path))
    folder = max(Path(path).glob("step_*[0-9]"), default=Path(path))  # of a run folder, the last step
    return weights_digest(folder) if folder.is_dir() else f"{path}@{revision}"


def write_lock(folder: Path, recipes: Sequence[Recipe], bases: dict[str, str]) -> None:
    """Writes recipe.lock.yaml: the resolved recipe, versions, and the hashes of mixes and base weights."""
    if not first_rank():
        return
    paths = dict.fromkeys(recipe.data.chat.mix for recipe in recipes if recipe.data.chat)
    mixes = {f"mix {path}": mix_hash(Path(path)) for path in paths}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.lock.yaml").write_text(lock_text(recipes, versions(), bases | mixes))


def first_rank() -> bool:
    """Whether this process writes what is written once; launchers say so before anything is set up."""
    return os.environ.get("RANK", "0") == "0"


class Clock:
    """Keeps the seconds of each phase in phases.json; a phase that goes on after a resume adds up.

    Only the first rank writes: the sum over ranks is no time that anyone waited.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def _read(self) -> dict[str, float]:
        rows = json.loads(self.path.read_text()) if self.path.exists() else []
        return {row["phase"]: row["seconds"] for row in rows}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what runs inside, also when it fails."""
        began = time.monotonic()
        try:
            yield
        finally:
            if first_rank():
                self._add(name, time.monotonic() - began)

    def _add(self, name: str, elapsed: float) -> None:
        seconds = self._read()
        seconds[name] = round(seconds.get(name, 0.0) + elapsed, 2)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"phase": phase, "seconds": value} for phase, value in seconds.items()]
        self.path.write_text(json.dumps(rows, indent=1))

    def training(self) -> float:
        """Seconds of all training phases, model building and indexing included."""
        return round(sum(value for phase, value in self._read().items() if phase.startswith("train")), 2)
