"""Uneven chat micro-batches for tests of the law: text-only, one image, two images, 3 to 24 supervised tokens."""

from __future__ import annotations

from itertools import pairwise

import torch

from vlmtune.data.collate import collate
from vlmtune.types import IGNORE, Encoded


def encoded_samples(image_token: int, per_image: int, side: int, count: int = 8) -> list[Encoded]:
    """Samples i = 0 .. count-1 with i % 3 images and a different number of labels each, drawn from a seed."""
    generator = torch.Generator().manual_seed(11)
    samples = []
    for i in range(count):
        images, learned = i % 3, 3 + 3 * i
        text = torch.randint(10, 60, (6 + learned,), generator=generator)
        ids = torch.cat([torch.full((images * per_image,), image_token), text])
        labels = torch.full_like(ids, IGNORE)
        labels[-learned:] = ids[-learned:]
        pixels = torch.randn(images, 3, side, side, generator=generator) if images else None
        samples.append(Encoded(f"toy#{i}", ids, labels, pixels))
    return samples


def micro_batches(samples: list[Encoded], count: int, packing: str = "isolated"):
    """The samples in `count` micro-batches of uneven size."""
    cuts = [0, *(round(len(samples) * (i / count) ** 1.5) for i in range(1, count)), len(samples)]
    return [collate(samples[a:b], packing) for a, b in pairwise(cuts)]
