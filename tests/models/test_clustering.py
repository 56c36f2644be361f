"""The prototypes against naive forms and the released code's own numbers: checks 6 to 8 of the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from tests.tiny import tiny_model
from vlmtune.config.plugins import ClusteringConfig, Mlp2xConfig
from vlmtune.config.tuning import TuningConfig
from vlmtune.models.projectors import Clustering, build_projector
from vlmtune.models.tuning import apply_tuning


def made(width: int, language: int, centers: int, patches: int = 576, **options: Any) -> Any:
    torch.manual_seed(0)
    config = ClusteringConfig(type="clustering", centers=centers, **options)
    return build_projector(config, width, language, patches)


def waves(width: int, patches: int) -> Tensor:
    """x[l, d] = sin(0.37 (width l + d) + 0.1)."""
    places = torch.arange(width * patches, dtype=torch.float64).view(patches, width)
    return torch.sin(0.37 * places + 0.1)[None]


def golden(width: int, patches: int, centers: int, **options: Any) -> Tensor:
    """The output with identity matrices, zero biases, scale 1 and shift 0, in float64."""
    projector = made(width, width, centers, patches, **options).double()
    with torch.no_grad():
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                nn.init.eye_(module.weight)
                nn.init.zeros_(module.bias)
    return projector(waves(width, patches))[0]


def naive_released(module: Any, x: Tensor, over: int) -> tuple[Tensor, Tensor]:
    """The released steps one after the other, [n c p v] and all; and each patch's centre."""
    values, projected = module.value_proj(x), module.feature_proj(x)
    values = values / values.norm(dim=over, keepdim=True)
    count, patches = module.centers, x.shape[1]
    windows = [(i * patches // count, -(-(i + 1) * patches // count)) for i in range(count)]
    pool = lambda t: torch.stack([t[:, start:stop].mean(1) for start, stop in windows], 1)  # noqa: E731
    centers, pooled = pool(x), pool(projected)
    for _ in range(module.iterations):
        centers = module.center_proj(centers)
        rows = centers / centers.norm(dim=-1, keepdim=True)
        weights = torch.exp(rows @ values.transpose(1, 2))
        weights = weights / weights.sum(1, keepdim=True)
        centers = weights @ projected
    similarity = torch.sigmoid(
        module.shift + module.scale * F.cosine_similarity(centers[:, :, None], x[:, None], dim=-1)
    )
    chosen = similarity.argmax(1)
    mask = torch.zeros_like(similarity).scatter_(1, chosen[:, None], 1.0)
    gated = similarity * mask
    prototypes = ((projected[:, None] * gated[..., None]).sum(2) + pooled) / (mask.sum(2, keepdim=True) + 1)
    return x + (prototypes[:, :, None] * gated[..., None]).sum(1), chosen


# ---------------------------------------------------------------- check 6


@pytest.mark.parametrize(("language", "count"), [(4096, 24_130_562), (5120, 34_618_370)])
def test_check_6_as_many_weights_as_the_released_files(language: int, count: int):
    with torch.device("meta"):
        projector = made(1024, language, 256)
    assert sum(weight.numel() for weight in projector.parameters()) == count
    assert sum(weight.numel() for weight in projector.prototypes.norm.parameters()) == 2048


def test_check_6_shape_and_the_only_weights_without_gradient():
    projector = made(32, 48, 256).requires_grad_(True)
    out = projector(torch.randn(2, 576, 32))
    assert out.shape == (2, 576, 48) and projector.num_tokens(576) == 576
    out.square().sum().backward()
    assert {name for name, weight in projector.named_parameters() if weight.grad is None} == {
        "prototypes.norm.weight",
        "prototypes.norm.bias",
    }


def test_what_gets_no_gradient_is_not_trained():
    model, _ = tiny_model(projector="clustering")
    _, row, _ = apply_tuning(model, TuningConfig())
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert row.unreachable == 64 and row.trainable == row.total - 64
    assert not any("prototypes.norm" in name for name in trained)
    assert "model.multi_modal_projector.prototypes.scale" in trained


# ---------------------------------------------------------------- check 7


def test_check_7_windows_of_three():
    places = torch.arange(576.0)[None, :, None]
    pooled = made(1, 1, 256).prototypes._pool(places)[0, :, 0]
    starts = torch.tensor([int(2.25 * i) for i in range(256)])
    assert starts[:5].tolist() == [0, 2, 4, 6, 9] and starts[-1] == 573
    torch.testing.assert_close(pooled, starts + 1.0)  # the mean of start, start + 1, start + 2


# ---------------------------------------------------------------- check 8


def test_check_8_golden_values_of_the_released_code():
    out = golden(4, 6, 3)
    assert out.sum().item() == pytest.approx(12.831017, abs=1e-5)
    assert out[0].tolist() == pytest.approx([0.088796, 0.515942, 0.962497, 1.268824], abs=1e-5)
    assert out[5].tolist() == pytest.approx([1.293985, 1.398033, 1.278004, 0.951691], abs=1e-5)
    assert golden(4, 6, 3, normalize_over="tokens").equal(out)
    large = golden(8, 576, 256)
    assert large.sum().item() == pytest.approx(1554.901231, abs=1e-5)
    assert [large[0, 0].item(), large[-1, -1].item()] == pytest.approx([0.078668, 1.265628], abs=1e-5)


def test_check_8_normalising_each_patch_is_another_formula():
    assert golden(4, 6, 3, normalize_over="channels").sum().item() == pytest.approx(12.833664, abs=1e-5)


def test_check_8_assignments():
    projector = made(4, 4, 3, 6).double()
    with torch.no_grad():
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                nn.init.eye_(module.weight)
                nn.init.zeros_(module.bias)
    _, chosen = naive_released(projector.prototypes, waves(4, 6), 1)
    assert chosen[0].tolist() == [2, 0, 1, 1, 2, 0]


def test_check_8_without_prototypes_it_is_the_mlp():
    bare, full = made(6, 8, 3, 9, prototypes=False), made(6, 8, 3, 9)
    bare.load_state_dict(
        {name: weight for name, weight in full.state_dict().items() if "prototypes" not in name}
    )
    x = torch.randn(2, 9, 6)
    u = full.linear_1(x)
    assert bare(x).equal(full.linear_2(u * torch.sigmoid(1.702 * u)))
    assert not bare(x).allclose(full(x))


# ---------------------------------------------------------------- reference forms


@pytest.mark.parametrize(("normalize_over", "over"), [("tokens", 1), ("channels", 2)])
@pytest.mark.parametrize(("patches", "centers", "iterations"), [(7, 3, 1), (16, 5, 2), (9, 9, 3), (4, 6, 2)])
def test_the_matrix_form_is_the_released_one(
    normalize_over: str, over: int, patches: int, centers: int, iterations: int
):
    options = {"normalize_over": normalize_over, "iterations": iterations}
    module = made(5, 5, centers, patches, **options).prototypes.double()
    with torch.no_grad():  # away from the start, where all centres are alike
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight))
    x = torch.randn(3, patches, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(weight for name, weight in module.named_parameters() if "norm" not in name)]
    ours, (reference, _) = module(x), naive_released(module, x, over)
    torch.testing.assert_close(ours, reference)
    probe = torch.randn_like(ours)
    for own, theirs in zip(
        torch.autograd.grad((ours * probe).sum(), inputs),
        torch.autograd.grad((reference * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, theirs)


def test_the_papers_formula_centre_by_centre():
    module = made(5, 8, 3, 9, formula="paper").prototypes.double()
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    for image, out in zip(x, module(x), strict=True):
        centers = module.centers
        for _ in range(2):
            scores = module.query_proj(centers) @ module.key_proj(image).T
            membership = torch.stack([scores[:, p].softmax(0) for p in range(9)], 1)
            centers = membership @ module.value_proj(image)
        for patch, row in zip(image, out, strict=True):
            read = sum(F.cosine_similarity(center, patch, dim=0) * center for center in centers) / 3
            torch.testing.assert_close(row, patch + module.output_proj(read))


def test_every_weight_of_the_papers_formula_learns():
    projector = made(6, 8, 3, 9, formula="paper")
    projector(torch.randn(2, 9, 6)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in projector.parameters())


def test_the_paper_has_no_axis_to_choose():
    with pytest.raises(ValidationError, match="normalize_over is an option of the released formula"):
        ClusteringConfig(type="clustering", formula="paper", normalize_over="tokens")


def test_it_is_not_another_name_for_llavas_mlp():
    """LLaVA-1.5's GELU is the exact one: a stock llava export of this projector would compute something else."""
    mlp = build_projector(Mlp2xConfig(type="mlp2x"), 6, 8, 9)
    bare = made(6, 8, 3, 9, prototypes=False)
    mlp.load_state_dict(bare.state_dict())
    x = 3 * torch.randn(2, 9, 6)
    assert isinstance(bare, Clustering) and not mlp(x).equal(bare(x))
