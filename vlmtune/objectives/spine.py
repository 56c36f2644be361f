"""The one forward through tower, projector and language model that every chat objective shares, and its first loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmtune.objectives.functional import linear_cross_entropy, next_token_targets
from vlmtune.types import IGNORE, ChatBatch


def hidden_states(model: nn.Module, batch: ChatBatch) -> Float[Tensor, "b t d"]:
    """The language model's last hidden states (after the final norm); no logits are made.

    A rank whose micro-batch holds no image runs a blank one at weight zero when other ranks exist: all ranks then
    call the same modules in the same order, without which DDP fails on its next step and ZeRO-3 or FSDP hang.
    """
    segments: dict[str, Any] = {}
    if batch.cu_seqlens is not None:
        segments = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": int(batch.position_ids.max()) + 1}
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values}
    if batch.pixel_values is None and torch.distributed.is_initialized():
        inputs = {"inputs_embeds": _embeddings_and_blank(model, batch.input_ids)}
    return model.model(
        **inputs,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        **segments,
    ).last_hidden_state


def _embeddings_and_blank(model: nn.Module, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
    """The embeddings of text, in the order in which the model meets its modules when there are images."""
    embeddings = model.get_input_embeddings()(ids)
    side = model.config.vision_config.image_size
    blank = torch.zeros(1, 3, side, side, dtype=embeddings.dtype, device=ids.device)
    features = torch.stack(tuple(model.get_image_features(pixel_values=blank).pooler_output))
    return embeddings + 0.0 * features.sum().to(embeddings.dtype)


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
        return linear_cross_entropy(states, head.weight, targets, chunk, head.bias)

    return _in_place_of_forward(head, loss, states)


def _in_place_of_forward(module: nn.Module, compute: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """`compute` of the inputs within the module's own call: ZeRO-3 gathers a module's weights in its hooks only."""
    module.forward = compute
    try:
        return module(inputs)
    finally:
        del module.forward
