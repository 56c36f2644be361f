"""Floating point operations of a step, weight by weight: forward, input gradient, weight gradient, recomputation.

A matrix product counts 2 operations for a weight and a token in the forward pass, as many again for the gradient of
its input if anything before it is trained, and as many for its own gradient if it is trained. A frozen tower under a
trained projector is counted once, a frozen language model twice. Attention counts the whole square of scores, as in
the MFU of PaLM (arXiv 2204.02311, appendix B); norms and activations count nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmtune.models.tuning import unreached_prefixes
from vlmtune.models.vision import patch_features, tower_family
from vlmtune.models.vlm import VLM
from vlmtune.planning.batches import Micro


@dataclass
class Pass:
    """Operations of the three passes over something."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0
    """Forward passes that activation checkpointing repeats."""

    def add(self, forward: float, times: int, repeated: bool) -> None:
        """Takes in a product that the backward pass does `times` times over."""
        self.forward += forward
        self.backward += forward * times
        self.again += forward * repeated

    @property
    def useful(self) -> float:
        """Without recomputation."""
        return self.forward + self.backward

    @property
    def computed(self) -> float:
        return self.useful + self.again


@dataclass(frozen=True)
class Costs:
    """Operations for one image, one token of the language model, one squared length, one supervised token."""

    vision: Pass
    projector: Pass
    language: Pass
    attention: Pass
    head: Pass

    def of(self, micro: Micro) -> dict[str, Pass]:
        """The operations of a micro-batch, padding included."""
        amounts = {
            "vision": micro.images,
            "projector": micro.images,
            "language": micro.computed,
            "attention": micro.squares,
            "head": micro.supervised,
        }
        return {name: _times(self.__dict__[name], amount) for name, amount in amounts.items()}


def costs(model: VLM, checkpointing: bool) -> Costs:
    """What a tuned model (on any device, also meta) costs."""
    config = model.config
    found = Costs(*(Pass() for _ in fields(Costs)))
    reached = False
    unreached = unreached_prefixes(config)
    tower, projector, language = (
        model.model.vision_tower,
        model.model.multi_modal_projector,
        model.model.language_model,
    )
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + tower_family(vision).prefix_tokens
    for name, module, block in _products(tower):
        dead = f"model.vision_tower.{name}.".startswith(unreached)
        reached = _count(
            found.vision, module, tokens, reached and not dead, block and checkpointing and not dead
        )
    side = 4.0 * tokens**2 * vision.hidden_size * vision.num_hidden_layers
    found.vision.add(side, 2 * reached, checkpointing and reached)
    reached = _projector(found.projector, projector, config, reached)
    reached = reached or language.get_input_embeddings().weight.requires_grad
    for _, module, block in _products(language):
        reached = _count(found.language, module, 1, reached, block and checkpointing)
    text = config.text_config
    width = text.num_attention_heads * (text.head_dim or text.hidden_size // text.num_attention_heads)
    found.attention.add(4.0 * width * text.num_hidden_layers, 2 * reached, checkpointing and reached)
    _count(found.head, model.lm_head, 1, reached, False)
    return found


def _projector(into: Pass, projector: nn.Module, config: LlavaConfig, reached: bool) -> bool:
    """Counted by running it, since projectors differ in what they do with the patches."""
    width = config.vision_config.hidden_size
    weight = next(projector.parameters())
    features = torch.empty(1, patch_features(config), width, device=weight.device, dtype=weight.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        projector(features)
    weights = [module for _, module, _ in _products(projector)]
    size = sum(module.weight.numel() for module in weights)
    per_weight = counter.get_total_flops() / max(2 * size, 1)
    for module in weights:
        reached = _count(into, module, per_weight, reached, False)
    return reached or any(weight.requires_grad for weight in projector.parameters())


def _count(into: Pass, module: nn.Module, tokens: float, reached: bool, repeated: bool) -> bool:
    """Adds a product; whether a gradient flows behind it."""
    weight = module.weight
    times = int(reached) + int(weight.requires_grad)
    into.add(2.0 * weight.numel() * tokens, times, repeated and times > 0)
    return reached or weight.requires_grad


def _products(module: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Linear layers and convolutions in order, and whether a checkpoint repeats each.

    The last product of a block is not repeated: the recomputation stops when it has all that was saved.
    """
    found = [(name, each) for name, each in module.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    blocks = [name for name, each in module.named_modules() if isinstance(each, GradientCheckpointingLayer)]
    inside = {block: [name for name, _ in found if name.startswith(f"{block}.")] for block in blocks}
    repeated = {name for names in inside.values() for name in names[:-1]}
    return ((name, each, name in repeated) for name, each in found)


def _times(one: Pass, amount: float) -> Pass:
    return Pass(one.forward * amount, one.backward * amount, one.again * amount)


def total(parts: Mapping[str, Pass]) -> Pass:
    """The sum over the parts."""
    return Pass(*(sum(part.__dict__[field.name] for part in parts.values()) for field in fields(Pass)))


__all__ = ["Costs", "Pass", "costs", "total"]
