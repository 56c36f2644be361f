"""Images become squares of the tower's size, with stock image processors on PIL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, SiglipImageProcessorPil

from vlmtune.config.schema import VisionConfig
from vlmtune.errors import CheckpointError
from vlmtune.models.processor import pixel_statistics, square_images

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def pixels_of(fit: str, image: Image.Image) -> torch.Tensor:
    return square_images(fit, 32, HALF)(image, return_tensors="pt")["pixel_values"][0]


def stripes() -> Image.Image:
    """64 x 32: black left quarter, white middle, black right quarter."""
    columns = np.zeros((32, 64, 3), dtype=np.uint8)
    columns[:, 16:48] = 255
    return Image.fromarray(columns)


def test_pad_keeps_everything_on_the_mean_colour() -> None:
    pixels = pixels_of("pad", stripes())
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, :6].abs().max() < 0.01
    assert pixels[:, 16, 2].max() < -0.9
    assert pixels[:, 16, 16].min() > 0.9


def test_crop_loses_the_sides() -> None:
    assert pixels_of("crop", stripes()).min() > 0.9


def test_stretch_keeps_everything_and_the_shape_suffers() -> None:
    pixels = pixels_of("stretch", stripes())
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, 0, 2].max() < -0.9
    assert pixels[:, 0, 16].min() > 0.9


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(32, 32), (1, 90), (333, 17)])
def test_every_shape_of_image_fits_and_survives_saving(tmp_path, fit: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 30, 90))
    square_images(fit, 32, HALF).save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = again(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels, pixels_of(fit, image))
    assert pixels.shape == (3, 32, 32)


def test_a_pretrained_tower_brings_its_own_statistics(tmp_path) -> None:
    SiglipImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3, resample=2).save_pretrained(
        tmp_path
    )
    found = pixel_statistics(VisionConfig(path=str(tmp_path)))
    assert (found["image_mean"], found["image_std"], found["resample"]) == ([0.1, 0.2, 0.3], [0.4] * 3, 2)
    assert pixel_statistics(VisionConfig(config={})) == HALF


def test_a_pretrained_tower_without_statistics_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no image processor in"):
        pixel_statistics(VisionConfig(path=str(tmp_path)))
