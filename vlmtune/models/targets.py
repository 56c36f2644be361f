"""What hidden states have to reconstruct: VAE latents, pixels, or another tower's features, one token each.

Every target is made from the tensor that the vision tower saw, crop and padding included, not from the file. Targets
are plain objects and no modules: nothing of theirs is trained, saved, or switched to training mode.

Letters: i images, n tokens of an image, c channels of a token, g side of the token grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vlmtune.config.plugins import FeaturesTargetConfig, PixelsTargetConfig, VaeTargetConfig
from vlmtune.config.schema import VisionConfig
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.processor import pixel_statistics
from vlmtune.models.towers import load_tower
from vlmtune.models.vision import tower_family


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and deviation by channel that an image processor uses on pixels between 0 and 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, rgb: Float[Tensor, "i 3 y x"]) -> Float[Tensor, "i 3 y x"]:
        """Pixels of -1 to 1 as the tower takes them."""
        return ((rgb + 1) / 2 - self._shaped(self.mean, rgb)) / self._shaped(self.std, rgb)

    def undo(self, pixels: Float[Tensor, "i 3 y x"]) -> Float[Tensor, "i 3 y x"]:
        """Pixels of -1 to 1, float32, from what the tower takes."""
        pixels = pixels.float()
        return (2 * (pixels * self._shaped(self.std, pixels) + self._shaped(self.mean, pixels)) - 1).clamp(
            -1, 1
        )

    @staticmethod
    def _shaped(values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device)[:, None, None]


def resized(rgb: Float[Tensor, "i 3 y x"], side: int) -> Float[Tensor, "i 3 s s"]:
    """The images as squares of `side` pixels: bilinear, no antialiasing (as the released code)."""
    return F.interpolate(rgb, (side, side), mode="bilinear", align_corners=False)


def packed(maps: Float[Tensor, "i k y x"], factor: int) -> Float[Tensor, "i n c"]:
    """A token for each factor x factor window: channel slowest, then row, then column within the window."""
    return F.pixel_unshuffle(maps, factor).flatten(2).transpose(1, 2)


def unpacked(tokens: Float[Tensor, "i n c"], grid: int, factor: int) -> Float[Tensor, "i k y x"]:
    """The inverse of `packed`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (grid, grid)), factor)


class Target(ABC):
    """Encodes the tower's input as tokens; where it can, decodes tokens as images."""

    channels: int
    """Numbers per token."""
    latent: tuple[int, ...] = ()
    """Shape of the standard normal noise that an image's encoding takes; empty when it takes none."""

    def __init__(self, normalisation: Normalisation, grid: int) -> None:
        self.normalisation, self.grid = normalisation, grid

    @abstractmethod
    def encode(
        self, pixels: Float[Tensor, "i 3 y x"], noise: Float[Tensor, "i ..."]
    ) -> Float[Tensor, "i n c"]:
        """The tokens of images as the tower takes them, float32, without gradient."""

    @abstractmethod
    def decode(self, tokens: Float[Tensor, "i n c"]) -> Float[Tensor, "i 3 s s"] | None:
        """Images of -1 to 1, or None where a token cannot be shown."""


@final
class PixelsTarget(Target):
    """The picture itself: a token is its square of pixels."""

    def __init__(self, normalisation: Normalisation, grid: int, side: int) -> None:
        super().__init__(normalisation, grid)
        self.patch = side // grid
        self.channels = 3 * self.patch**2

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "i 3 y x"], noise: Float[Tensor, "i ..."]
    ) -> Float[Tensor, "i n c"]:
        return packed(resized(self.normalisation.undo(pixels), self.grid * self.patch), self.patch)

    def decode(self, tokens: Float[Tensor, "i n c"]) -> Float[Tensor, "i 3 s s"] | None:
        return unpacked(tokens, self.grid, self.patch)


@final
class VaeTarget(Target):
    """Latents of a frozen diffusers AutoencoderKL, sampled from its posterior; a token is a 2 x 2 window."""

    def __init__(self, normalisation: Normalisation, grid: int, vae: Any) -> None:
        super().__init__(normalisation, grid)
        self.vae = vae.requires_grad_(False).eval()
        config = vae.config
        stride = 2 ** (len(config.block_out_channels) - 1)
        self.side = 2 * stride * grid
        self.channels = 4 * config.latent_channels
        self.latent = (config.latent_channels, 2 * grid, 2 * grid)
        # SD and LDM layouts have no shift; a VAE that was never scaled has neither.
        self.shift = config.get("shift_factor") or 0.0
        self.scale = config.get("scaling_factor") or 1.0

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "i 3 y x"], noise: Float[Tensor, "i ..."]
    ) -> Float[Tensor, "i n c"]:
        with torch.autocast(pixels.device.type, enabled=False):
            images = resized(self.normalisation.undo(pixels), self.side)
            posterior = self.vae.to(pixels.device).encode(images).latent_dist
            latents = posterior.mean + posterior.std * noise
            return packed((latents - self.shift) * self.scale, 2)

    @torch.no_grad()
    def decode(self, tokens: Float[Tensor, "i n c"]) -> Float[Tensor, "i 3 s s"] | None:
        latents = unpacked(tokens, self.grid, 2) / self.scale + self.shift
        return self.vae.to(tokens.device).decode(latents).sample.clamp(-1, 1)


@final
class FeaturesTarget(Target):
    """Patch features of a frozen teacher tower, each of mean 0 and deviation 1, resized to the token grid."""

    def __init__(
        self, normalisation: Normalisation, grid: int, teacher: Any, taught: Normalisation, layer: int
    ) -> None:
        super().__init__(normalisation, grid)
        self.teacher = teacher.requires_grad_(False).eval()
        self.taught, self.layer = taught, layer
        self.channels = teacher.config.hidden_size

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "i 3 y x"], noise: Float[Tensor, "i ..."]
    ) -> Float[Tensor, "i n c"]:
        config = self.teacher.config
        side = config.image_size // config.patch_size
        with torch.autocast(pixels.device.type, enabled=False):
            seen = self.taught.apply(resized(self.normalisation.undo(pixels), config.image_size))
            states = self.teacher.to(pixels.device)(
                pixel_values=seen, output_hidden_states=True
            ).hidden_states
            patches = states[self.layer][:, tower_family(config).prefix_tokens :]
            # Unit variance: the noise schedule assumes it.
            maps = F.layer_norm(patches, patches.shape[-1:]).transpose(1, 2).unflatten(2, (side, side))
            resampled = F.interpolate(maps, (self.grid, self.grid), mode="bilinear", align_corners=False)
            return resampled.flatten(2).transpose(1, 2)

    def decode(self, tokens: Float[Tensor, "i n c"]) -> Float[Tensor, "i 3 s s"] | None:
        return None


def build_target(
    config: PixelsTargetConfig | VaeTargetConfig | FeaturesTargetConfig,
    normalisation: Normalisation,
    grid: int,
    image_size: int,
) -> Target:
    """The recipe's target for a token grid of side `grid` and a tower that sees `image_size` pixels."""
    if isinstance(config, PixelsTargetConfig):
        return PixelsTarget(normalisation, grid, config.side or image_size)
    if isinstance(config, VaeTargetConfig):
        return VaeTarget(normalisation, grid, load_vae(config.path))
    vision = VisionConfig(path=config.path)
    teacher = load_tower(vision, torch.float32)
    statistics = pixel_statistics(vision)
    taught = Normalisation(tuple(statistics["image_mean"]), tuple(statistics["image_std"]))
    layer = tower_family(teacher.config).feature_layer if config.layer is None else config.layer
    return FeaturesTarget(normalisation, grid, teacher, taught, layer)


def load_vae(path: str) -> Any:
    """The float32 AutoencoderKL of a diffusers folder; raises RecipeError or CheckpointError."""
    try:
        from diffusers.models import AutoencoderKL
    except ImportError:
        raise RecipeError(
            "the target vae needs diffusers", "objective.target", 'Install it: pip install "vlmtune[ross]".'
        ) from None
    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(
            f"there is no diffusers AutoencoderKL in {path}",
            "objective.target.path",
            "Name the folder with its config.json; `vlmtune vae recipes/ross/tiny_vae.yaml` trains a small one.",
        )
    try:
        return AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot load {path}: {error}", "objective.target.path", "It must be a complete AutoencoderKL."
        ) from error
