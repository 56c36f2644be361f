"""What is to be reconstructed, made from the tensor that the tower saw."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import IMAGE_SIZE, TOWERS, tiny_processor
from tests.vaes import tiny_vae, tiny_vae_folder
from vlmtune.config.plugins import FeaturesTargetConfig, PixelsTargetConfig, VaeTargetConfig
from vlmtune.config.schema import VisionConfig
from vlmtune.errors import CheckpointError
from vlmtune.models.targets import (
    Normalisation,
    PixelsTarget,
    VaeTarget,
    build_target,
    load_vae,
    packed,
    resized,
    unpacked,
)
from vlmtune.models.towers import load_tower

CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def constant(value: float, side: int) -> torch.Tensor:
    """An image of one value as CLIP's processor gives it."""
    return (torch.full((1, 3, side, side), value) - torch.tensor(CLIP.mean)[:, None, None]) / torch.tensor(
        CLIP.std
    )[:, None, None]


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("value", [0.0, 0.25, 0.6, 1.0])
def test_a_constant_image_comes_back_as_twice_itself_less_one(value):
    found = resized(CLIP.undo(constant(value, 28)), 48)
    assert found.shape == (1, 3, 48, 48)
    torch.testing.assert_close(found, torch.full_like(found, 2 * value - 1), rtol=0, atol=1e-6)


def test_pixels_beyond_the_range_are_clamped():
    found = CLIP.undo(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
    assert (found[0] == -1).all() and (found[1] == 1).all()


def test_normalisation_and_its_undoing_are_inverse():
    rgb = torch.rand(2, 3, 5, 5) * 2 - 1
    torch.testing.assert_close(CLIP.undo(CLIP.apply(rgb)), rgb, rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 4])
def test_packing_is_the_released_one_and_invertible(factor):
    """The release: windows by reshape and permute, channel order (c, row, column)."""
    maps = torch.randn(2, 5, 3 * factor, 3 * factor)
    windows = maps.view(2, 5, 3, factor, 3, factor).permute(0, 1, 3, 5, 2, 4).reshape(2, 5 * factor**2, 3, 3)
    assert torch.equal(packed(maps, factor), windows.flatten(2).transpose(1, 2))
    assert torch.equal(F.pixel_unshuffle(maps, factor), windows)
    assert torch.equal(unpacked(packed(maps, factor), 3, factor), maps)


def test_a_pixel_token_is_its_patch():
    target = PixelsTarget(CLIP, 4, 32)
    rgb = torch.rand(1, 3, 32, 32) * 2 - 1
    tokens = target.encode(CLIP.apply(rgb), torch.zeros(1))
    assert tokens.shape == (1, 16, 192) and target.channels == 192
    patch = tokens[0, 6].view(3, 8, 8)  # row 1, column 2
    torch.testing.assert_close(patch, rgb[0, :, 8:16, 16:24], rtol=0, atol=1e-5)
    torch.testing.assert_close(target.decode(tokens), rgb, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- VAE


@pytest.mark.parametrize(("grid", "image"), [(24, 336), (27, 384)])
def test_the_geometry_of_the_released_pairs(grid, image):
    """FLUX's VAE: stride 8, 16 channels. CLIP-L/14@336 sees 24 x 24 patches, SigLIP-so400m/14@384 27 x 27."""
    target = VaeTarget(CLIP, grid, tiny_vae(4, 16, scaling_factor=0.3611, shift_factor=0.1159))
    assert target.side == 16 * grid and target.latent == (16, 2 * grid, 2 * grid)
    tokens = target.encode(torch.zeros(1, 3, image, image), torch.zeros(1, *target.latent))
    assert tokens.shape == (1, grid**2, 64) and target.channels == 64


def test_a_latent_is_a_posterior_sample_shifted_and_scaled():
    vae = tiny_vae(scaling_factor=0.3611, shift_factor=0.1159)
    target, pixels = VaeTarget(CLIP, 4, vae), torch.randn(2, 3, 32, 32)
    noise = torch.randn(2, *target.latent)
    tokens = target.encode(pixels, noise)
    with torch.no_grad():
        posterior = vae.encode(resized(CLIP.undo(pixels), 16)).latent_dist
    expected = 0.3611 * (posterior.mean + posterior.std * noise - 0.1159)
    torch.testing.assert_close(unpacked(tokens, 4, 2), expected)
    assert not tokens.requires_grad
    assert not torch.equal(tokens, target.encode(pixels, torch.randn(2, *target.latent)))  # not the mode


@pytest.mark.parametrize("config", [{"shift_factor": None}, {"scaling_factor": 0.18215}, {}])
def test_layouts_without_a_shift(config):
    """Stable Diffusion's VAE has none; the released code would crash."""
    vae = tiny_vae(**config)
    target = VaeTarget(CLIP, 4, vae)
    assert target.shift == 0 and target.scale == vae.config.scaling_factor
    decoded = target.decode(target.encode(torch.zeros(1, 3, 32, 32), torch.zeros(1, *target.latent)))
    assert decoded.shape == (1, 3, 16, 16) and decoded.abs().max() <= 1


def test_the_vae_is_frozen_in_eval_mode_and_float32_under_autocast():
    vae = tiny_vae().train()
    target = VaeTarget(CLIP, 4, vae)
    assert not vae.training and not any(weight.requires_grad for weight in vae.parameters())
    pixels, noise = torch.randn(1, 3, 32, 32), torch.randn(1, *target.latent)
    expected = target.encode(pixels, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(target.encode(pixels, noise), expected)


def test_a_saved_vae_is_found_and_a_missing_one_named(tmp_path):
    path = tiny_vae_folder(tmp_path / "vae")
    target = build_target(VaeTargetConfig(type="vae", path=path), CLIP, 4, 32)
    assert (target.shift, target.scale) == (0.1159, 0.3611)
    with pytest.raises(CheckpointError, match=r"no diffusers AutoencoderKL.*vlmtune vae"):
        load_vae(str(tmp_path / "nowhere"))


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("grid", [4, 3])
def test_a_teacher_gives_a_feature_of_unit_variance_for_each_token(tower, grid, tmp_path):
    torch.manual_seed(0)
    teacher = load_tower(VisionConfig(config=TOWERS[tower]), torch.float32)
    teacher.save_pretrained(tmp_path)
    tiny_processor().image_processor.save_pretrained(tmp_path)
    target = build_target(FeaturesTargetConfig(type="features", path=str(tmp_path)), CLIP, grid, IMAGE_SIZE)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    tokens = target.encode(pixels, torch.zeros(2))
    assert tokens.shape == (2, grid**2, 32) and target.channels == 32 and not tokens.requires_grad
    assert target.decode(tokens) is None
    if grid == 4:
        half = Normalisation((0.5,) * 3, (0.5,) * 3)
        with torch.no_grad():
            states = teacher.eval()(pixel_values=half.apply(CLIP.undo(pixels)), output_hidden_states=True)
        features = states.hidden_states[-2][:, -16:]
        torch.testing.assert_close(tokens, F.layer_norm(features, (32,)))


def test_pixels_need_nothing_but_the_grid():
    target = build_target(PixelsTargetConfig(type="pixels"), CLIP, 4, 32)
    assert isinstance(target, PixelsTarget) and target.patch == 8
    small = build_target(PixelsTargetConfig(type="pixels", side=18), CLIP, 4, 32)
    assert small.channels == 3 * 4**2
    assert small.encode(torch.zeros(1, 3, 32, 32), torch.zeros(1)).shape == (1, 16, 48)
