"""Projectors: patch features of the vision tower in, image tokens of the language model out.

To add one: a class here (a row in PROJECTORS) and its options in config/schema.py. Shape letters: n images, p
patches, v vision width, q image tokens, d language width.
"""

from __future__ import annotations

import importlib
import math
import sys
from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vlmtune.config.plugins import (
    ClusteringConfig,
    LinearConfig,
    Mlp2xConfig,
    PixelShuffleConfig,
    ProjectorConfig,
    ResamplerConfig,
)
from vlmtune.config.section import Custom
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.clustering import build_prototypes


class Projector(nn.Module, ABC):
    """What sits between the tower and the language model; made by `build_projector`.

    Every subclass takes `(config, vision_width, language_width, patches, activation)`: its own options, the
    two widths, the patches the tower hands over per image, and the name of the model's activation.
    """

    unreached: ClassVar[tuple[str, ...]] = ()
    """Names of modules that its output does not depend on; they are never trained."""

    @abstractmethod
    def num_tokens(self, patches: int) -> int:
        """The number of image tokens made of so many patches."""

    @abstractmethod
    def forward(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n q d"]: ...


@final
class Linear(Projector):
    """One linear layer (LLaVA, arXiv 2304.08485, section 4.1)."""

    def __init__(
        self, config: LinearConfig, vision_width: int, language_width: int, patches: int, activation: str
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, language_width)

    def num_tokens(self, patches: int) -> int:
        return patches

    def forward(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n q d"]:
        return self.linear_1(features)


@final
class Mlp2x(Projector):
    """Linear, activation, linear (LLaVA-1.5, arXiv 2310.03744, section 3.3); names as in transformers."""

    def __init__(
        self, config: Mlp2xConfig, vision_width: int, language_width: int, patches: int, activation: str
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, language_width)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(language_width, language_width)

    def num_tokens(self, patches: int) -> int:
        return patches

    def forward(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n q d"]:
        return self.linear_2(self.act(self.linear_1(features)))


@final
class PixelShuffle(Projector):
    """Each factor x factor square of patches side by side, then an MLP (InternVL, arXiv 2404.16821)."""

    def __init__(
        self,
        config: PixelShuffleConfig,
        vision_width: int,
        language_width: int,
        patches: int,
        activation: str,
    ) -> None:
        super().__init__()
        self.factor = config.factor
        if math.isqrt(patches) ** 2 != patches or math.isqrt(patches) % self.factor:
            raise RecipeError(
                f"pixel_shuffle cannot cut {patches} patches into {self.factor} x {self.factor} squares",
                where="model.projector.factor",
                remedy="Choose a factor that divides the side of the tower's patch grid.",
            )
        self.linear_1 = nn.Linear(vision_width * self.factor**2, language_width)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(language_width, language_width)

    def num_tokens(self, patches: int) -> int:
        return patches // self.factor**2

    def forward(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n q d"]:
        return self.linear_2(self.act(self.linear_1(self.shuffle(features))))

    def shuffle(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n q fv"]:
        """`n (h f1 w f2) v -> n (h w) (f1 f2 v)`, in einops' words."""
        images, patches, width = features.shape
        side = math.isqrt(patches) // self.factor
        squares = features.reshape(images, side, self.factor, side, self.factor, width)
        return squares.transpose(2, 3).reshape(images, side * side, self.factor**2 * width)


@final
class CrossAttentionBlock(nn.Module):
    """Queries read the patches, then an MLP; both pre-norm with a residual."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = nn.LayerNorm(width)
        self.patch_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), ACT2FN[activation], nn.Linear(4 * width, width))

    def forward(
        self, queries: Float[Tensor, "n q d"], patches: Float[Tensor, "n p d"]
    ) -> Float[Tensor, "n q d"]:
        key, value = self.kv_proj(self.patch_norm(patches)).chunk(2, dim=-1)
        heads = [
            states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for states in (self.q_proj(self.query_norm(queries)), key, value)
        ]
        read = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        queries = queries + self.out_proj(read)
        return queries + self.mlp(self.mlp_norm(queries))


@final
class Resampler(Projector):
    """Learned queries read the patches by cross attention (Flamingo, arXiv 2204.14198, section 3.1)."""

    def __init__(
        self, config: ResamplerConfig, vision_width: int, language_width: int, patches: int, activation: str
    ) -> None:
        super().__init__()
        if language_width % config.heads:
            raise RecipeError(
                f"{config.heads} heads do not divide the language model's width of {language_width}",
                where="model.projector.heads",
                remedy="Choose a divisor of the width.",
            )
        self.queries = nn.Parameter(torch.empty(config.queries, language_width))
        self.input_proj = nn.Linear(vision_width, language_width)
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(language_width, config.heads, activation) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(language_width)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.queries, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def num_tokens(self, patches: int) -> int:
        return self.queries.shape[0]

    def forward(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n q d"]:
        patches = self.input_proj(features)
        queries = self.queries.expand(features.shape[0], -1, -1)
        for block in self.blocks:
            queries = block(queries, patches)
        return self.norm(queries)


@final
class Clustering(Projector):
    """Prototypes, then linear, QuickGELU, linear (SQ-LLaVA, arXiv 2403.11299; LLaVA-1.5 has the exact GELU)."""

    unreached: ClassVar[tuple[str, ...]] = ("prototypes.norm",)

    def __init__(
        self, config: ClusteringConfig, vision_width: int, language_width: int, patches: int, activation: str
    ) -> None:
        super().__init__()
        self.prototypes = build_prototypes(config, vision_width)
        self.linear_1 = nn.Linear(vision_width, language_width)
        self.act = ACT2FN["quick_gelu"]
        self.linear_2 = nn.Linear(language_width, language_width)

    def num_tokens(self, patches: int) -> int:
        return patches

    def forward(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n q d"]:
        return self.linear_2(self.act(self.linear_1(self.prototypes(features))))


PROJECTORS: dict[str, type[Projector]] = {
    "linear": Linear,
    "mlp2x": Mlp2x,
    "pixel_shuffle": PixelShuffle,
    "resampler": Resampler,
    "clustering": Clustering,
}


def build_projector(
    config: ProjectorConfig, vision_width: int, language_width: int, patches: int, activation: str = "gelu"
) -> Projector:
    """A projector with fresh weights; raises RecipeError when it does not fit the widths or the grid."""
    return projector_class(config)(config, vision_width, language_width, patches, activation)


def projector_class(config: ProjectorConfig) -> type[Projector]:
    """The class that the options name."""
    return _imported(config.type) if isinstance(config, Custom) else PROJECTORS[config.type]


def import_projector(config: ProjectorConfig) -> None:
    """Imports a projector that the recipe names by its path; raises RecipeError when that fails.

    Only recipes import. A checkpoint's config may name any module, and opening a folder must not run code.
    """
    if not isinstance(config, Custom):
        return
    module, _, _ = config.type.rpartition(".")
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise RecipeError(
            f"cannot import {module} ({error})",
            where="model.projector.type",
            remedy=f"Install it, or choose one of ours: {', '.join(PROJECTORS)}.",
        ) from error


def _imported(path: str) -> type[Projector]:
    module, _, name = path.rpartition(".")
    if module not in sys.modules:
        raise CheckpointError(
            f"the projector {path} is not imported",
            remedy=f"If you trust it: import {module} before you open the checkpoint.",
        )
    found = vars(sys.modules[module]).get(name)
    if not (isinstance(found, type) and issubclass(found, Projector)):
        raise RecipeError(
            f"{path} is not a vlmtune.models.projectors.Projector", where="model.projector.type"
        )
    return found
