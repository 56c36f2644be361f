"""Projectors against their naive forms, and the errors they give."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vlmtune.config.plugins import Mlp2xConfig, PixelShuffleConfig, ResamplerConfig
from vlmtune.config.section import Custom
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.projectors import PixelShuffle, Projector, build_projector, import_projector


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(2, 3), st.integers(1, 3), st.integers(1, 4))
def test_pixel_shuffle_equals_the_loop(images: int, factor: int, side: int, width: int) -> None:
    grid = side * factor
    features = torch.randn(images, grid * grid, width)
    config = PixelShuffleConfig(type="pixel_shuffle", factor=factor)
    projector = build_projector(config, width, 8, grid * grid)
    assert isinstance(projector, PixelShuffle)
    expected = torch.empty(images, side * side, factor * factor * width)
    for row in range(side):
        for column in range(side):
            square = [
                features[:, (row * factor + i) * grid + column * factor + j]
                for i in range(factor)
                for j in range(factor)
            ]
            expected[:, row * side + column] = torch.cat(square, dim=-1)
    assert torch.equal(projector.shuffle(features), expected)
    assert projector(features).shape == (images, projector.num_tokens(grid * grid), 8)


@pytest.mark.parametrize("patches", [15, 25])
def test_pixel_shuffle_needs_a_grid_that_divides(patches: int) -> None:
    with pytest.raises(RecipeError, match=f"cannot cut {patches} patches"):
        build_projector(PixelShuffleConfig(type="pixel_shuffle", factor=2), 4, 8, patches)


def test_resampler_reads_patches_as_a_set() -> None:
    """Positions come with the tower's features: another order of patches gives the same tokens."""
    torch.manual_seed(0)
    config = ResamplerConfig(type="resampler", queries=3, heads=2, layers=2)
    projector = build_projector(config, 6, 8, 16)
    features = torch.randn(2, 16, 6)
    tokens = projector(features)
    assert tokens.shape == (2, 3, 8)
    torch.testing.assert_close(projector(features[:, torch.randperm(16)]), tokens)
    assert not torch.allclose(projector(features + 1), tokens)


def test_resampler_starts_small() -> None:
    projector = build_projector(ResamplerConfig(type="resampler", queries=64, heads=4), 64, 64, 16)
    weights = [weight for weight in projector.parameters() if weight.dim() > 1]
    assert all(abs(weight.std().item() - 0.02) < 0.003 for weight in weights)


def test_resampler_heads_must_divide_the_width() -> None:
    with pytest.raises(RecipeError, match=r"3 heads.*width of 8"):
        build_projector(ResamplerConfig(type="resampler", queries=3, heads=3), 6, 8, 16)


def test_mlp2x_takes_the_models_activation() -> None:
    projector = build_projector(Mlp2xConfig(type="mlp2x"), 4, 4, 1, "linear")
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    features = torch.randn(1, 1, 4)
    torch.testing.assert_close(projector(features), features)


class Mean(Projector):
    """All patches in one token."""

    def __init__(self, config, vision_width, language_width, patches, activation):
        super().__init__()
        self.out = nn.Linear(vision_width, language_width)

    def num_tokens(self, patches):
        return 1

    def forward(self, features):
        return self.out(features.mean(dim=1, keepdim=True))


def test_a_dotted_name_is_imported_as_written() -> None:
    config = Custom(type=f"{__name__}.Mean")
    import_projector(config)
    assert build_projector(config, 4, 8, 16)(torch.randn(2, 16, 4)).shape == (2, 1, 8)


def test_only_a_recipe_imports_code(tmp_path, monkeypatch) -> None:
    """A checkpoint's config may name any module; building its projector must not import it."""
    (tmp_path / "planted.py").write_text("raise SystemExit('planted code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match="not imported"):
        build_projector(Custom(type="planted.Thing"), 4, 8, 16)
    with pytest.raises(RecipeError, match=r"cannot import nowhere_at_all"):
        import_projector(Custom(type="nowhere_at_all.Thing"))


def test_a_dotted_name_must_be_a_projector(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "some_module", ModuleType("some_module"))
    with pytest.raises(RecipeError, match="is not a"):
        build_projector(Custom(type="some_module.Thing"), 4, 8, 16)
