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
from functools import cache, lru_cache, partial
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

Choice = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]

# transformers takes every name with "flash" in it for its own kernels, hence `varlen`.
NAMES = {
    "sdpa": "vlmtune_packed",
    "eager": "vlmtune_packed_eager",
    "flash_attention_2": "vlmtune_packed_varlen",
    "flash_attention_3": "vlmtune_packed_varlen_hopper",
    "flex_attention": "vlmtune_packed_blocks",
}
REMEDIES = {
    "flash_attention_2": "Choose auto or sdpa, or install the extra: pip install 'vlmtune[flash]'.",
    "flash_attention_3": "Choose auto or sdpa, or build flash-attention's `hopper` folder (flash_attn_interface).",
    "flex_attention": "Choose auto or sdpa.",
}


def use_attention(model: LlavaForConditionalGeneration, choice: Choice) -> tuple[str, str]:
    """The implementation now in force in the language model, and why; the vision tower keeps its own.

    Raises RecipeError when one is asked for by name that cannot run. Nothing of it reaches a saved
    config.json: it is a property of the machine, not of the weights.
    """
    chosen, reason = choose_attention(choice)
    model.set_attn_implementation({"text_config": NAMES[chosen]})
    return chosen, reason


def choose_attention(choice: Choice) -> tuple[str, str]:
    """The implementation that `choice` means on this machine, and why; raises RecipeError as `use_attention`."""
    if choice != "auto":
        if why := obstacle(choice):
            raise RecipeError(f"{choice} cannot run: {why}", "model.attention", REMEDIES[choice])
        return choice, "asked for"
    for name in ("flash_attention_3", "flash_attention_2"):
        if not obstacle(name):
            return name, "installed, and the GPU runs it"
    return "sdpa", obstacle("flash_attention_2")


def obstacle(name: str) -> str:
    """Why an implementation cannot train here; empty when it can."""
    if name not in REMEDIES:
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device" + ("; it has no backward pass on a CPU" if name == "flex_attention" else "")
    capability = torch.cuda.get_device_capability()
    if name == "flash_attention_3":
        missing = "flash_attn_interface is not installed" if not _installed("flash_attn_interface") else ""
        return missing if capability[0] == 9 else "the GPU is not a Hopper"
    if name == "flash_attention_2" and capability < (8, 0):
        return "the GPU is older than Ampere"
    needed = "flash_attn" if name == "flash_attention_2" else "triton"
    return "" if _installed(needed) else f"{needed} is not installed"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


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

    states = (query, key, value)
    output = _varlen(flash_attn_varlen_func, states, half, cu_seqlens, max_seqlen, rest)(
        dropout_p=rest.get("dropout", 0.0)
    )
    return output.unsqueeze(0), None


def _packed_varlen_hopper(
    module: nn.Module,
    query: Float[Tensor, "b h t c"],
    key: Float[Tensor, "b k u c"],
    value: Float[Tensor, "b k u c"],
    attention_mask: Tensor | None,
    cu_seqlens: Int[Tensor, " s1"] | None = None,
    max_seqlen: int | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "b t h c"], Tensor | None]:
    """FlashAttention 3, which knows no dropout; else as `_packed_varlen`."""
    half = _half_precision(value)
    if cu_seqlens is None or half is None or rest.get("dropout"):
        return _packed_sdpa(module, query, key, value, attention_mask, cu_seqlens, max_seqlen, **rest)
    from flash_attn_interface import flash_attn_varlen_func

    output = _varlen(flash_attn_varlen_func, (query, key, value), half, cu_seqlens, max_seqlen, rest)()
    # Releases differ in whether the sums of the rows come along.
    return (output[0] if isinstance(output, tuple) else output).unsqueeze(0), None


def _varlen(
    kernel: Callable[..., Any],
    states: tuple[Tensor, Tensor, Tensor],
    half: torch.dtype,
    cu_seqlens: Int[Tensor, " s1"],
    max_seqlen: int | None,
    rest: dict[str, Any],
) -> Callable[..., Any]:
    """The call that FlashAttention 2 and 3 share, for the options of one alone to be added."""
    window = rest.get("sliding_window")
    return partial(
        kernel,
        *(each[0].transpose(0, 1).to(half) for each in states),
        cu_seqlens,
        cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=rest.get("scaling"),
        softcap=rest.get("softcap") or 0.0,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        causal=True,
    )


def _packed_blocks(
    module: nn.Module,
    query: Float[Tensor, "b h t c"],
    key: Float[Tensor, "b k u c"],
    value: Float[Tensor, "b k u c"],
    attention_mask: Tensor | None,
    cu_seqlens: Int[Tensor, " s1"] | None = None,
    max_seqlen: int | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "b t h c"], Tensor | None]:
    """FlexAttention over the blocks of scores that belong to one sample; padded rows as `_packed_sdpa`."""
    if cu_seqlens is None or rest.get("dropout") or rest.get("softcap"):
        return _packed_sdpa(module, query, key, value, attention_mask, cu_seqlens, max_seqlen, **rest)
    blocks = _sample_blocks(cu_seqlens, query.shape[2], rest.get("sliding_window"))
    shared = query.shape[1] != key.shape[1]
    key, value = key.to(query.dtype), value.to(query.dtype)
    output = _flex(query.device.type)(
        query, key, value, block_mask=blocks, scale=rest.get("scaling"), enable_gqa=shared
    )
    return output.transpose(1, 2), None


@cache
def _flex(device: str) -> Callable[..., Tensor]:
    """Compiled where it is meant to run: uncompiled it builds the whole square of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=2)
def _sample_blocks(cu_seqlens: Int[Tensor, " s1"], length: int, window: int | None) -> Any:
    """The blocks of a row, made once for all layers: they pass the same `cu_seqlens`."""
    from torch.nn.attention.flex_attention import create_block_mask

    places = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sample, near = torch.searchsorted(cu_seqlens, places, right=True), length if window is None else window
    return create_block_mask(
        lambda row, head, query, key: (query >= key) & (query - key < near) & (sample[query] == sample[key]),
        B=None,
        H=None,
        Q_LEN=length,
        KV_LEN=length,
        device=cu_seqlens.device,
    )


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
    ("flash_attention_3", _packed_varlen_hopper, _packed_mask),
    ("flex_attention", _packed_blocks, _packed_mask),
):
    AttentionInterface.register(NAMES[_choice], _attend)
    AttentionMaskInterface.register(NAMES[_choice], _mask)
