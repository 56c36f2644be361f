"""Attention for packed rows: each sample attends within itself, without a block-diagonal mask.

transformers' own packing reads restarting `position_ids`, which leaks silently when a mask or a cache is
given, and builds a T x T mask that costs 4 to 13 times a loop over segments on CPU. Here the row's
`cu_seqlens` (s + 1 cumulative lengths) travel as a keyword through the stock forward to the functions below.
Without it they are transformers' own: padded batches, generation with a cache and decode steps are as ever.

Shape letters: b rows, h query heads, k key heads, t tokens, u cached tokens, c channels, s1 segments + 1.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    eager_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from vlmtune.errors import RecipeError

Choice = Literal["auto", "sdpa", "eager", "flash_attention_2"]

# transformers takes every name with "flash" in it for its own kernels, hence `varlen`.
NAMES = {
    "sdpa": "vlmtune_packed",
    "eager": "vlmtune_packed_eager",
    "flash_attention_2": "vlmtune_packed_varlen",
}


def use_attention(model: LlavaForConditionalGeneration, choice: Choice) -> tuple[str, str]:
    """The implementation now in force in the language model, and why; the vision tower keeps its own.

    Raises RecipeError when FlashAttention is asked for by name and cannot run. Nothing of it reaches a saved
    config.json: it is a property of the machine, not of the weights.
    """
    chosen, reason = choose_attention(choice)
    model.set_attn_implementation({"text_config": NAMES[chosen]})
    return chosen, reason


def choose_attention(choice: Choice) -> tuple[str, str]:
    """The implementation that `choice` means on this machine, and why; raises RecipeError as `use_attention`."""
    obstacle = _flash_obstacle()
    if choice == "flash_attention_2" and obstacle:
        raise RecipeError(
            f"FlashAttention cannot run: {obstacle}",
            where="model.attention",
            remedy="Choose auto or sdpa, or install the extra: pip install 'vlmtune[flash]'.",
        )
    if choice != "auto":
        return choice, "asked for"
    return ("sdpa", obstacle) if obstacle else ("flash_attention_2", "installed, on CUDA")


def _flash_obstacle() -> str:
    """Why FlashAttention's varlen kernel cannot run here; empty when it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than Ampere"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    return ""


# ---------------------------------------------------------------- masks


def _packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Bool[Tensor, "b u"] | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    build: Callable[..., Tensor | None] = sdpa_mask,
    **rest: Any,
) -> Tensor | None:
    """transformers' mask, except for packed rows (an empty one) and right-padded batches (none).

    transformers asks for a mask and forbids skipping it when it saw positions restart. The empty mask costs
    nothing and lets the attention below tell a packed row whose `cu_seqlens` were forgotten from a plain one.
    """
    square = q_length == kv_length
    if square and attention_mask is None and not allow_is_causal_skip and not use_vmap:
        return torch.empty(batch_size, 1, 0, 0, dtype=torch.bool, device=rest["device"])
    if square and attention_mask is not None and _is_right_padded(attention_mask, q_length):
        attention_mask = None  # a causal query never sees the padding behind it
    return build(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **rest,
    )


def _packed_eager_mask(**arguments: Any) -> Tensor | None:
    return _packed_mask(**arguments, build=eager_mask)


def _is_right_padded(mask: Bool[Tensor, "b u"], length: int) -> bool:
    return mask.shape[1] == length and bool((mask[:, 1:] <= mask[:, :-1]).all())


# ---------------------------------------------------------------- attention


def _packed_sdpa(
    module: nn.Module,
    query: Float[Tensor, "b h t c"],
    key: Float[Tensor, "b k u c"],
    value: Float[Tensor, "b k u c"],
    attention_mask: Tensor | None,
    cu_seqlens: Int[Tensor, " s1"] | None = None,
    max_seqlen: int | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "b t h c"], Tensor | None]:
    if cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, _present(attention_mask), **rest)
    states = (query, key, value)
    return _per_segment(sdpa_attention_forward, sdpa_mask, module, states, cu_seqlens, rest), None


def _packed_eager(
    module: nn.Module,
    query: Float[Tensor, "b h t c"],
    key: Float[Tensor, "b k u c"],
    value: Float[Tensor, "b k u c"],
    attention_mask: Tensor | None,
    cu_seqlens: Int[Tensor, " s1"] | None = None,
    max_seqlen: int | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "b t h c"], Tensor | None]:
    # Each model file has its own (soft caps, sinks); stock models fall back to it by this very name.
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    if cu_seqlens is None:
        return eager(module, query, key, value, _present(attention_mask), **rest)
    return _per_segment(eager, eager_mask, module, (query, key, value), cu_seqlens, rest), None


def _packed_varlen(
    module: nn.Module,
    query: Float[Tensor, "b h t c"],
    key: Float[Tensor, "b k u c"],
    value: Float[Tensor, "b k u c"],
    attention_mask: Tensor | None,
    cu_seqlens: Int[Tensor, " s1"] | None = None,
    max_seqlen: int | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "b t h c"], Tensor | None]:
    """FlashAttention for packed rows in half precision; everything else as `_packed_sdpa`."""
    half = _half_precision(value)
    if cu_seqlens is None or half is None:
        return _packed_sdpa(module, query, key, value, attention_mask, cu_seqlens, max_seqlen, **rest)
    from flash_attn import flash_attn_varlen_func

    window = rest.get("sliding_window")
    rows = (states[0].transpose(0, 1).to(half) for states in (query, key, value))
    output = flash_attn_varlen_func(
        *rows,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        dropout_p=rest.get("dropout", 0.0),
        softmax_scale=rest.get("scaling"),
        softcap=rest.get("softcap") or 0.0,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        causal=True,
    )
    return output.unsqueeze(0), None


def _per_segment(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    build_mask: Callable[..., Tensor | None],
    module: nn.Module,
    states: tuple[Float[Tensor, "1 h t c"], Float[Tensor, "1 k t c"], Float[Tensor, "1 k t c"]],
    cu_seqlens: Int[Tensor, " s1"],
    rest: dict[str, Any],
) -> Float[Tensor, "1 t h c"]:
    """Causal attention within each segment.

    Splits rather than slices: the backward of a split is one concatenation, of a slice a whole row of zeros.
    """
    lengths = cu_seqlens.diff().tolist()
    window = rest.get("sliding_window")
    pattern = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    outputs = []
    for query, key, value in zip(*(part.split(lengths, dim=2) for part in states), strict=True):
        mask = build_mask(
            batch_size=1,
            q_length=query.shape[2],
            kv_length=query.shape[2],
            mask_function=pattern,
            local_size=window,
            dtype=query.dtype,
            device=query.device,
        )
        outputs.append(attend(module, query, key, value, mask, **rest)[0])
    return torch.cat(outputs, dim=1)


def _present(mask: Tensor | None) -> Tensor | None:
    """The mask itself; raises ValueError for the empty one, which stands for a packed row."""
    if mask is not None and mask.numel() == 0:
        raise ValueError("positions restart within a row but cu_seqlens is missing: samples would mix")
    return mask


def _half_precision(states: Tensor) -> torch.dtype | None:
    """The half-precision type attention runs in; None for float32 outside autocast."""
    if torch.is_autocast_enabled(states.device.type):
        return torch.get_autocast_dtype(states.device.type)
    return states.dtype if states.dtype in (torch.float16, torch.bfloat16) else None


for _choice, _attend, _mask in (
    ("sdpa", _packed_sdpa, _packed_mask),
    ("eager", _packed_eager, _packed_eager_mask),
    ("flash_attention_2", _packed_varlen, _packed_mask),
):
    AttentionInterface.register(NAMES[_choice], _attend)
    AttentionMaskInterface.register(NAMES[_choice], _mask)
