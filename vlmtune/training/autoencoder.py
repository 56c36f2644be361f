"""A small AutoencoderKL trained on a mix's pictures: a latent target for Ross without a download."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL.Image import Resampling
from torch import Tensor

from vlmtune.config.autoencoder import VaeRecipe
from vlmtune.config.loader import load_mix
from vlmtune.config.schema import ScheduleConfig
from vlmtune.data.images import open_image
from vlmtune.data.sources import open_source
from vlmtune.errors import DataError
from vlmtune.training.logging import progress
from vlmtune.training.optim import lr_factor
from vlmtune.types import ImageRef

logger = logging.getLogger(__name__)

_SCHEDULE = ScheduleConfig(steps=1, warmup=0.05)
_MEASURED = 256
"""Pictures that the latents' mean and deviation, and the error, are taken from."""


@dataclass(frozen=True)
class VaeReport:
    """What a trained VAE can do, as written to vae.json beside it."""

    pictures: int
    psnr: float
    """Peak signal to noise ratio in decibels, over pictures as they were trained on."""
    scaling_factor: float
    shift_factor: float


def train_vae(recipe: VaeRecipe, cache: Path) -> VaeReport:
    """The report of the VAE now in `recipe.output`, a folder that diffusers opens. DataError without pictures."""
    pictures = _pictures(Path(recipe.mix), cache)
    generator = torch.Generator().manual_seed(recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = _fresh(recipe).to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.lr, fused=True)
    batches = _batches(pictures, recipe, generator)
    with progress(f"train {recipe.name}") as advance:
        for step in range(recipe.steps):
            optimizer.param_groups[0]["lr"] = recipe.lr * lr_factor(step, recipe.steps, _SCHEDULE)
            loss = _loss(vae, next(batches).to(device), recipe.kl_weight, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            advance(step + 1, recipe.steps)
            if (step + 1) % 100 == 0:
                logger.info("%s %d/%d  loss %.4f", recipe.name, step + 1, recipe.steps, loss.item())
    report = _measure(vae.eval(), _stack(pictures[:_MEASURED], recipe.side).to(device), len(pictures))
    vae.register_to_config(scaling_factor=report.scaling_factor, shift_factor=report.shift_factor)
    vae.save_pretrained(recipe.output)
    (recipe.output / "vae.json").write_text(
        json.dumps(recipe.model_dump(mode="json") | asdict(report), indent=1)
    )
    return report


def _fresh(recipe: VaeRecipe) -> Any:
    from diffusers.models import AutoencoderKL

    levels = len(recipe.widths)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        vae = AutoencoderKL(
            block_out_channels=recipe.widths,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=recipe.latent_channels,
            norm_num_groups=recipe.groups,
            sample_size=recipe.side,
        )
    # A fresh posterior's deviation of 1 would drown the picture for hundreds of steps: begin at exp(-3) = 0.05.
    vae.quant_conv.bias.data[recipe.latent_channels :] = -6.0
    return vae


def _loss(
    vae: Any, images: Float[Tensor, "b 3 s s"], kl_weight: float, generator: torch.Generator
) -> Float[Tensor, ""]:
    """The mean squared error of a pixel (an absolute one loses the colours first), and the divergence beside it."""
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
    found = vae.decode(posterior.mean + posterior.std * noise).sample
    return F.mse_loss(found, images) + kl_weight * posterior.kl().mean() / images[0].numel()


@torch.no_grad()
def _measure(vae: Any, images: Float[Tensor, "b 3 s s"], pictures: int) -> VaeReport:
    latents = vae.encode(images).latent_dist.mean
    error = (vae.decode(latents).sample.clamp(-1, 1) - images).square().mean().item()
    psnr = 10 * math.log10(4 / max(error, 1e-12))  # values span 2
    return VaeReport(pictures, round(psnr, 2), 1 / latents.std().item(), latents.mean().item())


# ---------------------------------------------------------------- pictures


def _pictures(mix: Path, cache: Path) -> list[ImageRef]:
    """Every picture of the mix once."""
    sources = [open_source(source, mix.parent, cache) for source in load_mix(mix).sources]
    found: dict[ImageRef, None] = {}
    for source in sources:
        for row in range(len(source)):
            try:
                found |= dict.fromkeys(source[row].images)
            except DataError:  # a sample that training would leave out too
                continue
    if not found:
        raise DataError("the mix has no picture", str(mix), "Name one with images.")
    return [*found]


def _batches(
    pictures: Sequence[ImageRef], recipe: VaeRecipe, generator: torch.Generator
) -> Iterator[Float[Tensor, "b 3 s s"]]:
    """Endless batches, each epoch in a new order."""
    pile: list[int] = []
    while True:
        while len(pile) < recipe.batch_size:
            pile += torch.randperm(len(pictures), generator=generator).tolist()
        chosen, pile = pile[: recipe.batch_size], pile[recipe.batch_size :]
        yield _stack([pictures[place] for place in chosen], recipe.side)


def _stack(pictures: Sequence[ImageRef], side: int) -> Float[Tensor, "b 3 s s"]:
    """Pixels of -1 to 1."""
    opened = (open_image(ref).resize((side, side), Resampling.BILINEAR) for ref in pictures)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in opened]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
