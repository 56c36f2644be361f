"""Which image processors are saved so that torchvision's presence changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import AutoImageProcessor, LlavaProcessor
from transformers.models.auto import image_processing_auto

from tests.tiny import tiny_processor
from vlmtune.errors import CheckpointError
from vlmtune.export.processors import write_processor

SQUARE = {"height": 32, "width": 32}
PINNED = {
    "CLIPImageProcessorPil": {"size": {"shortest_edge": 32}, "crop_size": SQUARE},
    "SiglipImageProcessorPil": {"size": SQUARE},
    "BitImageProcessorPil": {"size": {"shortest_edge": 36}, "crop_size": SQUARE},
    "ViTImageProcessorPil": {"size": SQUARE},
    "LlavaImageProcessorPil": {"size": SQUARE, "crop_size": SQUARE},
}
"""Every processor of the tower families, on PIL; each works without torchvision."""


def processor_with(name: str, **options: object) -> LlavaProcessor:
    processor = tiny_processor()
    processor.image_processor = vars(transformers).get(name, getattr(transformers, name))(**options)
    return processor


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 47, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(image_processor: object) -> np.ndarray:
    return np.asarray(image_processor(picture(), return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("torchvision", [False, True])
@pytest.mark.parametrize("name", PINNED)
def test_a_processor_saved_on_pil_came_back_on_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, torchvision: bool
) -> None:
    processor = processor_with(name, **PINNED[name])
    assert write_processor(processor, tmp_path)
    monkeypatch.setattr(image_processing_auto, "is_torchvision_available", lambda: torchvision)
    reopened = AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    assert reopened.backend == "pil"
    assert np.array_equal(pixels_of(reopened), pixels_of(processor.image_processor))


@pytest.mark.parametrize("name", PINNED)
def test_a_pinned_processor_is_pinned_again(tmp_path: Path, name: str) -> None:
    processor = processor_with(name, **PINNED[name])
    write_processor(processor, tmp_path / "first")
    processor.image_processor = AutoImageProcessor.from_pretrained(tmp_path / "first", local_files_only=True)
    assert write_processor(processor, tmp_path / "second")
    for file in ("processor_config.json", "preprocessor_config.json"):
        assert (tmp_path / "first" / file).read_text() == (tmp_path / "second" / file).read_text()


@pytest.mark.parametrize("name", PINNED)
def test_the_file_for_version_4_names_every_step(tmp_path: Path, name: str) -> None:
    """CLIPImageProcessor of transformers 4 crops unless told otherwise."""
    write_processor(processor_with(name, **PINNED[name]), tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert config["image_processor_type"] == "CLIPImageProcessor"
    assert config["do_center_crop"] == (
        name in ("CLIPImageProcessorPil", "BitImageProcessorPil", "LlavaImageProcessorPil")
    )
    assert config["do_convert_rgb"] == (name != "ViTImageProcessorPil")


def test_square_padding_cannot_be_pinned(tmp_path: Path) -> None:
    processor = processor_with(
        "LlavaImageProcessorPil", do_pad=True, size={"shortest_edge": 32}, crop_size=SQUARE
    )
    assert not write_processor(processor, tmp_path)
    reopened = AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True, backend="pil")
    assert np.array_equal(pixels_of(reopened), pixels_of(processor.image_processor))


def test_a_torchvision_processor_is_refused(tmp_path: Path) -> None:
    processor = tiny_processor()

    class OnTorchvision:
        backend = "torchvision"

    processor.image_processor = OnTorchvision()
    with pytest.raises(CheckpointError, match="torchvision"):
        write_processor(processor, tmp_path)


def test_the_tokenizer_reads_in_version_4(tmp_path: Path) -> None:
    write_processor(tiny_processor(), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert not isinstance(config.get("extra_special_tokens"), list)
