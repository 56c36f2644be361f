"""A proof on the user's own model, before step 1, that samples in one packed row do not see each other.

A leak trains without an error, and the loss even looks better. Whether there is one depends on the attention, the
model's own mask and the libraries' versions together, so it is tried rather than reasoned about. The first blocks of
the language model suffice: all share the attention, and a block of each kind (sliding, full) is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmtune.errors import TrainingError
from vlmtune.models.vlm import VLM

_LENGTHS = (7, 4, 9)
"""Tokens of the samples in the row that is tried."""
_BLOCKS = 2
"""What the second block reads has passed through the first: a leak of keys alone shows here at the latest."""
_UNTOUCHED, _UNTOUCHED_HALF = 1e-5, 2e-3
"""Relative change, in float32 and under autocast, that is rounding; a leak changes states by parts of themselves."""
_ALONE, _ALONE_HALF = 1e-3, 5e-2
"""The same between a sample in a row and alone, where sums run in another order."""


def prove_isolation(model: VLM, device: torch.device, half: bool) -> float:
    """The largest relative change of a sample's states when another sample of its row changes: rounding at most.

    Runs a row of three short samples, changes each in turn, and runs each alone, on `device` and in the precision of
    training (`half`: bfloat16). Weights, training mode, random state and the place of the weights are left as they
    were. Raises TrainingError when samples see each other, or when a sample in a row is not what it is alone.
    """
    ids = _ids(model)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=half)
    with _short(model, device) as run, torch.no_grad(), cast:
        base = run(ids)
        changed = [run(_other(ids, place, model)) for place in range(len(ids))]
        alone = [run([one])[0] for one in ids]
    exact = not half and base[0].dtype == torch.float32
    worst = max(
        _demand_untouched(base, states, place, _UNTOUCHED if exact else _UNTOUCHED_HALF)
        for place, states in enumerate(changed)
    )
    for place, (found, expected) in enumerate(zip(base, alone, strict=True), 1):
        moved = _change(found, expected)
        fine = moved <= (_ALONE if exact else _ALONE_HALF)
        _demand(fine, f"sample {place} of a row differs by {moved:.1g} from the same sample alone")
    return worst


def _demand_untouched(
    base: list[Float[Tensor, "_ d"]], states: list[Float[Tensor, "_ d"]], place: int, rounding: float
) -> float:
    """The largest change of the samples other than `place`, the one whose tokens were changed."""
    moved = [_change(now, before) for now, before in zip(states, base, strict=True)]
    _demand(moved[place] > rounding, f"a sample's states do not depend on its tokens ({moved[place]:.1g})")
    others = {other: change for other, change in enumerate(moved) if other != place}
    for other, change in others.items():
        _demand(
            change <= rounding, f"sample {place + 1} changes sample {other + 1} of its row by {change:.1g}"
        )
    return max(others.values())


def _demand(kept: bool, what: str) -> None:
    if not kept:
        raise TrainingError(
            f"packed samples are not isolated: {what}",
            "model.attention",
            "Choose model.attention=sdpa, or data.chat.packing=none.",
        )


def _change(found: Float[Tensor, "t d"], expected: Float[Tensor, "t d"]) -> float:
    """The distance relative to the states' size; infinite when it is not a number."""
    moved = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))
    return moved if math.isfinite(moved) else math.inf


# ---------------------------------------------------------------- the rows


def _ids(model: VLM) -> list[Int[Tensor, " _"]]:
    """Different ids for every place, none of them an image's."""
    known = model.get_input_embeddings().num_embeddings
    usable = torch.tensor([one for one in range(min(known, 4096)) if one != model.config.image_token_id])
    draw = torch.Generator().manual_seed(0)
    picked = usable[torch.randint(len(usable), (sum(_LENGTHS),), generator=draw)]
    return [*picked.split(_LENGTHS)]


def _other(ids: list[Int[Tensor, " _"]], place: int, model: VLM) -> list[Int[Tensor, " _"]]:
    """The samples with every token of one replaced by another."""
    known = min(model.get_input_embeddings().num_embeddings, 4096)
    others = (ids[place] + known // 2) % known
    others[others == model.config.image_token_id] = ids[place][others == model.config.image_token_id]
    return [others if each == place else one for each, one in enumerate(ids)]


@contextmanager
def _short(
    model: VLM, device: torch.device
) -> Iterator[Callable[[list[Int[Tensor, " _"]]], list[Float[Tensor, "_ d"]]]]:
    """A function from the samples of a row to their states, through the model's first blocks."""
    language = model.model.language_model
    training = {module: module.training for module in model.modules()}
    layers, home = language.layers, language.get_input_embeddings().weight.device
    language.layers = layers[: _needed(language)]
    model.eval()
    _move(language, device)

    def run(ids: list[Int[Tensor, " _"]]) -> list[Float[Tensor, "_ d"]]:
        lengths = [len(one) for one in ids]
        states = model.model(
            input_ids=torch.cat(ids)[None].to(device),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
            attention_mask=None,
            use_cache=False,
            cu_seqlens=torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32),
            max_seqlen=max(lengths),
        ).last_hidden_state
        return [*states[0].split(lengths)]

    try:
        with torch.random.fork_rng():
            yield run
    finally:
        _move(language, home)
        language.layers = layers
        for module, mode in training.items():
            module.training = mode


def _needed(language: nn.Module) -> int:
    """Blocks up to the first of each kind, at least two."""
    kinds = getattr(language.config, "layer_types", None) or []  # foreign: not all decoders have it
    return max(_BLOCKS, *(kinds.index(kind) + 1 for kind in set(kinds)), 0)


def _move(language: nn.Module, device: torch.device) -> None:
    if language.get_input_embeddings().weight.device != device:
        language.to(device)


__all__ = ["prove_isolation"]
