"""The one forward through tower, projector and language model that every chat objective shares, and its first loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmtune.objectives.functional import (
    fused_linear_cross_entropy,
    linear_cross_entropy,
    next_token_targets,
)
from vlmtune.types import IGNORE, ChatBatch


def hidden_states(model: nn.Module, batch: ChatBatch) -> Float[Tensor, "b t d"]:
    """The language model's last hidden states (after the final norm); no logits are made.

    A rank whose micro-batch holds no image runs a blank one at weight zero when other ranks exist: all ranks then
    call the same modules in the same order, without which DDP fails on its next step and ZeRO-3 or FSDP hang.
    """
    rest: dict[str, Any] = {
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    if batch.cu_seqlens is not None:
        rest |= {"cu_seqlens": batch.cu_seqlens, "max_seqlen": int(batch.position_ids.max()) + 1}
    if batch.pixel_values is None and torch.distributed.is_initialized():
        return _in_place_of_forward(model.model, partial(_text_and_blank, model, rest), batch.input_ids)
    return model.model(input_ids=batch.input_ids, pixel_values=batch.pixel_values, **rest).last_hidden_state


def _text_and_blank(
    model: nn.Module, rest: dict[str, Any], ids: Int[Tensor, "b t"]
) -> Float[Tensor, "b t d"]:
    """What stock Llava does with text, and with a blank image where it would embed images."""
    embeddings = model.get_input_embeddings()(ids)
    side = model.config.vision_config.image_size
    blank = torch.zeros(1, 3, side, side, dtype=embeddings.dtype, device=ids.device)
    features = torch.stack(tuple(model.get_image_features(pixel_values=blank).pooler_output))
    embeddings = embeddings + 0.0 * features.sum().to(embeddings.dtype)
    return model.model.language_model(inputs_embeds=embeddings, **rest).last_hidden_state


def supervised_tokens(batch: ChatBatch) -> int:
    """The denominator of `token_loss`; the first label of a row has no state that predicts it."""
    return int((batch.labels[:, 1:] != IGNORE).sum())


def token_loss(
    model: nn.Module, hidden: Float[Tensor, "b t d"], labels: Int[Tensor, "b t"], chunk: int
) -> Float[Tensor, ""]:
    """The *sum* of the cross entropies of the supervised tokens."""
    states, targets = next_token_targets(hidden, labels)
    head = model.lm_head

    def loss(states: Float[Tensor, "s d"]) -> Float[Tensor, ""]:
        if model.fused_loss:
            return fused_linear_cross_entropy(states, head.weight, targets, head.bias)
        return linear_cross_entropy(states, head.weight, targets, chunk, head.bias)

    return _in_place_of_forward(head, loss, states)


def _in_place_of_forward(module: nn.Module, compute: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """`compute` of the inputs within the module's own call, whose hooks gather weights under ZeRO-3 and FSDP."""
    module.forward = compute
    try:
        return module(inputs)
    finally:
        del module.forward
