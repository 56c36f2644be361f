"""The layout of the original LLaVA code (`liuhaotian/llava-v1.5-*`): reading it, and computing what it computes.

One flat config.json, of a Llama with `mm_*` keys beside; weights `model.*` and `lm_head.weight` of the language
model, `model.mm_projector.*`, and sometimes `model.vision_tower.vision_tower.vision_model.*`. Two smaller layouts
need the language model they were trained on: LoRA (adapter_model and non_lora_trainables) and the projector alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from vlmtune.config.schema import VisionConfig
from vlmtune.errors import CheckpointError
from vlmtune.export.compare import Probe
from vlmtune.export.folder import read_json
from vlmtune.models.checkpoint import load_config
from vlmtune.models.towers import load_tower
from vlmtune.models.vision import token_counter

IMAGE_ID = -200
"""Stands in the token ids where an image goes (IMAGE_TOKEN_INDEX of the original's constants.py)."""
LANGUAGES: dict[str, type[PreTrainedModel]] = {
    "LlavaLlamaForCausalLM": LlamaForCausalLM,
    "LlavaMistralForCausalLM": MistralForCausalLM,
}
"""The language model of each of the original's classes."""
PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower.vision_tower.vision_model."
_COMPUTED = ("position_ids", "inv_freq")
_PROJECTORS = ("linear", "mlp2x_gelu")


@final
class OriginalLlava(nn.Module):
    """The original's forward: every image's features stand in the text's embeddings where its mark was."""

    def __init__(
        self, language: PreTrainedModel, projector: nn.Module, tower: PreTrainedModel, layer: int, select: str
    ) -> None:
        super().__init__()
        self.language = language
        self.projector = projector
        self.tower = tower
        self.layer = layer
        self.select = select

    def features(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p d"]:
        """As CLIPVisionTower.feature_select and mm_projector: `patch` leaves the class token out."""
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        return self.projector(hidden[:, 1:] if self.select == "patch" else hidden)

    @torch.no_grad()
    def logits(
        self, input_ids: Int[Tensor, " t"], pixel_values: Float[Tensor, "n 3 h w"] | None
    ) -> Float[Tensor, "1 s v"]:
        """Float32 logits of one sample, as prepare_inputs_labels_for_multimodal makes its embeddings."""
        embed = self.language.get_input_embeddings()
        marks = (input_ids == IMAGE_ID).nonzero().flatten().tolist()
        texts = [
            embed(input_ids[start + 1 : end])
            for start, end in zip([-1, *marks], [*marks, len(input_ids)], strict=True)
        ]
        images = self.features(pixel_values.to(texts[0].dtype)) if pixel_values is not None else ()
        pieces = [texts[0]]
        for image, text in zip(images, texts[1:], strict=True):
            pieces += [image, text]
        return self.language(inputs_embeds=torch.cat(pieces)[None], use_cache=False).logits.float()


def original_logits(
    model: OriginalLlava, same: LlavaForConditionalGeneration, samples: Sequence[Probe]
) -> list[Float[Tensor, "1 t v"]]:
    """The logits of probes made for a llava of transformers, `same`: its runs of image ids are one mark here."""
    tokens = token_counter(same.config)(0, 0)
    marked = (_with_marks(each.input_ids[0], same.config.image_token_id, tokens) for each in samples)
    return [model.logits(ids, each.pixel_values) for ids, each in zip(marked, samples, strict=True)]


def _with_marks(ids: Int[Tensor, " t"], image_id: int, tokens: int) -> Int[Tensor, " s"]:
    image = ids == image_id
    first = image & (image.cumsum(0) % tokens == 1 % tokens)
    return torch.where(first, IMAGE_ID, ids)[~image | first]


@dataclass(frozen=True, slots=True)
class Original:
    """A folder of the original layout, opened."""

    config: dict[str, Any]
    model: OriginalLlava
    tower_in_weights: bool
    tokens: Path
    """Where its tokenizer is: its own folder, or the base's."""


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the original layout."""
    return "mm_vision_tower" in config or "mm_projector_type" in config


def open_original(
    path: Path, base: Path | None = None, tower: str | PreTrainedConfig | None = None
) -> Original:
    """The model in eval mode, every weight from a file, LoRA beside the weights that it changes.

    `base` is the language model of a LoRA or projector folder. `tower` says where the vision tower is, or what
    its config is when the weights hold it; None takes the config's `mm_vision_tower`. Raises CheckpointError when
    a weight is missing or left over, or when transformers' llava cannot compute what the original does.
    """
    config = read_json(path / "config.json")
    demand_convertible(config, str(path))
    adapted = (path / "adapter_config.json").is_file()
    own, whole = _own_tensors(path, adapted)
    if not whole and base is None:
        raise CheckpointError(
            "holds a part of a model only",
            str(path),
            "Give the language model it was trained on: --base PATH.",
        )
    tensors = {} if whole or base is None else _weights(base, "model", "pytorch_model")
    tensors = {name: tensor for name, tensor in (tensors | own).items() if not name.endswith(_COMPUTED)}
    projector = {name: tensors.pop(name) for name in [*tensors] if name.startswith(PROJECTOR)}
    vision = {name: tensors.pop(name) for name in [*tensors] if name.startswith(TOWER)}
    source = tower if isinstance(tower, PreTrainedConfig) else tower_path(config, path, tower)
    language = _language(config, tensors, str(path))
    dtype = language.dtype
    model = OriginalLlava(
        _with_adapters(language, path) if adapted else language,
        _projector(config, projector, str(path)).to(dtype),
        _tower(source, vision, dtype, str(path)),
        config.get("mm_vision_select_layer", -2),
        config.get("mm_vision_select_feature", "patch"),
    )
    return Original(config, model.eval(), bool(vision), path if whole or base is None else base)


def demand_convertible(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for what a llava of transformers does not compute."""
    refused = {
        f"its architecture is {architecture(config)}": architecture(config) not in LANGUAGES,
        f"its projector is {config.get('mm_projector_type')}": config.get("mm_projector_type", "linear")
        not in _PROJECTORS,
        "it cuts images into tiles (LLaVA-NeXT)": config.get("image_aspect_ratio") == "anyres",
        "its prompts mark an image's start and end": bool(config.get("mm_use_im_start_end")),
    }
    for reason, found in refused.items():
        if found:
            raise CheckpointError(
                f"cannot be a llava of transformers: {reason}",
                where,
                f"Known: {', '.join(LANGUAGES)} with a projector {' or '.join(_PROJECTORS)}.",
            )


# ---------------------------------------------------------------- files


def _own_tensors(path: Path, adapted: bool) -> tuple[dict[str, Tensor], bool]:
    """The folder's weights by their full names, and whether they are a whole model (not LoRA, not a projector)."""
    if adapted:
        found, whole = _weights(path, "non_lora_trainables"), False
    elif any((path / f"mm_projector.{suffix}").is_file() for suffix in ("safetensors", "bin")):
        found, whole = _weights(path, "mm_projector"), False
    else:
        found, whole = _weights(path, "model", "pytorch_model"), True
    return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}, whole


def _weights(folder: Path, *stems: str) -> dict[str, Tensor]:
    """The tensors of `<stem>.safetensors` or `<stem>.bin`, in one file or with an index; safetensors first."""
    for suffix in ("safetensors", "bin"):
        for stem in stems:
            index = read_json(folder / f"{stem}.{suffix}.index.json").get("weight_map", {})
            files = [folder / name for name in sorted({*index.values()})] or [folder / f"{stem}.{suffix}"]
            if all(file.is_file() for file in files):
                parts = [_load(file) for file in files]
                return {name: tensor for part in parts for name, tensor in part.items()}
    raise CheckpointError(
        f"there is no {stems[0]}.safetensors and no {stems[-1]}.bin", str(folder), "Download it again."
    )


def _load(file: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    The original saves pickles. `weights_only` reads them with torch's own unpickler, which makes tensors and plain
    containers and calls nothing else (sound since torch 2.6, CVE-2025-32434; we require 2.8). Nothing that vlmtune
    writes is read this way.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)  # foreign: the original's pickles
    except Exception as error:  # torch raises whatever the file makes it
        raise CheckpointError(f"cannot read it: {error}", str(file), "Nothing in it was run.") from error


# ---------------------------------------------------------------- parts


def language_config(config: Mapping[str, Any], rows: int) -> PreTrainedConfig:
    """The config of the language model alone, with so many embeddings."""
    kind = LANGUAGES[architecture(config)].config_class
    known = {*kind().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures"}
    options = {key: value for key, value in config.items() if key in known and value is not None}
    return kind(**options | {"vocab_size": rows})


def architecture(config: Mapping[str, Any]) -> str:
    """The name of the original's class; early configs lack it."""
    return (config.get("architectures") or ["LlavaLlamaForCausalLM"])[0]


def _language(config: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> PreTrainedModel:
    if "model.embed_tokens.weight" not in tensors:
        raise CheckpointError(
            "there is no model.embed_tokens.weight", where, "Give a whole model, or --base."
        )
    embeddings = tensors["model.embed_tokens.weight"]
    own = language_config(config, embeddings.shape[0])
    return _from_tensors(LANGUAGES[architecture(config)], own, tensors, embeddings.dtype, where)


def _from_tensors(
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    where: str,
) -> PreTrainedModel:
    """A model with exactly these weights; raises CheckpointError when one is missing or left over."""
    model, info = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    faults = {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys}
    if faults:
        raise CheckpointError(
            f"the weights do not fit {kind.__name__}: {faults}", where, "Download it again."
        )
    return model


def _projector(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    wide, width = config["mm_hidden_size"], config["hidden_size"]
    if config.get("mm_projector_type", "linear") == "linear":
        projector: nn.Module = nn.Linear(wide, width)
    else:
        projector = nn.Sequential(nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))
    try:
        projector.load_state_dict({name.removeprefix(PROJECTOR): value for name, value in tensors.items()})
    except RuntimeError as error:
        raise CheckpointError(f"the projector's weights do not fit: {error}", where) from error
    return projector


def tower_path(config: Mapping[str, Any], path: Path, given: str | None) -> str:
    """Where the vision tower of a folder is: as given, or as its config says, there or beside the folder's files."""
    name = given or config.get("mm_vision_tower")
    if not name:
        raise CheckpointError("does not name its vision tower", str(path), "Give --vision-tower PATH.")
    return str(path / name) if (path / name).is_dir() else name


def _tower(
    source: str | PreTrainedConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, where: str
) -> PreTrainedModel:
    """The tower with the weights in the folder; those at `source` when there are none."""
    if not tensors:
        if isinstance(source, PreTrainedConfig):
            raise CheckpointError("the weights of the vision tower are missing", where)
        return load_tower(VisionConfig(path=source), dtype)
    own = load_config(source, "--vision-tower") if isinstance(source, str) else source
    own = own.vision_config if "vision_config" in own.sub_configs else own
    named = {name.replace(TOWER, "vision_model.", 1): tensor for name, tensor in tensors.items()}
    return _from_tensors(CLIPVisionModel, own, named, dtype, where)


def _with_adapters(language: PreTrainedModel, path: Path) -> PreTrainedModel:
    """The language model with the folder's LoRA in place, not merged; raises CheckpointError when it does not fit."""
    from peft import PeftModel, get_peft_model_state_dict

    stored = set(_weights(path, "adapter_model"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error, below
        adapted = PeftModel.from_pretrained(language, str(path))
    fitting = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if stored != fitting:
        raise CheckpointError(
            f"its adapters are not those of this base: {sorted(stored ^ fitting)[:3]}",
            str(path),
            "Give the language model that the adapters were trained on: --base PATH.",
        )
    return adapted
