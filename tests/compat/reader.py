"""Reads exported folders as a stranger would: run by itself, under any transformers, without vlmtune.

usage: reader.py OUT.json FOLDER... ; each FOLDER has picture.png beside the export's own files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

QUESTION = "What color is the shape?"


def read(folder: Path) -> dict:
    """Prompt, ids, pixels, logits and generated text of one folder, and what was wrong with its weights."""
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    picture = Image.open(folder / "picture.png")
    inputs = processor(images=picture, text=prompt, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    return {
        "image_processor": type(processor.image_processor).__name__,
        "faults": {name: sorted(map(str, keys)) for name, keys in info.items() if keys},
        "prompt": prompt,
        "ids": inputs["input_ids"].tolist(),
        "pixels": inputs["pixel_values"].tolist(),
        "logits": logits.tolist(),
        "answer": processor.decode(answer),
    }


def main(out: str, *folders: str) -> None:
    readings = {Path(folder).name: read(Path(folder)) for folder in folders}
    foreign = sorted(name for name in sys.modules if name.partition(".")[0] == "vlmtune")
    result = {"version": transformers.__version__, "foreign": foreign, "readings": readings}
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
