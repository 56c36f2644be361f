"""How long samples are and how many images they have: of the mix itself when it is here, else a stated distribution."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlmtune.config.loader import load_mix
from vlmtune.config.schema import ChatStreamConfig, ModelConfig, Recipe, TokenizerTraining
from vlmtune.data.loader import ChatData
from vlmtune.data.render import template_text
from vlmtune.data.sources import Source, open_source
from vlmtune.errors import DataError, RecipeError
from vlmtune.models.gguf import unpacked
from vlmtune.models.processor import build_processor, prepare_tokenizer, square_images
from vlmtune.models.tokenizer import train_tokenizer
from vlmtune.models.vision import token_counter
from vlmtune.models.vlm import VLMConfig

LLAVA_665K = 665_298
"""Samples of LLaVA-1.5's instruction mix."""
_IMAGE_SHARE = 624_610 / LLAVA_665K
_BESIDE, _BESIDE_SPREAD = 266, 0.66
"""Mean tokens of the text beside an image, and sigma of its lognormal distribution."""
_ALONE, _ALONE_SPREAD = 1100, 0.4
"""The same of a conversation without image."""
_SHORTEST = 42
"""Tokens of the template and a few words."""
_SUPERVISED = 0.45
"""Share of the text that is answers."""
_DRAWN = 16_384
"""Samples drawn of a distribution."""


@dataclass(frozen=True)
class Lengths:
    """Samples in the order of training; `total` of them make an epoch, of which these are the first."""

    tokens: Int64[np.ndarray, " n"]
    images: Int64[np.ndarray, " n"]
    total: int
    per_image: int
    """Tokens of an image."""
    origin: str
    """Where this is from, for people."""

    @property
    def supervised(self) -> Int64[np.ndarray, " n"]:
        """Learned tokens, by a stated share of the text: an index does not hold them."""
        text = self.tokens - self.images * self.per_image
        return np.maximum((text * _SUPERVISED).astype(np.int64), 0)


def sample_lengths(recipe: Recipe, config: VLMConfig, samples: int | None, cache: Path) -> Lengths:
    """The recipe's samples from the index of its mix (made if need be), or else those of `stated`."""
    stream = recipe.data.chat
    assert stream is not None  # the loader has seen to it
    per_image = token_counter(config).tokens
    try:
        data = _open(recipe, stream, config, cache)
    except (DataError, RecipeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return stated(stream, per_image, samples or LLAVA_665K, f"the mix cannot be read here ({reason})")
    pairs = data.order.epoch(0)
    lengths = [index.lengths for index in data.indices]
    images = [index.images for index in data.indices]
    found = np.array([(lengths[source][row], images[source][row]) for source, row in pairs], np.int64)
    tokens = np.clip(found[:, 0], 1, stream.max_length)
    return Lengths(tokens, found[:, 1], samples or len(pairs), per_image, f"index of {stream.mix}")


def stated(stream: ChatStreamConfig, per_image: int, total: int, why: str) -> Lengths:
    """Lengths as in LLaVA-1.5's 665K mix: 94 % with an image, 854 tokens on average where an image has 576.

    Evenly spaced quantiles of lognormal distributions, shuffled with the seed 0: the right mean and tail.
    """
    count = min(total, _DRAWN)
    with_image = round(count * _IMAGE_SHARE)
    beside = _quantiles(with_image, _BESIDE, _BESIDE_SPREAD) + per_image
    alone = _quantiles(count - with_image, _ALONE, _ALONE_SPREAD)
    tokens = np.minimum(np.concatenate([beside, alone]), stream.max_length)
    images = np.concatenate([np.ones(with_image, np.int64), np.zeros(count - with_image, np.int64)])
    order = np.random.default_rng(0).permutation(count)
    origin = f"lengths as in LLaVA-665K, mean {tokens.mean():,.0f} tokens: {why}"
    return Lengths(tokens[order], images[order], total, per_image, origin)


def _quantiles(count: int, mean: float, sigma: float) -> Int64[np.ndarray, " n"]:
    normal = statistics.NormalDist(np.log(mean) - sigma**2 / 2, sigma)
    drawn = [np.exp(normal.inv_cdf((place + 0.5) / count)) for place in range(count)]
    return np.maximum(np.array(drawn, np.int64), _SHORTEST)


# ---------------------------------------------------------------- the mix


def _open(recipe: Recipe, stream: ChatStreamConfig, config: VLMConfig, cache: Path) -> ChatData:
    """The data as the run opens it; only headers and text are read."""
    path = Path(stream.mix)
    mix = load_mix(path)
    sources = [open_source(source, path.parent, cache) for source in mix.sources]
    template = template_text(recipe.model.template)
    tokenizer = _tokenizer(recipe.model, template, sources)
    plain = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = square_images("pad", config.vision_config.image_size, plain)
    processor = build_processor(config, tokenizer, images, template)
    held_out, seed, count = recipe.evaluation.held_out, recipe.run.seed, token_counter(config)
    return ChatData(stream, mix, path.parent, processor, count, held_out, seed, cache)


def _tokenizer(model: ModelConfig, template: str, sources: list[Source]) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, if its files are here; a new one is trained as the run would."""
    language = model.language
    if language is not None and isinstance(language.tokenizer, TokenizerTraining):
        return train_tokenizer(_texts(sources), language.tokenizer.vocab_size, template)
    source = model.checkpoint or (language and (language.tokenizer or language.path))
    return prepare_tokenizer(
        AutoTokenizer.from_pretrained(unpacked(str(source)), local_files_only=True), template
    )


def _texts(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        for row in range(len(source)):
            try:
                yield from (turn.text for turn in source[row].turns)
            except DataError:  # a bad sample has its own slot
                continue


__all__ = ["LLAVA_665K", "Lengths", "sample_lengths", "stated"]
