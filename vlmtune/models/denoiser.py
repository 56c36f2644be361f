"""Ross's heads: a small diffusion transformer that hidden states condition, and the regression that replaces it.

Two profiles of one network (arXiv 2410.09575): `adaln` is what the released code builds (DiT blocks, adaLN-Zero,
fixed 2-D sin-cos table), `additive` what the paper's figure draws (condition added before every block). Tokens are in
row-major order. Heads compute in the type of their own weights, float32, also under autocast.

Letters: b rows, n tokens of an image, c channels of a target token, h width of the language model, d width of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmtune.config.plugins import DenoiserConfig

TIMESTEPS = 1000
_SINUSOID = 256
"""Width of the time step's sinusoid before its MLP."""


@final
class Denoiser(nn.Module):
    """Predicts the noise in an image's target tokens; they attend to each other, hidden state i steers token i.

    A fresh one predicts exactly 0 (its last layer is zero), so that the loss starts at the noise's mean square and no
    gradient reaches the hidden states before the second step (`additive`) or the third (`adaln`).
    """

    def __init__(self, config: DenoiserConfig, channels: int, hidden: int, grid: int) -> None:
        super().__init__()
        width, additive = config.width, config.profile == "additive"
        self.norm = nn.LayerNorm(hidden, eps=1e-5, elementwise_affine=additive)
        self.embed = nn.Linear(channels, width)
        self.time = nn.Sequential(nn.Linear(_SINUSOID, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(hidden, width))
        kind = _AdditiveBlock if additive else _AdaLnBlock
        self.blocks = nn.ModuleList(kind(width, config.heads) for _ in range(config.depth))
        self.last = _Last(width, channels)
        # Not saved: it is a function of the sizes. The released unfreeze loop trains it by mistake in stage 1.
        self.register_buffer("table", None if additive else sincos_table(width, grid), persistent=False)
        self._reset()

    def forward(
        self, noisy: Float[Tensor, "b n c"], t: Int[Tensor, " b"], hidden: Float[Tensor, "b n h"]
    ) -> Float[Tensor, "b n c"]:
        weight = self.embed.weight
        with torch.autocast(weight.device.type, enabled=False):
            noisy, hidden = noisy.to(weight.dtype), hidden.to(weight.dtype)
            when = self.time(sinusoid(t).to(weight.dtype))
            condition = when[:, None] + self.condition(self.norm(hidden))
            tokens = self.embed(noisy)
            if self.table is not None:
                tokens = tokens + self.table
            for block in self.blocks:
                tokens = block(tokens, condition)
            return self.last(tokens, condition)

    def _reset(self) -> None:
        """DiT's initialisation: Xavier, small conditions, and zero where a block or the output begins as nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for part in (self.time[0], self.time[2], self.condition[1]):
            nn.init.normal_(part.weight, std=0.02)
        gates = [block.modulation for block in self.blocks if isinstance(block, _AdaLnBlock)]
        for part in (*gates, self.last.modulation, self.last.out):
            nn.init.zeros_(part.weight)


@final
class Regressor(nn.Module):
    """Predicts an image's target tokens straight from the hidden states, each from its own (the paper's ablation)."""

    def __init__(self, config: DenoiserConfig, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, eps=1e-5, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, config.width), nn.GELU(), nn.Linear(config.width, channels)
        )

    def forward(self, hidden: Float[Tensor, "b n h"]) -> Float[Tensor, "b n c"]:
        weight = self.mlp[0].weight
        with torch.autocast(weight.device.type, enabled=False):
            return self.mlp(self.norm(hidden.to(weight.dtype)))


# ---------------------------------------------------------------- blocks


def _plain_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
    )


def _modulated(
    tokens: Float[Tensor, "b n d"], shift: Float[Tensor, "b n d"], scale: Float[Tensor, "b n d"]
) -> Float[Tensor, "b n d"]:
    return tokens * (1 + scale) + shift


@final
class _Attention(nn.Module):
    """All tokens of an image see each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        parts = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.out(mixed.transpose(1, 2).flatten(2))


@final
class _AdaLnBlock(nn.Module):
    """A DiT block: the condition shifts, scales and gates attention and MLP, token by token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = _plain_norm(width)
        self.attention = _Attention(width, heads)
        self.mlp = _mlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, tokens: Float[Tensor, "b n d"], condition: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        tokens = tokens + gate1 * self.attention(_modulated(self.norm(tokens), shift1, scale1))
        return tokens + gate2 * self.mlp(_modulated(self.norm(tokens), shift2, scale2))


@final
class _AdditiveBlock(nn.Module):
    """The condition is added, then plain pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = _plain_norm(width)
        self.attention = _Attention(width, heads)
        self.mlp = _mlp(width)

    def forward(
        self, tokens: Float[Tensor, "b n d"], condition: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n d"]:
        tokens = tokens + condition
        tokens = tokens + self.attention(self.norm(tokens))
        return tokens + self.mlp(self.norm(tokens))


@final
class _Last(nn.Module):
    """Norm, shifted and scaled by the condition, and the way back to the target's channels."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = _plain_norm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels)

    def forward(
        self, tokens: Float[Tensor, "b n d"], condition: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n c"]:
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        return self.out(_modulated(self.norm(tokens), shift, scale))


# ---------------------------------------------------------------- tables


def sinusoid(t: Int[Tensor, " b"]) -> Float[Tensor, "b 256"]:
    """The time steps' embedding: 128 cosines, then 128 sines, of frequencies 1 down to 1e-4."""
    half = _SINUSOID // 2
    frequencies = torch.exp(-math.log(1e4) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_table(width: int, grid: int) -> Float[Tensor, "n d"]:
    """The positions of a grid x grid image: sines and cosines of the column, then of the row."""
    frequencies = 1e4 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return torch.cat([line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)], dim=-1).float()


# ---------------------------------------------------------------- diffusion


def noise_schedule(kind: Literal["ddpm", "ddim"] = "ddpm") -> Any:
    """diffusers' scheduler as Ross sets it: cosine, 1000 steps, the noise is predicted, samples are not clipped."""
    from diffusers.schedulers import DDIMScheduler, DDPMScheduler

    ddpm = DDPMScheduler(
        TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        variance_type="fixed_large",
        clip_sample=False,
    )
    return ddpm if kind == "ddpm" else DDIMScheduler.from_config(ddpm.config)


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    hidden: Float[Tensor, "b n h"],
    channels: int,
    steps: int,
    generator: torch.Generator,
    advance: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "b n c"]:
    """Target tokens painted from noise under the hidden states.

    1000 steps are the paper's ancestral DDPM, fewer are DDIM's. Noise comes from `generator` (on the CPU);
    `advance(done, total)` is called after each step.
    """
    scheduler = noise_schedule("ddpm" if steps >= TIMESTEPS else "ddim")
    scheduler.set_timesteps(min(steps, TIMESTEPS))
    tokens = torch.randn(*hidden.shape[:2], channels, generator=generator).to(hidden.device)
    for done, t in enumerate(scheduler.timesteps, 1):
        noise = denoiser(tokens, t.to(hidden.device).expand(len(tokens)), hidden)
        tokens = scheduler.step(noise, t, tokens, generator=generator).prev_sample
        if advance is not None:
            advance(done, len(scheduler.timesteps))
    return tokens
