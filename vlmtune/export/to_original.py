"""A llava of transformers written in the layout of the original LLaVA code."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlmtune.config.schema import VisionConfig
from vlmtune.errors import CheckpointError
from vlmtune.export.compare import demand_close, logits
from vlmtune.export.folder import new_folder, read_json, write_json
from vlmtune.export.hf import export_record, write_record
from vlmtune.export.original import LANGUAGES, PROJECTOR, TOWER, open_original, original_logits
from vlmtune.export.probe import probes_of
from vlmtune.export.weights import PARTS, write_stream
from vlmtune.models.checkpoint import load_model
from vlmtune.models.towers import load_tower
from vlmtune.models.vlm import VLM

_LANGUAGE_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "attention_dropout", "sliding_window", "head_dim"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def to_original(path: Path, out: Path, tower: str | None = None) -> float:
    """The largest logit difference, after `out` holds the llava at `path` in the original's layout.

    `tower` is the vision tower that the config names; a folder that was converted before knows it. Raises
    CheckpointError when the original cannot compute what the model does.
    """
    model, processor = load_model(path)
    _demand_known(model, processor, path)
    record = read_json(path / "manifest.json").get("original", {})
    name = tower or record.get("config", {}).get("mm_vision_tower")
    if name is None:
        raise CheckpointError(
            "the original's config names a vision tower",
            str(path),
            "Say which: --vision-tower openai/clip-vit-large-patch14-336, or a folder.",
        )
    rows = _kept_rows(model, processor.tokenizer, record)
    config = _config(model, processor, rows, name, record.get("config", {}))
    tensors = _tensors(model, rows)
    elsewhere = not record.get("tower_in_weights", True) and _is_the_named(model.model.vision_tower, name)
    if elsewhere:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(TOWER)}
    with new_folder(out) as aside:
        plan = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
        parts = write_stream(plan, tensors.__getitem__, aside, part=_part)
        write_json(aside / "config.json", config)
        _write_tokenizer(processor.tokenizer, rows, record, aside)
        if (path / "tokenizer.model").is_file():  # the original's code reads no other
            shutil.copy(path / "tokenizer.model", aside)
        difference = _compare(model, processor, aside, rows, name if elsewhere else None)
        found = {
            "layout": "original",
            "converted": {
                "from": "a llava of transformers",
                "path": str(path),
                "largest_logit_difference": difference,
            },
        }
        write_record(aside, out.name, True, export_record(False, model.dtype, parts, found))
    return difference


def _demand_known(model: VLM, processor: LlavaProcessor, path: Path) -> None:
    """Raises CheckpointError for what the original's code does not compute."""
    config, images = model.config, processor.image_processor
    squared = isinstance(images, LlavaImageProcessorPil) and images.do_pad
    refused = {
        "it has adapters: `vlmtune merge` them first": model.adaptation is not None,
        f"its projector is {config.projector['type']}": config.projector["type"] not in ("linear", "mlp2x"),
        f"its vision tower is {config.vision_config.model_type}": config.vision_config.model_type
        != "clip_vision_model",
        f"its language model is {config.text_config.model_type}": config.text_config.model_type
        not in {kind.config_class.model_type for kind in LANGUAGES.values()},
        "its images are stretched, neither padded nor cropped": not squared and not images.do_center_crop,
        f"its projector's activation is {config.projector_hidden_act}": config.projector["type"] == "mlp2x"
        and config.projector_hidden_act != "gelu"
        and not _is_linear(model),
    }
    for reason, found in refused.items():
        if found:
            raise CheckpointError(
                f"cannot be in the original's layout: {reason}", str(path), "Use it as it is."
            )


def _is_linear(model: VLM) -> bool:
    """Whether the projector is a linear layer, as such or as an export writes it: with an identity behind."""
    if model.config.projector["type"] == "linear":
        return True
    second = model.model.multi_modal_projector.linear_2
    same = torch.equal(second.weight, torch.eye(len(second.weight), dtype=second.weight.dtype))
    return model.config.projector_hidden_act == "linear" and same and not second.bias.any()


def _kept_rows(model: VLM, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]) -> int:
    """The embeddings that the original has: it has no image token, which is the last but for padding, if added."""
    rows = model.get_input_embeddings().num_embeddings
    image = model.config.image_token_id
    behind = {token for token, number in tokenizer.get_vocab().items() if number >= image}
    if behind <= {tokenizer.convert_ids_to_tokens(image), tokenizer.pad_token}:
        return min(rows, record.get("rows", image))
    return rows


def _config(
    model: VLM, processor: LlavaProcessor, rows: int, tower: str, recorded: Mapping[str, Any]
) -> dict[str, Any]:
    """The flat config. One that was recorded keeps its own keys; what the model says otherwise replaces them."""
    text, images = model.config.text_config.to_dict(), processor.image_processor
    rope = dict(text.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    kind = next(
        name for name, each in LANGUAGES.items() if each.config_class.model_type == text["model_type"]
    )
    padded = isinstance(images, LlavaImageProcessorPil) and images.do_pad
    select = {"default": "patch", "full": "cls_patch"}[model.config.vision_feature_select_strategy]
    found = {
        "architectures": [kind],
        "model_type": "llava_" + text["model_type"],
        **{key: text[key] for key in _LANGUAGE_KEYS if key in text},
        "vocab_size": rows,
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type") == "default" else rope,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "use_cache": True,
        "mm_vision_tower": tower,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "linear" if _is_linear(model) else "mlp2x_gelu",
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "mm_vision_select_feature": select,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad" if padded else "square",
    }
    if not recorded:
        return found
    free = {"model_type", "use_cache", "mm_use_im_patch_token", "image_aspect_ratio"}
    changed = {key: value for key, value in found.items() if key in recorded and key not in free}
    return {**recorded, **changed}


def _tensors(model: VLM, rows: int) -> dict[str, Tensor]:
    """The weights by the original's names."""
    tied = model.config.text_config.tie_word_embeddings
    tensors = {} if tied else {"lm_head.weight": model.lm_head.weight[:rows]}
    tensors |= {f"model.{name}": value for name, value in model.model.language_model.state_dict().items()}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:rows]
    tensors |= {TOWER + name: value for name, value in model.model.vision_tower.state_dict().items()}
    names = {"linear_1": ""} if _is_linear(model) else {"linear_1": "0.", "linear_2": "2."}
    for name, value in model.model.multi_modal_projector.state_dict().items():
        layer, _, kind = name.partition(".")
        if layer in names:
            tensors[f"{PROJECTOR}{names[layer]}{kind}"] = value
    return tensors


def _part(name: str) -> str:
    prefixes = {TOWER: "vision_tower", PROJECTOR: "multi_modal_projector", "": "language_model"}
    return PARTS[next(part for prefix, part in prefixes.items() if name.startswith(prefix))]


def _is_the_named(tower: PreTrainedModel, name: str) -> bool:
    """Whether the tower has the weights that its name stands for; False when they are not here."""
    try:
        named = load_tower(VisionConfig(path=name), tower.dtype).state_dict()
    except CheckpointError:
        return False
    ours = tower.state_dict()
    return named.keys() == ours.keys() and all(torch.equal(named[key], ours[key]) for key in ours)


def _write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, rows: int, record: Mapping[str, Any], folder: Path
) -> None:
    """The tokenizer without the tokens that have no row any more."""
    tokenizer.save_pretrained(folder)
    whole = read_json(folder / "tokenizer.json")
    gone = {each["content"] for each in whole["added_tokens"] if each["id"] >= rows}
    whole["added_tokens"] = [each for each in whole["added_tokens"] if each["id"] < rows]
    write_json(folder / "tokenizer.json", whole)
    config = read_json(folder / "tokenizer_config.json")
    spare = tokenizer.unk_token or tokenizer.eos_token
    pad = record.get("pad_token", spare if tokenizer.pad_token in gone else tokenizer.pad_token)
    for key in ("processor_class", "is_local", "local_files_only", "extra_special_tokens", "pad_token"):
        config.pop(key, None)
    numbered = config.pop("added_tokens_decoder", {})
    if numbered:
        config["added_tokens_decoder"] = {key: each for key, each in numbered.items() if int(key) < rows}
    config = {key: value for key, value in config.items() if not (isinstance(value, str) and value in gone)}
    write_json(folder / "tokenizer_config.json", config | ({"pad_token": pad} if pad else {}))


def _compare(model: VLM, processor: LlavaProcessor, folder: Path, rows: int, tower: str | None) -> float:
    """The largest logit difference to the folder as written, on the tokens that both have.

    `tower`: where the weights of the vision tower are, if not in the folder.
    """
    samples = probes_of(model, processor)
    opened = open_original(folder, tower=tower or model.config.vision_config)
    theirs = original_logits(opened.model, model, samples)
    ours = [each[..., :rows] for each in logits(model, samples)]
    exact = model.dtype == torch.float32
    return demand_close(ours, theirs, exact, f"{folder}: logits of the two layouts").largest
