"""What a checkpoint of a model holds, and the way back: the whole model, or what was trained beside its base.

A folder of a model with adapters:

    trained.safetensors   adapters, and every weight of the parts that are trained whole, by their names in memory
    adapters.json         how each part is tuned (targets written out); the base: its config, seed and digests
    config.json, generation_config.json, processor files

Opening it builds the base again, refuses another one, and loads strictly.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaProcessor

from vlmtune.config.tuning import Full, TuningConfig
from vlmtune.errors import CheckpointError
from vlmtune.models.adapters import inject, merge_in_place
from vlmtune.models.build import build_from
from vlmtune.models.checkpoint import ADAPTERS_FILE, load_processor
from vlmtune.models.origin import Adaptation, origin_digests, origin_json, read_origin
from vlmtune.models.questioner import EMBEDDINGS
from vlmtune.models.tuning import is_adapter, part_of, trains_row
from vlmtune.models.vlm import VLM

_log = logging.getLogger(__name__)

TRAINED_FILE = "trained.safetensors"


def saved_names(model: VLM) -> tuple[str, ...]:
    """The keys of `model.state_dict()` that a checkpoint must hold; all of them for a model without adapters.

    With adapters: every adapter, and every tensor of a part that is trained whole, reached by a gradient or not;
    the embeddings if one row of them is trained.
    """
    names = model.state_dict().keys()
    if model.adaptation is None:
        return tuple(names)
    whole = {part for part, mode in model.adaptation.tuning.parts().items() if isinstance(mode, Full)}
    twice = {"lm_head.weight"} if model.config.text_config.tie_word_embeddings else set()
    alone = {EMBEDDINGS} if trains_row(model, model.adaptation.tuning) else set()
    return tuple(
        name
        for name in names
        if is_adapter(name) or name in alone or (part_of(name) in whole and name not in twice)
    )


def save_model(model: VLM, processor: LlavaProcessor, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes what `load_model` opens; `state` holds exactly `saved_names(model)`, on the CPU."""
    assert state.keys() == set(saved_names(model))
    if model.adaptation is None:
        model.save_pretrained(folder, state_dict=dict(state))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / TRAINED_FILE, metadata={"format": "pt"})
        content = _description(model.adaptation, folder)
        (folder / ADAPTERS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    processor.save_pretrained(folder)


def _description(adaptation: Adaptation, folder: Path) -> dict[str, Any]:
    base = origin_json(adaptation.origin, folder) | {"sha256": adaptation.digests}
    return {"tuning": adaptation.tuning.model_dump(mode="json"), "base": base}


def load_adapted(
    folder: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False, merged: bool = False
) -> tuple[VLM, LlavaProcessor]:
    """The base with everything trained in place, in eval mode, and the folder's processor.

    `merged` adds the adapters to the weights. Raises CheckpointError when the base is gone or another one, or
    when a tensor is missing, unexpected or of another shape.
    """
    content = json.loads((folder / ADAPTERS_FILE).read_text(encoding="utf-8"))
    tuning = TuningConfig.model_validate(content["tuning"])
    origin = read_origin(content["base"], folder, trust_remote_code)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    model, _ = build_from(origin, template)
    digests = origin_digests(model, origin, tuning)
    _demand_same_base(content["base"]["sha256"], digests, folder)
    inject(model, tuning, origin.seed)
    model.adaptation = Adaptation(tuning, origin, digests)
    _load_strictly(model, load_file(folder / TRAINED_FILE), folder)
    if merged:
        merge_in_place(model)
        _log.info("the adapters of %s are merged into the weights", folder)
    if dtype is not None:
        model.to(dtype)
    return model.eval(), load_processor(folder, model, trust_remote_code=trust_remote_code)


def _demand_same_base(saved: dict[str, str], found: dict[str, str], folder: Path) -> None:
    wrong = [name for name in saved if saved[name] != found.get(name)]
    if wrong:
        raise CheckpointError(
            f"these adapters were trained on another base: {', '.join(wrong)} differs",
            str(folder),
            f"Put back what {ADAPTERS_FILE} names under base, as it was; adapters fit no other weights.",
        )


def _load_strictly(model: VLM, state: dict[str, Tensor], folder: Path) -> None:
    own, expected = model.state_dict(), set(saved_names(model))
    wrong = {
        "missing": sorted(expected - state.keys()),
        "unexpected": sorted(state.keys() - expected),
        "of another shape": sorted(k for k in expected & state.keys() if own[k].shape != state[k].shape),
    }
    if any(wrong.values()):
        counts = "; ".join(f"{len(keys)} {what} ({keys[0]})" for what, keys in wrong.items() if keys)
        raise CheckpointError(
            f"{TRAINED_FILE} does not fit the adapters: {counts}",
            str(folder),
            "Take an older step folder: this one is incomplete or was edited.",
        )
    model.load_state_dict(state, strict=False)
