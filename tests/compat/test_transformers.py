"""An export is a stock `llava`: a process without vlmtune, on transformers 5 or 4.57, gets our logits.

The second transformers is a folder that `make compat` fills; VLMTUNE_TRANSFORMERS_4 names another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.compat.reader import QUESTION
from tests.tiny import IMAGE_SIZE, tiny_images, tiny_model
from vlmtune.export.hf import export_model
from vlmtune.export.probe import probe_batch
from vlmtune.models.attention import use_attention
from vlmtune.models.processor import square_images

ROOT = Path(__file__).parents[2]
TRANSFORMERS_4 = Path(os.environ.get("VLMTUNE_TRANSFORMERS_4", ROOT / ".cache" / "transformers-4.57.6"))
CASES = {
    "clip_llama": (("clip", "mlp2x", "llama"), False, "crop"),
    "siglip_qwen2": (("siglip", "mlp2x", "qwen2"), True, "stretch"),
    "dinov2_llama": (("dinov2", "linear", "llama"), True, "pad"),
}
NEEDS_4 = pytest.mark.skipif(
    not TRANSFORMERS_4.is_dir(), reason=f"no transformers 4 in {TRANSFORMERS_4}: run `make compat`"
)
VERSIONS = ["5", pytest.param("4", marks=[pytest.mark.compat, NEEDS_4])]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Each case's folder, and what the training model itself makes of the picture and the question."""
    made = {}
    for name, (parts, tied, fit) in CASES.items():
        model, processor = tiny_model(*parts, tied=tied)
        use_attention(model, "auto")
        processor.image_processor = square_images(fit, IMAGE_SIZE, {})
        folder = tmp_path_factory.mktemp("exports") / name
        export_model(model, processor, folder, None, probe_batch(model, processor), {})
        (image,) = tiny_images(folder, 1)
        (folder / image).rename(folder / "picture.png")
        made[name] = folder, expected(model, processor, folder / "picture.png")
    return made


def expected(model: Any, processor: Any, picture: Path) -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(picture), text=prompt, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    return {
        "prompt": prompt,
        "ids": inputs["input_ids"].tolist(),
        "pixels": inputs["pixel_values"],
        "logits": logits,
        "answer": processor.decode(answer),
    }


@pytest.fixture(scope="module")
def reading(
    request: pytest.FixtureRequest, exports: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a separate process reads under the version asked for."""
    out = tmp_path_factory.mktemp("reading") / "out.json"
    paths = [str(TRANSFORMERS_4)] if request.param == "4" else []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    reader = Path(__file__).with_name("reader.py")
    folders = [str(folder) for folder, _ in exports.values()]
    done = subprocess.run(
        [sys.executable, str(reader), str(out), *folders],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        cwd=out.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("reading", VERSIONS, indirect=True)
def test_a_stranger_gets_the_training_model(reading: dict[str, Any], exports: dict[str, Any]) -> None:
    assert reading["foreign"] == []
    assert reading["readings"].keys() == exports.keys() == CASES.keys()
    for name, (_, ours) in exports.items():
        theirs = reading["readings"][name]
        assert theirs["faults"] == {}, name
        for key in ("prompt", "ids", "answer"):
            assert theirs[key] == ours[key], (name, key)
        assert torch.equal(torch.tensor(theirs["pixels"]), ours["pixels"]), name
        torch.testing.assert_close(torch.tensor(theirs["logits"]), ours["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("reading", ["5"], indirect=True)
def test_a_pinned_image_processor_ignores_torchvision(reading: dict[str, Any]) -> None:
    """With torchvision installed (not in CI's environment) this is what the pin is for."""
    assert reading["version"].startswith("5.")
    kinds = {name: each["image_processor"] for name, each in reading["readings"].items()}
    assert kinds["clip_llama"] == kinds["siglip_qwen2"] == "PilBackend"


@pytest.mark.compat
@NEEDS_4
@pytest.mark.parametrize("reading", ["4"], indirect=True)
def test_the_second_transformers_is_the_one_meant(reading: dict[str, Any]) -> None:
    assert reading["version"].startswith("4.57.")
