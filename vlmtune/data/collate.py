"""Encoded samples -> one ChatBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmtune.data.packing import Packing
from vlmtune.types import IGNORE, ChatBatch, Encoded


def collate(samples: Sequence[Encoded], packing: Packing, pad: int = 0) -> ChatBatch:
    """One micro-batch: a packed row (isolated) or right-padded rows (none); pixels in order of appearance.

    Nothing predicts the first token of a sample, so it is never a label: in a packed row it would be learned
    from the sample before. No sample at all gives one `pad` token: the rank still takes part in the step.
    """
    rows = list(samples) or [bad_slot("", "no sample", pad)]
    labels = [torch.cat([row.labels.new_full((1,), IGNORE), row.labels[1:]]) for row in rows]
    pixels = [row.pixel_values for row in rows if row.pixel_values is not None]
    tokens = (_packed if packing == "isolated" else _padded)([row.input_ids for row in rows], labels, pad)
    return replace(
        tokens,
        pixel_values=torch.cat(pixels) if pixels else None,
        keys=tuple(sample.key for sample in samples),
        bad=tuple((sample.key, sample.bad) for sample in samples if sample.bad),
        seeds=tuple(sample.seed for sample in samples),
    )


def bad_slot(key: str, reason: str, pad: int) -> Encoded:
    """A sample's place when it cannot be used: one `pad` token that is not learned."""
    return Encoded(key, torch.tensor([pad]), torch.tensor([IGNORE]), None, reason)


def _packed(ids: list[Int[Tensor, " _"]], labels: list[Int[Tensor, " _"]], pad: int) -> ChatBatch:
    ends = torch.tensor([0, *(len(row) for row in ids)]).cumsum(0, dtype=torch.int32)
    return ChatBatch(
        input_ids=torch.cat(ids)[None],
        labels=torch.cat(labels)[None],
        position_ids=torch.cat([torch.arange(len(row)) for row in ids])[None],
        attention_mask=None,
        cu_seqlens=ends,
        pixel_values=None,
        keys=(),
    )


def _padded(ids: list[Int[Tensor, " _"]], labels: list[Int[Tensor, " _"]], pad: int) -> ChatBatch:
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad)
    return ChatBatch(
        input_ids=input_ids,
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        position_ids=torch.arange(input_ids.shape[1]).repeat(len(ids), 1),
        attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        cu_seqlens=None,
        pixel_values=None,
        keys=(),
    )


__all__ = ["bad_slot", "collate"]
