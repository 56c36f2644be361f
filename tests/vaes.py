"""A small AutoencoderKL with random weights, in FLUX's layout or in Stable Diffusion's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def tiny_vae(levels: int = 2, latent_channels: int = 4, **config: Any) -> Any:
    """Its stride is 2 ** (levels - 1); `config` are more options of diffusers' AutoencoderKL."""
    from diffusers.models import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            **config,
        )


def tiny_vae_folder(folder: Path) -> str:
    """A folder that diffusers loads: stride 2, 4 latent channels, FLUX's shift and scale."""
    if not (folder / "config.json").exists():
        tiny_vae(scaling_factor=0.3611, shift_factor=0.1159).save_pretrained(folder)
    return str(folder)
