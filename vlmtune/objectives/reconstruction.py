"""Ross: next_token, and a second term that paints each image from what the language model knows at its tokens.

arXiv 2410.09575. The hidden states after the final norm at an image's own slots (not shifted by one) condition a small
denoiser of a frozen target of that image; no gradient reaches lm_head, tower or target. In eval mode only next_token
is computed. Letters: b rows, t tokens, i images, n tokens of an image, h width, c target channels, k draws an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaProcessor

from vlmtune.config.plugins import ReconstructionConfig
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.denoiser import TIMESTEPS, Denoiser, Regressor, noise_schedule
from vlmtune.models.targets import Normalisation, Target, build_target
from vlmtune.models.vision import token_counter
from vlmtune.objectives.base import Objective
from vlmtune.objectives.functional import rows_mean
from vlmtune.objectives.spine import hidden_states, supervised_tokens, token_loss
from vlmtune.types import ChatBatch, LossOutput


@dataclass(frozen=True, slots=True)
class Rows:
    """What the second term looks at: images, and perhaps placeholders behind them."""

    hidden: Float[Tensor, "i n h"]
    pixels: Float[Tensor, "i 3 y x"]
    names: tuple[str, ...]
    """What the random draws of each are keyed with."""
    counted: Bool[Tensor, " i"]
    """False for a row that only keeps the graph alive."""


@final
class Reconstruction(Objective):
    """The mean cross entropy of the supervised tokens, plus `weight` times the images' mean reconstruction loss."""

    Config = ReconstructionConfig
    streams: ClassVar[tuple[str, ...]] = ("chat",)

    def __init__(self, config: ReconstructionConfig, model: nn.Module, processor: LlavaProcessor) -> None:
        super().__init__()
        self.config, self.model = config, model
        self.per_image = token_counter(model.config).tokens
        self.denoiser: Denoiser | Regressor | None = None
        if config.weight == 0:
            return
        grid, width = grid_of(self.per_image), model.config.text_config.hidden_size
        images = processor.image_processor
        normalisation = Normalisation(tuple(images.image_mean), tuple(images.image_std))
        # No module: neither trained nor saved, and no train() switches it.
        self.target: Target = build_target(
            config.target, normalisation, grid, model.config.vision_config.image_size
        )
        if config.method == "denoise":
            self.schedule = noise_schedule()
            self.denoiser = Denoiser(config.denoiser, self.target.channels, width, grid)
        else:
            self.denoiser = Regressor(config.denoiser, self.target.channels, width)
        if config.weights is not None:
            start_from(self.denoiser, denoiser_file(Path(config.weights)))

    def counts(self, batch: ChatBatch) -> dict[str, int]:
        """Supervised tokens and images; as written, also the rows that the released code averages over."""
        counted = {"tokens": supervised_tokens(batch), "images": batch.images}
        if self.config.as_written:
            counted["rows"] = batch.images + len(self._names(batch)[1])
        return counted

    def forward(self, batch: ChatBatch, totals: Mapping[str, int | float]) -> LossOutput:
        hidden = hidden_states(self.model, batch)
        first = token_loss(self.model, hidden, batch.labels, self.config.chunk) / max(totals["tokens"], 1)
        if self.denoiser is None or not self.training:
            return LossOutput(first, {"next_token": first.detach()})
        rows = self.rows(hidden, batch)
        losses = self.losses(rows)
        second = self.weight() * rows_mean(losses, rows.counted, totals, self.config.as_written)
        return LossOutput(first + second, {"next_token": first.detach(), "reconstruction": second.detach()})

    def exported(self) -> nn.Module:
        return self.model

    def weight(self) -> float:
        """Of the second term at this point of the stage."""
        schedule = self.config.weight_schedule
        if schedule is None:
            return self.config.weight
        linear = schedule.type == "linear"
        left = 1 - self.progress if linear else 0.5 + 0.5 * math.cos(math.pi * self.progress)
        return self.config.weight * (schedule.end + (schedule.start - schedule.end) * left)

    # ------------------------------------------------------------ the second term

    def rows(self, hidden: Float[Tensor, "b t h"], batch: ChatBatch) -> Rows:
        """The batch's images with their hidden states.

        Without an image one blank row stands in at weight zero: all ranks then call the same modules. As written,
        every text-only sample stands in as an image of the mean colour without condition.
        """
        names, text_only = self._names(batch)
        names += text_only if self.config.as_written else ()
        counted = torch.ones(max(len(names), 1), dtype=torch.bool, device=hidden.device)
        if not names:
            names, counted = ("",), ~counted
        states = hidden[batch.input_ids == self.model.config.image_token_id].unflatten(
            0, (-1, self.per_image)
        )
        blanks = len(names) - len(states)
        side = self.model.config.vision_config.image_size
        pixels = hidden.new_zeros(blanks, 3, side, side)
        if batch.pixel_values is not None:
            pixels = torch.cat([batch.pixel_values.to(pixels.dtype), pixels])
        return Rows(F.pad(states, (0, 0, 0, 0, 0, blanks)), pixels, names, counted)

    def losses(self, rows: Rows) -> Float[Tensor, "k i"]:
        """The mean squared error of each draw of each row; one draw to regress, where nothing depends on it."""
        assert self.denoiser is not None
        device, latent = rows.pixels.device, self.target.latent
        posterior = torch.stack([torch.randn(latent, generator=_source(name, 0)) for name in rows.names])
        target = self.target.encode(rows.pixels, posterior.to(device))
        if isinstance(self.denoiser, Regressor):
            return (self.denoiser(rows.hidden) - target).square().mean((1, 2))[None]
        t, noise = self.draw(rows.names, device)
        tiled, hidden = (each.repeat(len(t), 1, 1) for each in (target, rows.hidden))
        flat = noise.flatten(0, 1)
        noisy = self.schedule.add_noise(tiled, flat, t.flatten())
        found = self.denoiser(noisy, t.flatten(), hidden)
        return (found - flat).square().mean((1, 2)).unflatten(0, t.shape)

    def draw(
        self, names: Sequence[str], device: torch.device
    ) -> tuple[Int[Tensor, "k i"], Float[Tensor, "k i n c"]]:
        """Time steps and noises: a function of the names alone, the same on every device and in every split."""
        count, shape = self.config.draws, (self.per_image, self.target.channels)
        sources = [_source(name, 1) for name in names]
        t = [torch.randint(TIMESTEPS, (count,), generator=source) for source in sources]
        noise = [torch.randn(count, *shape, generator=source) for source in sources]
        return torch.stack(t, dim=1).to(device), torch.stack(noise, dim=1).to(device)

    def _names(self, batch: ChatBatch) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """A name for the draws of each image, and of each sample without one: key, seed, place in the sample."""
        samples = [f"{key}/{seed}" for key, seed in zip(batch.keys, batch.seeds, strict=True)]
        counts = image_counts(batch, self.model.config.image_token_id, self.per_image)[: len(samples)]
        pairs = [*zip(samples, counts, strict=True)]
        images = tuple(f"{name}/{place}" for name, count in pairs for place in range(count))
        return images, tuple(f"{name}/0" for name, count in pairs if not count)


def image_counts(batch: ChatBatch, image_token: int, per_image: int) -> list[int]:
    """The number of images of each sample of a packed or padded batch."""
    slots = batch.input_ids == image_token
    if batch.cu_seqlens is None:
        tokens = slots.sum(1)
    else:
        tokens = F.pad(slots[0].cumsum(0), (1, 0))[batch.cu_seqlens.long()].diff()
    return (tokens // per_image).tolist()


def grid_of(per_image: int) -> int:
    """The side of the token grid; raises RecipeError when an image's tokens are no square."""
    side = math.isqrt(per_image)
    if side**2 != per_image:
        raise RecipeError(
            f"an image has {per_image} tokens, which are no square grid",
            "objective",
            "Reconstruction needs a projector that keeps the grid: linear, mlp2x or pixel_shuffle.",
        )
    return side


def denoiser_file(path: Path) -> Path:
    """objective.safetensors of a step folder, or of a run folder's last step; CheckpointError if there is none."""
    found = [
        path / "objective.safetensors",
        *sorted(path.glob("step_*[0-9]/objective.safetensors"), reverse=True),
    ]
    for file in found:
        if file.is_file():
            return file
    raise CheckpointError(
        "there is no objective.safetensors: no denoiser was trained here, or it was exported without",
        str(path),
        "Name a step folder of a run with objective reconstruction (an export holds the model alone).",
    )


def start_from(denoiser: nn.Module, file: Path) -> None:
    """Loads a denoiser's weights; raises CheckpointError when they are another network's."""
    saved = {name.removeprefix("denoiser."): value for name, value in load_file(file).items()}
    try:
        denoiser.load_state_dict(saved)
    except RuntimeError as error:
        raise CheckpointError(
            f"the denoiser is another one: {' '.join(str(error).split())[:300]}",
            str(file),
            "Keep objective.denoiser, objective.target and the image tokens as they were.",
        ) from error


def _source(name: str, purpose: int) -> torch.Generator:
    """A generator of its own for one purpose of one image."""
    digest = blake2b(f"{name}/{purpose}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))
