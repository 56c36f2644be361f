"""The model to be trained, without weights: every parameter has its shape, type and fate, and no memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmtune.config.tuning import Adapters, Lora, Part, Qlora, TuningConfig
from vlmtune.models.adapters import inject, target_layers
from vlmtune.models.tuning import PART_PREFIXES, apply_tuning, part_of
from vlmtune.models.vlm import VLM, VLMConfig

_BLOCK, _NESTED = 64, 256
"""NF4 with double quantisation: a byte of scale for 64 weights, four bytes for 256 scales (QLoRA, section 3)."""
_TABLES = 4 * (16 + 256) + 4
"""The two code books and the mean of the scales, in bytes, with every 4-bit layer."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter. Its bytes are those in memory (a 4-bit weight has half a byte a number, and its scales)."""

    name: str
    part: Part
    numel: int
    bytes: int
    itemsize: int
    trained: bool
    block: str
    """The transformer block it is in; empty for the rest."""


@dataclass(frozen=True)
class Skeleton:
    """A tuned model on the meta device."""

    tuning: TuningConfig
    model: VLM
    """With LoRA in place of QLoRA: bitsandbytes makes no weights without memory, and saves the same activations."""

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every parameter once; a tied lm_head is the embedding it shares."""
        four_bit, modules = self._four_bit(), self.model.named_modules()
        blocks = [f"{name}." for name, module in modules if isinstance(module, GradientCheckpointingLayer)]
        found = []
        for name, weight in self.model.named_parameters():
            count = weight.numel()
            size = _nf4_bytes(count) if name in four_bit else count * weight.itemsize
            block = next((each for each in blocks if name.startswith(each)), "")
            found.append(
                Weight(name, part_of(name), count, size, weight.itemsize, weight.requires_grad, block)
            )
        return tuple(found)

    def _four_bit(self) -> set[str]:
        """Names of the weights that QLoRA keeps in 4 bits: all linear layers of the part's blocks."""
        modes = {part: mode for part, mode in self.tuning.parts().items() if isinstance(mode, Qlora)}
        with torch.device("meta"):
            plain = VLM(self.model.config)
        found: set[str] = set()
        for part, mode in modes.items():
            every = target_layers(plain, part, mode.model_copy(update={"targets": None}))
            layers = {*every, *target_layers(plain, part, mode)}
            prefix = PART_PREFIXES[part][0]
            found |= {f"{prefix}{layer}.{inner}weight" for layer in layers for inner in ("", "base_layer.")}
        return found


def meta_model(config: VLMConfig, tuning: TuningConfig, dtype: torch.dtype, rounded: bool = False) -> VLM:
    """The tuned model on the meta device; `tuning` is without QLoRA.

    `rounded`: every weight in bfloat16, adapters too, as ZeRO and FSDP2 compute with.
    """
    with torch.device("meta"):
        model = VLM(config)
    _cast(model, dtype)
    if any(isinstance(mode, Adapters) for mode in tuning.parts().values()):
        inject(model, tuning, seed=0)
    apply_tuning(model, tuning)
    if rounded:
        _cast(model, torch.bfloat16)
    return model


def shallow(config: VLMConfig, layers: int, tower: int | None) -> VLMConfig:
    """The config with a language model of so many layers, and a tower of `tower` blocks (None keeps it)."""
    config = copy.deepcopy(config)
    text = config.text_config
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)  # foreign: only some of transformers' decoders have it
    if kinds is not None:
        text.layer_types = kinds[:layers]
    if tower is not None and tower < config.vision_config.num_hidden_layers:
        config.vision_config.num_hidden_layers = tower
        config.vision_feature_layer = -1
    return config


def _cast(model: VLM, dtype: torch.dtype) -> None:
    """The weights' type alone: buffers such as rotary frequencies stay float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def unquantized(tuning: TuningConfig) -> TuningConfig:
    """The tuning with LoRA in place of QLoRA."""
    modes = {
        part: Lora(**mode.model_dump() | {"mode": "lora"}) if isinstance(mode, Qlora) else mode
        for part, mode in tuning.parts().items()
    }
    return TuningConfig(**modes)


def _nf4_bytes(count: int) -> int:
    scales = -(-count // _BLOCK)
    return -(-count // 2) + scales + 4 * -(-scales // _NESTED) + _TABLES


__all__ = ["Skeleton", "Weight", "meta_model", "shallow", "unquantized"]
