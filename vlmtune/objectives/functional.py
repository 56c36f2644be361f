"""The loss mathematics as pure functions. Letters: s supervised tokens, d width, v vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmtune.types import IGNORE


def next_token_targets(
    hidden: Float[Tensor, "b t d"], labels: Int[Tensor, "b t"]
) -> tuple[Float[Tensor, "s d"], Int[Tensor, " s"]]:
    """The hidden states that predict a supervised token, and those tokens. Labels come unshifted."""
    targets = labels[:, 1:]
    wanted = targets != IGNORE
    return hidden[:, :-1][wanted], targets[wanted]


def linear_cross_entropy(
    hidden: Float[Tensor, "s d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, " s"],
    chunk: int,
    bias: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, ""]:
    """The *sum* over s of the cross entropy of `hidden @ weight.T + bias`, in float32 or wider.

    At most `chunk` rows of logits exist at a time. The gradient is formed together with the value, since it is
    the value's by-product (softmax minus one-hot), so nothing is recomputed in the backward pass.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # cast once here, not once a chunk
        hidden = hidden.to(torch.get_autocast_dtype(device))
    grads = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk, grads)  # type: ignore[return-value]


def fused_linear_cross_entropy(
    hidden: Float[Tensor, "s d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, " s"],
    bias: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, ""]:
    """As `linear_cross_entropy`, by Liger's Triton kernel, which chooses its own chunks."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if not hidden.shape[0]:  # it divides by the number of rows
        return hidden.sum() + 0.0 * weight.sum()
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets, bias)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        grads: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        matrix = weight.to(hidden.dtype)
        needs_hidden, needs_weight, needs_bias = (grads and need for need in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needs_bias else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ matrix.T).to(wide)
            if bias is not None:
                logits += bias
            norm = logits.logsumexp(-1, keepdim=True)
            picked = targets[rows, None]
            total += (norm - logits.gather(-1, picked)).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            slope = logits.sub_(norm).exp_()
            slope.scatter_add_(-1, picked, slope.new_full(picked.shape, -1.0))
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ matrix
            if grad_weight is not None:
                grad_weight += slope.T @ hidden[rows]
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(weight_dtype),
            None if grad_bias is None else (grad_bias * scale).to(bias_dtype),
            None,
            None,
            None,
        )


def rows_mean(
    losses: Float[Tensor, "k i"],
    counted: Bool[Tensor, " i"],
    totals: Mapping[str, int | float],
    as_written: bool,
) -> Float[Tensor, ""]:
    """This share's part of the mean loss over the step's images, `totals["images"]`, k draws each.

    A row that is not `counted` adds exactly 0. As written in Ross's release, text-only samples are counted in a mean
    over `totals["rows"]`, which is then multiplied by images / (images + 1e-6), both counted k times.
    """
    draws, images = len(losses), totals["images"]
    total = (losses * counted).sum() / draws
    if not as_written:
        return total / max(images, 1)
    return total / max(totals["rows"], 1) * (1 / (1 + 1e-6 / (draws * images)) if images else 0.0)
