"""Whether models can be merged: the same architecture, the same tensors, the same tokens, in all merged parts."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmtune.errors import CheckpointError
from vlmtune.export.stored import StoredModel, differences
from vlmtune.export.weights import PARTS, is_stock, stock_config

_FREE_KEYS = {
    *("dtype", "torch_dtype", "transformers_version", "architectures", "use_cache", "_name_or_path"),
    *("image_token_index", "image_token_id", "vocab_size"),
}
"""Keys of a config that do not change what weights compute, or that are compared as tokens and rows."""
_EMBEDDING = "language_model.model.embed_tokens.weight"
_OTHER = "Only models tuned from the same base can be merged."


def demand_alike(first: StoredModel, other: StoredModel, parts: Set[str]) -> None:
    """Raises CheckpointError, with what differs, unless `parts` of the two have one architecture."""
    where = str(other.path)
    ours, theirs = (_part_tensors(model, parts) for model in (first, other))
    if _EMBEDDING in ours and _EMBEDDING in theirs:
        rows = [tensors[_EMBEDDING].shape[0] for tensors in (ours, theirs)]
        if rows[0] != rows[1]:
            raise CheckpointError(
                f"has {rows[1]} embeddings and {first.path} has {rows[0]}: their vocabularies differ",
                where,
                "A row would be merged with another token's. " + _OTHER,
            )
    wrong = differences(ours, theirs)
    if wrong:
        raise CheckpointError(f"is another architecture than {first.path}: {wrong}", where, _OTHER)
    settings = [dict(_part_settings(model, parts)) for model in (first, other)]
    changed = [
        f"{key} is {settings[1].get(key)!r} for {settings[0].get(key)!r}"
        for key in sorted(settings[0].keys() | settings[1].keys())
        if settings[0].get(key) != settings[1].get(key)
    ]
    if changed:
        raise CheckpointError(
            f"computes with other settings than {first.path}: {'; '.join(changed[:5])}", where, _OTHER
        )


def demand_same_tokens(
    first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, names: tuple[str, str]
) -> None:
    """Raises CheckpointError unless every token has the same id in both; `names` say whose they are."""
    ours, theirs = first.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    token = min(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, len(ours)), token),
    )
    raise CheckpointError(
        f"has another vocabulary than {names[0]}: the token {token!r} is {_number(theirs.get(token))} there "
        f"and {_number(ours.get(token))} here",
        names[1],
        "A row would be merged with another token's. " + _OTHER,
    )


def _number(token_id: int | None) -> str:
    return "missing" if token_id is None else f"number {token_id}"


def _part_tensors(model: StoredModel, parts: Set[str]) -> dict[str, Tensor]:
    return {
        name: stored.meta for name, stored in model.tensors.items() if PARTS[name.partition(".")[0]] in parts
    }


def _part_settings(model: StoredModel, parts: Set[str]) -> Iterator[tuple[str, Any]]:
    """The settings of the config that belong to `parts`, by dotted name."""
    config = stock_config(model.model) if is_stock(model.model) else model.model.config
    owners = {"vision_config": "vision", "text_config": "language"}
    for key, value in config.to_dict().items():
        if owners.get(key, "projector") not in parts:
            continue
        nested = value if key in owners else {"": value}
        yield from (
            (f"{key}.{name}".rstrip("."), setting)
            for name, setting in nested.items()
            if {key, name}.isdisjoint(_FREE_KEYS) and not name.endswith("_token_id")
        )
