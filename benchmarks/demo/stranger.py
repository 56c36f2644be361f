"""Opens a run's export with transformers alone, and holds its answers against those of the run.

python benchmarks/demo/stranger.py runs/smollm2_lora           # writes runs/smollm2_lora/stranger.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import easy_vqa
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run that was scored on easy-VQA's test split")
    parser.add_argument("--questions", type=int, default=256, help="so many, evenly spaced")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    lines = (options.run / "predictions.jsonl").read_text().splitlines()
    known = [json.loads(line) for line in lines[:: max(len(lines) // options.questions, 1)]]
    known = known[: options.questions]
    model = AutoModelForImageTextToText.from_pretrained(options.run / "export", dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(options.run / "export", padding_side="left")
    pictures, (_, _, images) = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
    found: list[str] = []
    for start in range(0, len(known), options.batch):
        rows = known[start : start + options.batch]
        numbers = [int(row["key"].rpartition("#")[2]) for row in rows]
        opened = [Image.open(pictures[images[number]]).convert("RGB") for number in numbers]
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}]
            for row in rows
        ]
        texts = processor.apply_chat_template(chats, add_generation_prompt=True)
        inputs = processor(
            images=opened, text=texts, padding=True, add_special_tokens=False, return_tensors="pt"
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        found += processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert not any(name.partition(".")[0] == "vlmtune" for name in sys.modules)
    pairs = [(answer.strip(), row) for answer, row in zip(found, known, strict=True)]
    report = {
        "questions": len(pairs),
        "class": type(model).__name__,
        "same_answer_as_the_run": sum(answer == row["prediction"] for answer, row in pairs) / len(pairs),
        "accuracy": sum(answer in row["references"] for answer, row in pairs) / len(pairs),
        "accuracy_of_the_run_on_these": sum(row["correct"] for _, row in pairs) / len(pairs),
    }
    (options.run / "stranger.json").write_text(json.dumps(report, indent=1) + "\n")
    print("opened by transformers alone:", *(f"{name} {value}" for name, value in report.items()), sep="  ")


if __name__ == "__main__":
    main()
