"""Ross's denoiser: sizes, tables, schedule, golden values of the released classes, and where it begins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from vlmtune.config.plugins import DenoiserConfig
from vlmtune.models.denoiser import (
    Denoiser,
    Regressor,
    noise_schedule,
    sample,
    sincos_table,
    sinusoid,
)

PROFILES = ["adaln", "additive"]


def small(profile: str, channels: int = 4, hidden: int = 6, grid: int = 2) -> Denoiser:
    return Denoiser(DenoiserConfig(profile=profile, depth=2, width=32, heads=4), channels, hidden, grid)


def tokens(maps: torch.Tensor) -> torch.Tensor:
    """(b, c, g, g) as the specification writes it -> (b, n, c)."""
    return maps.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------- schedule


def test_the_schedule_is_the_released_cosine():
    def f(s):
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = np.array([min(1 - f((i + 1) / 1000) / f(i / 1000), 0.999) for i in range(1000)])
    kept = np.cumprod(1 - betas)
    expected = {0: 0.99995872, 250: 0.84588799, 500: 0.49228517, 750: 0.14317865, 900: 0.02361611}
    for t, value in (expected | {998: 2.42877e-6, 999: 2.42877e-9}).items():
        assert kept[t] == pytest.approx(value, rel=2e-6)
    assert betas[0] == pytest.approx(4.12842e-5, rel=1e-6) and betas[999] == pytest.approx(0.999)
    assert kept.mean() == pytest.approx(0.495578, rel=1e-6)
    schedule = noise_schedule()
    assert np.abs(schedule.alphas_cumprod.double().numpy() - kept).max() < 5e-7
    assert not schedule.config.clip_sample and schedule.config.prediction_type == "epsilon"
    assert schedule.config.variance_type == "fixed_large"


# ---------------------------------------------------------------- sizes and tables


@pytest.mark.parametrize(
    ("profile", "hidden", "grid", "weights"),
    [
        ("adaln", 3584, 24, 64_474_176 - 589_824),
        ("adaln", 4096, 24, 64_998_464 - 589_824),
        ("adaln", 5120, 24, 66_047_040 - 589_824),
        ("adaln", 3584, 27, 64_630_848 - 746_496),
        ("additive", 3584, 24, 44_998_720),
    ],
)
def test_as_many_weights_as_released(profile, hidden, grid, weights):
    """The release counts its sin-cos table (adaln: grid^2 x 1024) as weights; additive leaves an unused table out."""
    with torch.device("meta"):
        denoiser = Denoiser(DenoiserConfig(profile=profile), 64, hidden, grid)
    assert sum(weight.numel() for weight in denoiser.parameters()) == weights
    if profile == "adaln":
        assert denoiser.table.numel() == grid**2 * 1024
        assert not denoiser.table.requires_grad and "table" not in denoiser.state_dict()


def test_the_position_table():
    table = sincos_table(1024, 24)
    channels = [0, 1, 256, 512, 768]
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(
        table[1, channels], torch.tensor([0.841471, 0.821856, 0.540302, 0.0, 1.0]), **close
    )
    torch.testing.assert_close(
        table[24, channels], torch.tensor([0.0, 0.0, 1.0, 0.841471, 0.540302]), **close
    )


def test_the_sinusoid_of_time():
    found = sinusoid(torch.tensor([1]))[0, [0, 1, 128, 129]]
    torch.testing.assert_close(found, torch.tensor([0.54030, 0.59738, 0.84147, 0.80196]), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- golden values


@pytest.mark.parametrize(
    ("profile", "total", "squares", "first", "rows"),
    [
        ("adaln", 2.886519, 7.785723, [0.488927, 0.646666, 0.430110, 0.598718], [0.384950, 1.126704]),
        ("additive", 7.027032, 54.680736, [1.659616, 1.676266, 1.690220, 1.700056], [1.100004, 3.015851]),
    ],
)
def test_golden_values_of_the_released_classes(profile, total, squares, first, rows):
    denoiser = small(profile)
    denoiser.norm = nn.Identity()  # the golden values were taken behind ln_pre
    with torch.no_grad():
        for weight in denoiser.parameters():
            places = torch.arange(weight.numel(), dtype=torch.float64)
            weight.copy_((0.1 * torch.sin(0.7 * places + 0.3)).view_as(weight))
    x0 = torch.cos(0.3 * torch.arange(32.0)).view(2, 4, 2, 2)
    condition = torch.sin(0.2 * torch.arange(48.0)).view(2, 6, 2, 2)
    t, noise = torch.tensor([10, 900]), torch.sin(0.9 * torch.arange(32.0) + 0.1).view(2, 4, 2, 2)

    found = denoiser(tokens(x0), t, tokens(condition))
    assert found.sum().item() == pytest.approx(total, abs=1e-4)
    assert found.square().sum().item() == pytest.approx(squares, abs=1e-4)
    torch.testing.assert_close(found[0, :, 0], torch.tensor(first), rtol=0, atol=1e-4)

    noisy = noise_schedule().add_noise(tokens(x0), tokens(noise), t)
    loss = (denoiser(noisy, t, tokens(condition)) - tokens(noise)).square().mean((1, 2))
    torch.testing.assert_close(loss, torch.tensor(rows), rtol=0, atol=1e-4)


def test_the_first_loss_is_the_mean_square_of_the_noise():
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(1000, (8,), generator=generator)
    assert t.tolist() == [44, 239, 933, 760, 963, 379, 427, 503]
    noise = torch.randn(8, 64, 24, 24, generator=generator)
    assert noise.square().mean().item() == pytest.approx(1.0005130, abs=1e-6)
    denoiser = Denoiser(DenoiserConfig(depth=1, width=32, heads=4), 64, 16, 24)
    found = denoiser(tokens(noise), t, torch.randn(8, 576, 16, generator=generator))
    loss = (found - tokens(noise)).square().mean().item()
    assert loss == pytest.approx(noise.square().mean().item(), abs=1e-6)


# ---------------------------------------------------------------- behaviour


@pytest.mark.parametrize(("profile", "dead"), [("adaln", 2), ("additive", 1)])
def test_the_hidden_states_hear_nothing_for_the_first_updates(profile, dead):
    """Zero-initialised layers open one after the other; only then does the language model learn from the image."""
    torch.manual_seed(0)
    denoiser = small(profile)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    schedule = noise_schedule()
    for update in range(dead + 1):
        hidden = torch.randn(2, 4, 6, requires_grad=True)
        noise, t = torch.randn(2, 4, 4), torch.tensor([100, 700])
        noisy = schedule.add_noise(torch.randn(2, 4, 4), noise, t)
        optimizer.zero_grad()
        (denoiser(noisy, t, hidden) - noise).square().mean().backward()
        assert (hidden.grad.abs().max() > 0) == (update == dead), update
        if update == 0:
            alive = [name for name, weight in denoiser.named_parameters() if weight.grad.abs().max() > 0]
            assert alive == ["last.out.weight", "last.out.bias"]
            assert all(weight.grad is not None for weight in denoiser.parameters())
        optimizer.step()


@pytest.mark.parametrize("profile", PROFILES)
def test_under_autocast_everything_stays_float32(profile):
    torch.manual_seed(0)
    denoiser = small(profile)
    for weight in denoiser.parameters():
        weight.data.normal_(std=0.1)
    noisy, t, hidden = torch.randn(2, 4, 4), torch.tensor([3, 999]), torch.randn(2, 4, 6)
    expected = denoiser(noisy, t, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = denoiser(noisy, t, hidden)
        wide = Regressor(DenoiserConfig(width=32, heads=4), 4, 6)(hidden.bfloat16())
    assert found.dtype == wide.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("profile", PROFILES)
def test_tokens_of_one_image_see_each_other_and_no_other_image(profile):
    torch.manual_seed(0)
    denoiser = small(profile)
    for weight in denoiser.parameters():
        weight.data.normal_(std=0.3)
    noisy, t, hidden = torch.randn(2, 4, 4), torch.tensor([3, 400]), torch.randn(2, 4, 6)
    expected = denoiser(noisy, t, hidden)
    changed = hidden.clone()
    changed[0, 3] = torch.randn(6)  # the last token's condition
    found = denoiser(noisy, t, changed)
    assert (found[0, 0] - expected[0, 0]).abs().max() > 1e-4
    torch.testing.assert_close(found[1], expected[1])


def test_regression_is_token_by_token():
    torch.manual_seed(0)
    regressor = Regressor(DenoiserConfig(width=32, heads=4), 5, 6)
    hidden = torch.randn(2, 4, 6)
    expected = regressor(hidden)
    assert expected.shape == (2, 4, 5)
    changed = hidden.clone()
    changed[0, 3] = torch.randn(6)
    found = regressor(changed)
    assert not torch.equal(found[0, 3], expected[0, 3]) and torch.equal(found[0, :3], expected[0, :3])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="divide"):
        DenoiserConfig(width=32, heads=5)


# ---------------------------------------------------------------- sampling


class Oracle(nn.Module):
    """Knows the target, so its noise is exact at every step."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target, self.kept = target, noise_schedule().alphas_cumprod.double()

    def forward(self, noisy, t, hidden):
        kept = self.kept[t][:, None, None]
        return ((noisy.double() - kept.sqrt() * self.target) / (1 - kept).sqrt()).float()


@pytest.mark.parametrize("steps", [20, 1000])
def test_sampling_with_a_perfect_denoiser_gives_the_target(steps):
    target = torch.linspace(-1, 1, 2 * 4 * 3).view(2, 4, 3).double()
    seen = []
    found = sample(
        Oracle(target),
        torch.zeros(2, 4, 6),
        3,
        steps,
        torch.Generator().manual_seed(0),
        lambda *a: seen.append(a),
    )
    torch.testing.assert_close(found.double(), target, rtol=0, atol=0.05)
    assert seen[-1] == (steps, steps)


def test_sampling_is_a_function_of_its_generator():
    torch.manual_seed(0)
    denoiser = small("adaln")
    runs = [
        sample(denoiser, torch.zeros(1, 4, 6), 4, 3, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
