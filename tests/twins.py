"""A recipe's tiny twin: the same projector, template, tuning and objective on tiny parts and a mix made here."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.tiny import LANGUAGES, TOWERS, tiny_images
from tests.vaes import tiny_vae_folder
from vlmtune.config.schema import Recipe

COLORS = ("red", "blue", "green", "teal")


def tiny_mix(folder: Path, samples: int = 24) -> Path:
    """A llava_json mix in `folder`: one picture, two pictures, none; one to three turns."""
    names = tiny_images(folder / "images", 6)
    records = []
    for i in range(samples):
        pictures = [names[(i + j) % 6] for j in range(i % 3)]
        turns = []
        for turn in range(1 + i % 3):
            mark = "<image>\n" * len(pictures) if turn == 0 else ""
            turns += [
                {"from": "human", "value": f"{mark}What color is the shape number {turn}?"},
                {"from": "gpt", "value": f"It is {COLORS[(i + turn) % 4]}."},
            ]
        records.append({"id": str(i), "image": pictures, "conversations": turns})
    (folder / "chats.json").write_text(json.dumps(records))
    source = {
        "name": "toy",
        "format": "llava_json",
        "path": str(folder / "chats.json"),
        "images": str(folder / "images"),
    }
    mix = folder / "mix.yaml"
    mix.write_text(yaml.safe_dump({"sources": [source]}))
    return mix


def tiny_twin(recipe: Recipe, folder: Path, steps: int = 2) -> Recipe:
    """`recipe` with everything large replaced; what a recipe is about stays."""
    folder.mkdir(parents=True, exist_ok=True)
    content = recipe.model_dump(mode="json")
    tower = "siglip" if "siglip" in json.dumps(content["model"]["vision"]) else "clip"
    projector = content["model"]["projector"] or {"type": "mlp2x"}
    content["model"] |= {
        "checkpoint": None,
        "vision": {"config": TOWERS[tower]},
        "projector": projector,
        "language": {"config": LANGUAGES["llama"], "tokenizer": {"vocab_size": 400}},
        "dtype": "float32",
    }
    if content["objective"]["type"] == "reconstruction":
        content["objective"] |= {
            "target": {"type": "vae", "path": tiny_vae_folder(folder / "vae")},
            "denoiser": content["objective"]["denoiser"] | {"width": 32, "heads": 4},
            "weights": None,
        }
    mix = str(tiny_mix(folder))
    content["data"]["chat"] |= {
        "mix": mix,
        "batch_size": 6,
        "max_length": 256,
        "micro_tokens": 512,
        "workers": 0,
    }
    content["schedule"] |= {"epochs": None, "steps": steps}
    content["run"] |= {"dir": str(folder / "run"), "precision": "fp32", "save_every": steps, "log_every": 1}
    content["evaluation"] |= {
        "mix": mix,
        "max_new_tokens": 4,
        "held_out": {"fraction": 0.1, "every": steps, "answers": 1},
    }
    return Recipe.model_validate(content)
