"""Where a model comes from: enough to build it again, and to tell that the same one was built.

What comes from files is known by their bytes. Weights made from a seed are known by their own: another version
of torch, or another processor, may draw others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from vlmtune.config.locate import packaged
from vlmtune.config.lock import file_hash
from vlmtune.config.schema import ModelConfig
from vlmtune.config.tuning import Full, Part, TuningConfig
from vlmtune.errors import CheckpointError
from vlmtune.models.checkpoint import feed_digest, weights_digest
from vlmtune.models.tuning import PART_PREFIXES

if TYPE_CHECKING:
    from vlmtune.models.vlm import VLM


@dataclass(frozen=True, slots=True)
class Origin:
    """What `build_model` made a model from; its template travels with the processor."""

    config: ModelConfig
    seed: int


@dataclass(frozen=True, slots=True)
class Adaptation:
    """The adapters a model carries, and what they stand on."""

    tuning: TuningConfig
    """With every target written out."""
    origin: Origin
    digests: dict[str, str]
    """sha256 of what has to be rebuilt from the origin: the checkpoint, or the parts that are not trained whole."""


def origin_digests(model: VLM, origin: Origin, tuning: TuningConfig) -> dict[str, str]:
    """What the base of adapters is known by; `model` is that base, still without them."""
    config = origin.config
    if config.checkpoint is not None:
        return {"checkpoint": _source_digest(config.checkpoint, config.revision)}
    kept = [part for part, mode in tuning.parts().items() if not isinstance(mode, Full)]
    assert config.vision and config.language  # ModelConfig has seen to it
    sources = {"vision": (config.vision.path, None), "language": (config.language.path, config.revision)}
    digests = {}
    for part in kept:
        path, revision = sources.get(part, (None, None))
        digests[part] = _weights_of(model, part) if path is None else _source_digest(path, revision)
    return digests


def _weights_of(model: VLM, part: Part) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(PART_PREFIXES[part]):
            feed_digest(digest.update, name, tensor.cpu())
    return digest.hexdigest()


def _source_digest(name: str, revision: str | None) -> str:
    """Of a folder, of a single file (GGUF), or of a hub model that was downloaded before."""
    path = packaged(name)
    if path.is_file():
        return file_hash(path)
    if path.is_dir():
        return weights_digest(path)
    try:
        return weights_digest(Path(snapshot_download(name, revision=revision, local_files_only=True)))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise CheckpointError(f"the base model {name} is not here", name, "Download it first.") from error


# ---------------------------------------------------------------- as JSON

_PATHS = (("checkpoint",), ("vision", "path"), ("language", "path"))


def origin_json(origin: Origin, folder: Path) -> dict[str, Any]:
    """What a file in `folder` says of an origin: local paths are absolute, and also given from that folder."""
    content = origin.config.model_dump(mode="json")
    beside: dict[str, str] = {}
    for keys in _PATHS:
        name = _get(content, keys)
        if name and Path(name).exists():
            _set(content, keys, str(Path(name).absolute()))
            beside[".".join(keys)] = os.path.relpath(name, folder)
    return {"model": content, "beside": beside, "seed": origin.seed}


def read_origin(content: dict[str, Any], folder: Path, trust_remote_code: bool) -> Origin:
    """The origin that `origin_json` wrote, with its paths where they are now and the folder's own tokenizer.

    Raises CheckpointError when a local base is in neither place. Foreign code runs by the caller's word only.
    """
    model = content["model"]
    for keys in _PATHS:
        beside = content["beside"].get(".".join(keys))
        name = _get(model, keys)
        if beside is None or Path(name).exists():
            continue
        moved = folder / beside
        if not moved.exists():
            raise CheckpointError(
                f"the base model of these adapters is gone: {name}",
                str(folder),
                f"Put it back there, or at {moved}.",
            )
        _set(model, keys, str(moved))
    model["trust_remote_code"] = trust_remote_code
    if model["language"]:
        model["language"]["tokenizer"] = str(folder)
    return Origin(ModelConfig.model_validate(model), content["seed"])


def _get(content: dict[str, Any], keys: Collection[str]) -> Any:
    value: Any = content
    for key in keys:
        value = value and value.get(key)
    return value


def _set(content: dict[str, Any], keys: tuple[str, ...], value: str) -> None:
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value
