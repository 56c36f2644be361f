"""Prototypes of an image: what its patches have in common by cluster, added to each patch (SQ-LLaVA).

The released code and the paper (arXiv 2403.11299) describe different modules; both are here. Shape letters:
n images, p patches, v vision width, c centres.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlmtune.config.plugins import ClusteringConfig


def build_prototypes(config: ClusteringConfig, width: int) -> nn.Module:
    """The module that turns features [n p v] into features of the same shape, by the config's formula."""
    if not config.prototypes:
        return nn.Identity()
    return PaperPrototypes(config, width) if config.formula == "paper" else ReleasedPrototypes(config, width)


@final
class ReleasedPrototypes(nn.Module):
    """As in the released code: centres pooled from the image, and each patch takes on its own cluster's mean.

    Nothing random or learned stands for a cluster. In matrix form: the released steps hold [n c p v] twice, 302
    MB an image at CLIP-L's size.
    """

    def __init__(self, config: ClusteringConfig, width: int) -> None:
        super().__init__()
        self.centers, self.iterations = config.centers, config.iterations
        self.over = -1 if config.normalize_over == "channels" else 1
        self.center_proj = nn.Linear(width, width)
        self.value_proj = nn.Linear(width, width)
        self.feature_proj = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))
        # Never used, here as there: with it the weights and their number are those of the released files.
        self.norm = nn.LayerNorm(width).requires_grad_(False)

    def forward(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n p v"]:
        projected = self.feature_proj(features)
        centers = self._centers(features, projected)
        similarity = torch.sigmoid(self.shift + self.scale * _cosine(centers, features))
        chosen = F.one_hot(similarity.argmax(dim=1), self.centers).transpose(1, 2).to(features.dtype)
        weights = chosen * similarity
        members = chosen.sum(dim=-1, keepdim=True)
        prototypes = (weights @ projected + self._pool(projected)) / (members + 1)
        return features + weights.transpose(1, 2) @ prototypes

    def _centers(
        self, features: Float[Tensor, "n p v"], projected: Float[Tensor, "n p v"]
    ) -> Float[Tensor, "n c v"]:
        """The centres after their rounds; a round's softmax is over the centres, and its sums are not averaged."""
        values = F.normalize(self.value_proj(features), dim=self.over).transpose(1, 2)
        centers = self._pool(features)
        for _ in range(self.iterations):
            centers = F.normalize(self.center_proj(centers), dim=-1)
            centers = (centers @ values).softmax(dim=1) @ projected
        return centers

    def _pool(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n c v"]:
        """Means of overlapping windows over the patches in reading order; 576 to 256: three patches each."""
        return F.adaptive_avg_pool1d(features.transpose(1, 2), self.centers).transpose(1, 2)


@final
class PaperPrototypes(nn.Module):
    """As in the paper: learned centres, and each patch takes on all of them by their similarity, averaged.

    E-step M = softmax(q(C) k(Z)^T), M-step C = M v(Z); then Z + z(1/K sum_j cos(C_j, Z) C_j). The softmax is over
    the centres, which the paper leaves open and the released code does.
    """

    def __init__(self, config: ClusteringConfig, width: int) -> None:
        super().__init__()
        self.iterations = config.iterations
        self.centers = nn.Parameter(torch.randn(config.centers, width) * width**-0.5)
        self.query_proj = nn.Linear(width, width)
        self.key_proj = nn.Linear(width, width)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def forward(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n p v"]:
        keys, values = self.key_proj(features).transpose(1, 2), self.value_proj(features)
        centers = self.centers.expand(len(features), -1, -1)
        for _ in range(self.iterations):
            centers = (self.query_proj(centers) @ keys).softmax(dim=1) @ values
        read = _cosine(centers, features).transpose(1, 2) @ centers
        return features + self.output_proj(read / self.centers.shape[0])


def _cosine(centers: Float[Tensor, "n c v"], features: Float[Tensor, "n p v"]) -> Float[Tensor, "n c p"]:
    return F.normalize(centers, dim=-1) @ F.normalize(features, dim=-1).transpose(1, 2)
