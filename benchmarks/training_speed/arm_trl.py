"""TRL's SFTTrainer as its documentation has it for pictures and conversations: `images` and `messages`, answers only.

Packing and padding-free batches are refused by TRL for data with images, so its own collator pads.
"""

from __future__ import annotations

import json

from arm_trainer import Laps, load_peer, settings
from datasets import Dataset, Features, Image, List, Value
from meter import Meter
from trl import SFTConfig, SFTTrainer
from workload import Workload

_MESSAGE = {"role": Value("string"), "content": Value("string")}


def conversations(workload: Workload) -> Dataset:
    """The workload's samples in its order; TRL puts the pictures before the first question itself."""
    found = json.loads((workload.folder / "data.json").read_text())
    role = {"human": "user", "gpt": "assistant"}
    rows = [
        {
            "messages": [
                {"role": role[turn["from"]], "content": turn["value"].removeprefix("<image>\n")}
                for turn in row["conversations"]
            ],
            "images": [str(workload.folder / "images" / row["image"])] if "image" in row else [],
        }
        for row in (found[index] for index in workload.order)
    ]
    return Dataset.from_list(rows, features=Features(messages=List(_MESSAGE), images=List(Image())))


def train(workload: Workload, meter: Meter, checkpointing: bool) -> None:
    """Trains one epoch of the workload."""
    model, processor = load_peer(workload, meter)
    config = SFTConfig(
        **settings(workload, checkpointing),
        max_length=workload.scale.max_length,
        assistant_only_loss=True,
    )
    SFTTrainer(
        model=model,
        args=config,
        train_dataset=conversations(workload),
        processing_class=processor,
        callbacks=[Laps(meter)],
    ).train()
