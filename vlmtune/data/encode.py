"""Rows -> Encoded: read, transformed, augmented, rendered, with pixels. One that fails is a bad slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaProcessor

from vlmtune.config.schema import ChatStreamConfig
from vlmtune.data.collate import bad_slot
from vlmtune.data.images import augment, image_size, open_image
from vlmtune.data.index import fault_reason
from vlmtune.data.render import Rendered, Renderer
from vlmtune.data.sources import Source
from vlmtune.data.transforms import apply_transforms
from vlmtune.errors import DataError
from vlmtune.types import ChatSample, Encoded, Size


class Request(NamedTuple):
    """A row to encode. `rng` None takes it as it is stored; `bad` is why indexing found it unusable."""

    source: Source
    row: int
    rng: np.random.Generator | None
    bad: str = ""

    @property
    def key(self) -> str:
        return f"{self.source.name}#{self.row}"


class _Loaded(NamedTuple):
    rendered: Rendered
    images: list[Image]


@final
@dataclass(frozen=True)
class Encoder:
    """Encodes rows the way the stream's config says; picklable, no state."""

    config: ChatStreamConfig
    renderer: Renderer
    processor: LlavaProcessor

    @property
    def pad(self) -> int:
        """The id that fills where no token is."""
        return self.processor.tokenizer.pad_token_id or 0

    def encode(self, requests: Sequence[Request]) -> list[Encoded]:
        """One Encoded per request, in order. The images of all go through the image processor in one call."""
        loaded = [self._load(request) for request in requests]
        images = [image for each in loaded if isinstance(each, _Loaded) for image in each.images]
        pixels = self._pixels(images)
        return [
            bad_slot(request.key, each, self.pad)
            if isinstance(each, str)
            else _encoded(request, each.rendered, [next(pixels) for _ in each.images])
            for request, each in zip(requests, loaded, strict=True)
        ]

    def length(self, request: Request) -> int:
        """Tokens `encode` will give the request, from image headers; 0 if it cannot be used."""
        try:
            sample = self._drawn(request)
            sizes = [image_size(ref) for ref in sample.images]
            return len(self._fitted(sample, sizes)[1].input_ids)
        except DataError:
            return 0

    def _load(self, request: Request) -> _Loaded | str:
        """The rendered sample and its images, or why it cannot be used."""
        if request.bad:
            return request.bad
        try:
            sample = self._drawn(request)
            images = [open_image(ref) for ref in sample.images]
            sample, rendered = self._fitted(sample, [Size(*image.size) for image in images])
        except DataError as error:
            return fault_reason(error, request.key)
        images = images[: len(sample.images)]
        if request.rng is not None:
            images = [augment(image, self.config.augment, request.rng) for image in images]
        return _Loaded(rendered, images)

    def _drawn(self, request: Request) -> ChatSample:
        sample = request.source[request.row]
        if request.rng is None:
            return sample
        return apply_transforms(sample, self.config.transforms, request.rng)

    def _fitted(self, sample: ChatSample, sizes: Sequence[Size]) -> tuple[ChatSample, Rendered]:
        """The sample, shortened if the config says so, with at most max_length tokens."""
        rendered = self.renderer.render(sample, sizes)
        most = self.config.max_length
        if len(rendered.input_ids) <= most:
            return sample, rendered
        short = self.renderer.shorten(sample, sizes, most) if self.config.overlong == "shorten" else None
        if short is None:
            raise DataError(f"{len(rendered.input_ids)} tokens, more than max_length {most}", sample.key)
        return short, self.renderer.render(short, sizes[: len(short.images)])

    def _pixels(self, images: list[Image]) -> Iterator[Float[Tensor, "3 h w"]]:
        if not images:
            return iter(())
        return iter(self.processor.image_processor(images, return_tensors="pt")["pixel_values"])


def _encoded(request: Request, rendered: Rendered, pixels: list[Tensor]) -> Encoded:
    ids, labels = torch.tensor(rendered.input_ids), torch.tensor(rendered.labels)
    seed = 0 if request.rng is None else int(request.rng.integers(2**32))  # after all other draws
    return Encoded(request.key, ids, labels, torch.stack(pixels) if pixels else None, seed=seed)


__all__ = ["Encoder", "Request"]
