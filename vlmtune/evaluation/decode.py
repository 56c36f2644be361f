"""Decoding of many prompts at once, with a KV cache: greedy, or drawn.

Prompts about one picture share the work: what they have in common (the picture's tokens above all) runs through
the language model once, and its cache is copied to each row. Shape letters: b rows, t tokens, u cached tokens,
n image tokens, d language width, v vocabulary, e end tokens, g rows that go on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmtune.types import ImageRef


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to ask for sample `index`: ids with every picture expanded to its tokens, and the pictures in order."""

    index: int
    ids: list[int]
    images: tuple[ImageRef, ...]


Features = Mapping[ImageRef, Float[Tensor, "n d"]]
"""What stands for each picture's tokens."""


Choose = Callable[[Float[Tensor, "b v"], Sequence[Prompt]], Int[Tensor, " b"]]
"""The next token of each prompt, from the logits."""


def greedy(logits: Float[Tensor, "b v"], prompts: Sequence[Prompt]) -> Int[Tensor, " b"]:
    """The most likely tokens."""
    return logits.argmax(-1)


@final
class Sampler:
    """Draws tokens, for each prompt from a generator of its own: who shares the batch changes nothing.

    The warpers are transformers' own, in the order of its `generate`. `seeds` are by the prompts' index.
    """

    def __init__(
        self, temperature: float, top_k: int, top_p: float, seeds: Mapping[int, Sequence[int]]
    ) -> None:
        self._warpers = LogitsProcessorList(
            [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
        )
        self._rngs = {index: np.random.default_rng(seed) for index, seed in seeds.items()}

    def __call__(self, logits: Float[Tensor, "b v"], prompts: Sequence[Prompt]) -> Int[Tensor, " b"]:
        """The tokens at which the cumulated probability passes each prompt's next draw."""
        ids = torch.empty(0, dtype=torch.long)  # what has been written does not matter to these warpers
        sums = self._warpers(ids, logits.float()).softmax(-1).cumsum(-1, dtype=torch.float64)
        draws = torch.tensor([self._rngs[prompt.index].random() for prompt in prompts], dtype=torch.float64)
        return (sums <= draws.to(sums.device)[:, None] * sums[:, -1:]).sum(-1)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive ids of a prompt from position `start`, and the features of the image tokens among them."""

    ids: list[int]
    start: int
    vectors: Float[Tensor, "n d"] | None


@torch.no_grad()
def decode(
    model: LlavaForConditionalGeneration,
    prompts: Sequence[Prompt],
    features: Features,
    ends: Int[Tensor, " e"],
    max_new_tokens: int,
    choose: Choose = greedy,
) -> list[list[int]]:
    """The new ids of each prompt, up to an end token (left out) or the limit: fewer than that have ended."""
    cache = DynamicCache(config=model.config.get_text_config())
    # Padding between beginning and ending would take up a sliding window: each row is then its own group, and
    # its ending a single token.
    sharing = not any(cache.is_sliding)
    keys: list[Hashable] = [prompt.images if sharing else prompt.index for prompt in prompts]
    groups: dict[Hashable, list[Prompt]] = {}
    for key, prompt in zip(keys, prompts, strict=True):
        groups.setdefault(key, []).append(prompt)
    shared = {key: _shared_length([prompt.ids for prompt in group]) for key, group in groups.items()}

    image_id = model.config.image_token_id
    beginnings = [_piece(group[0], 0, shared[key], features, image_id) for key, group in groups.items()]
    mask = torch.zeros(len(groups), 0, dtype=torch.long, device=model.device)
    _, mask = _forward(model, cache, mask, beginnings)

    places = {key: row for row, key in enumerate(groups)}
    rows = torch.tensor([places[key] for key in keys], device=model.device)
    cache.batch_select_indices(rows)
    endings = [
        _piece(prompt, shared[key], len(prompt.ids), features, image_id)
        for key, prompt in zip(keys, prompts, strict=True)
    ]
    logits, mask = _forward(model, cache, mask[rows], endings)

    alive = list(range(len(prompts)))
    answers: list[list[int]] = [[] for _ in prompts]
    for step in range(max_new_tokens):
        tokens = choose(logits, [prompts[row] for row in alive])
        going = ~torch.isin(tokens, ends)
        alive = [row for row, goes in zip(alive, going.tolist(), strict=True) if goes]
        for row, token in zip(alive, tokens[going].tolist(), strict=True):
            answers[row].append(token)
        if not alive or step + 1 == max_new_tokens:
            break
        logits, mask = _next(model, cache, mask, tokens, going)
    return answers


def _shared_length(prompts: list[list[int]]) -> int:
    """Tokens at the beginning that all have in common, always leaving one to ask with."""
    first, last = min(prompts), max(prompts)  # in the order of lists: all others begin as these two do
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return min(sum(1 for _ in alike), min(map(len, prompts)) - 1)


def _piece(prompt: Prompt, start: int, stop: int, features: Features, image_id: int) -> _Piece:
    """The ids [start, stop) of a prompt, with the features of the image tokens among them."""
    ids = prompt.ids[start:stop]
    count = ids.count(image_id)
    if not count:
        return _Piece(ids, start, None)
    before = prompt.ids[:start].count(image_id)
    vectors = torch.cat([features[image] for image in prompt.images])
    return _Piece(ids, start, vectors[before : before + count])


def _forward(
    model: LlavaForConditionalGeneration, cache: DynamicCache, mask: Int[Tensor, "b u"], pieces: list[_Piece]
) -> tuple[Float[Tensor, "b v"], Int[Tensor, "b ut"]]:
    """The logits after each row's next piece, and the longer mask; pieces are padded on the left."""
    device = model.device
    ids = _left_padded([torch.tensor(piece.ids) for piece in pieces]).to(device)
    new = _left_padded([torch.ones(len(piece.ids), dtype=torch.long) for piece in pieces]).to(device)
    starts = torch.tensor([piece.start for piece in pieces], device=device)
    embeds = model.get_input_embeddings()(ids)
    vectors = [piece.vectors for piece in pieces if piece.vectors is not None]
    if vectors:
        places = (ids == model.config.image_token_id) & new.bool()
        embeds = embeds.masked_scatter(places[..., None], torch.cat(vectors).to(embeds.dtype))
    mask = torch.cat([mask, new], dim=1)
    output = model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=(starts[:, None] + new.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1], mask


def _left_padded(rows: list[Int[Tensor, " _"]]) -> Int[Tensor, "b t"]:
    return pad_sequence(rows, batch_first=True, padding_side="left")


def _next(
    model: LlavaForConditionalGeneration,
    cache: DynamicCache,
    mask: Int[Tensor, "b u"],
    tokens: Int[Tensor, " b"],
    going: Bool[Tensor, " b"],
) -> tuple[Float[Tensor, "g v"], Int[Tensor, "g u1"]]:
    """The logits after one more token of the rows that go on, and their longer mask; the others leave the cache."""
    if not going.all():
        cache.batch_select_indices(going.nonzero()[:, 0])
    tokens = tokens[going][:, None]
    mask = torch.cat([mask[going], torch.ones_like(tokens)], dim=1)
    output = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits[:, -1], mask
