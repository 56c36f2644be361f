"""The one forward through tower, projector and language model that every chat objective shares."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmtune.types import ChatBatch


def hidden_states(model: nn.Module, batch: ChatBatch) -> Float[Tensor, "b t d"]:
    """The language model's last hidden states (after the final norm); no logits are made.

    A rank whose micro-batch holds no image runs a blank one at weight zero when other ranks exist: all ranks then
    call the same modules, without which DDP fails on its next step and ZeRO-3 or FSDP hang.
    """
    segments: dict[str, Any] = {}
    if batch.cu_seqlens is not None:
        segments = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": int(batch.position_ids.max()) + 1}
    hidden = model.model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        **segments,
    ).last_hidden_state
    if batch.pixel_values is None and torch.distributed.is_initialized():
        hidden = hidden + 0.0 * _blank_features(model, hidden.dtype).sum()
    return hidden


def _blank_features(model: nn.Module, dtype: torch.dtype) -> Float[Tensor, "n q d"]:
    side = model.config.vision_config.image_size
    blank = torch.zeros(1, 3, side, side, dtype=dtype, device=model.device)
    return torch.stack(tuple(model.get_image_features(pixel_values=blank).pooler_output))
