"""The mathematics of merging, against peft's functions and against forms written out here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from vlmtune.export.combine import METHODS, Average, Copy, Dare, Slerp, Ties, ema_weights, generator

SHAPES = [(7,), (1,), (5, 3), (2, 3, 4)]


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    source = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=source).to(dtype) for _ in range(count)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_mean_of_a_model_with_itself_is_the_model(
    weights: list[float], seed: int, dtype: torch.dtype
) -> None:
    tensor = torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tensor[:2] = torch.tensor([-0.0, torch.finfo(dtype).max])
    merged = Average(tuple(weights)).combine("x", [tensor] * len(weights), None).to(dtype)
    same = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(merged.view(same), tensor.view(same))  # bits: == would take -0 for 0


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_with_weights(shape: tuple[int, ...]) -> None:
    a, b, c = tensors(3, shape)
    close(Average((1, 2, 5)).combine("x", [a, b, c], None), (a + 2 * b + 5 * c) / 8)
    close(Average().combine("x", [a, b, c], None), (a + b + c) / 3)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 8), decay=st.floats(0, 1))
def test_moving_average_is_a_mean_with_weights(count: int, decay: float) -> None:
    steps = [tensor.double() for tensor in tensors(count, (4,))]
    moving = steps[0]
    for step in steps[1:]:
        moving = decay * moving + (1 - decay) * step
    assert sum(ema_weights(count, decay)) == pytest.approx(1)
    close(Average(ema_weights(count, decay)).combine("x", steps, None), moving)


def test_slerp_ends_are_the_ends() -> None:
    a, b = tensors(2, (4, 5), torch.bfloat16)
    assert Slerp(0.0).combine("x", [a, b], None) is a
    assert Slerp(1.0).combine("x", [a, b], None) is b


def test_slerp_is_an_arc() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    for t in (0.1, 0.5, 0.9):
        close(
            Slerp(t).combine("x", [a, b], None),
            3 * torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)]),
        )
    a, b = tensors(2, (6,))
    angle = torch.arccos(a @ b / a.norm() / b.norm())
    naive = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
    close(Slerp(0.3).combine("x", [a, b], None), naive)


@pytest.mark.parametrize("b", [torch.tensor([2.0, 4.0]), torch.tensor([-1.0, -2.0]), torch.zeros(2)])
def test_slerp_without_an_arc_is_a_line(b: Tensor) -> None:
    a = torch.tensor([1.0, 2.0])
    close(Slerp(0.25).combine("x", [a, b], None), 0.75 * a + 0.25 * b)
    assert torch.equal(Slerp(0.3).combine("x", [a, a], None).float(), a)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.99])
def test_ties_is_pefts(shape: tuple[int, ...], density: float) -> None:
    base, *models = tensors(4, shape)
    weights = (1.0, 0.5, 2.0)
    changes = [model - base for model in models]
    theirs = base + 0.7 * merge_utils.ties(changes, torch.tensor(weights), density)
    close(Ties(density, 0.7, weights).combine("x", models, base), theirs)


def test_ties_by_hand() -> None:
    """Density 1: the sign with more mass wins, and the mean is over those that have it."""
    base = torch.zeros(4)
    models = [torch.tensor([4.0, 1.0, 0.0, -1.0]), torch.tensor([2.0, -3.0, 5.0, 1.0])]
    assert Ties(1.0).combine("x", models, base).tolist() == [3.0, -3.0, 5.0, 1.0]
    assert Ties(0.5).combine("x", models, base).tolist() == [4.0, -3.0, 5.0, 0.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_dare_is_pefts_with_its_random_numbers(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *models = tensors(3, shape)
    weights = (0.5, 2.0)
    numbers = iter([generator(3, "x", 0), generator(3, "x", 1)])
    monkeypatch.setattr(
        torch, "bernoulli", lambda p: (torch.rand(p.shape, generator=next(numbers)) < p).float()
    )
    changes = [model - base for model in models]
    theirs = base + 0.7 * merge_utils.dare_linear(changes, torch.tensor(weights), 0.4)
    close(Dare(0.4, 0.7, weights, seed=3).combine("x", models, base), theirs)


def test_dare_keeps_the_mean_and_depends_on_names_alone() -> None:
    base, model = torch.zeros(40_000), torch.ones(40_000)
    merged = Dare(0.25).combine("x", [model], base)
    assert set(merged.tolist()) == {0.0, 4.0}
    assert merged.mean() == pytest.approx(1, abs=0.05)
    torch.rand(9)  # the global generator takes no part
    assert torch.equal(Dare(0.25).combine("x", [model], base), merged)
    others = Dare(0.25).combine("y", [model], base), Dare(0.25, seed=1).combine("x", [model], base)
    assert not any(torch.equal(other, merged) for other in others)


def test_settings_that_cannot_be() -> None:
    assert "0 (the first" in Slerp(1.5).fault(2)
    assert "two models, not 3" in Slerp().fault(3)
    assert "density" in Ties(0.0).fault(2) and "density" in Dare(1.5).fault(2)
    assert "2 weights for 3" in Average((1, 2)).fault(3)
    assert "nothing" in Average((1, -1)).fault(2)
    assert not any(kind().fault(2) for kind in METHODS.values())
    assert Copy().combine("x", [base := torch.ones(1)], None) is base
