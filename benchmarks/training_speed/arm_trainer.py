"""transformers' Trainer with a plain padding collator, on samples that were tokenised beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from meter import Meter
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from workload import LEARNING_RATE, Workload

from vlmtune.types import IGNORE


class Samples(torch.utils.data.Dataset):
    """The workload's samples in its order, pictures opened when asked for."""

    def __init__(self, workload: Workload, processor: LlavaProcessor) -> None:
        lines = (workload.folder / "encoded.jsonl").read_text().splitlines()
        self.rows = [json.loads(lines[index]) for index in workload.order]
        self.images, self.processor = workload.folder / "images", processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        pictures = [Image.open(self.images / name).convert("RGB") for name in row["images"]]
        pixels = self.processor.image_processor(pictures, return_tensors="pt") if pictures else {}
        return {**{name: torch.tensor(row[name]) for name in ("input_ids", "labels")}, **pixels}


def padding_collator(pad: int) -> Callable[[Sequence[dict[str, Tensor]]], dict[str, Tensor]]:
    """The collator that pads to the right, up to the longest sample of the micro-batch."""

    def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=pad)
        labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORE)
        ones = [torch.ones_like(row["input_ids"]) for row in rows]
        pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": pad_sequence(ones, batch_first=True),
            **({"pixel_values": torch.cat(pixels)} if pixels else {}),
        }

    return collate


def settings(workload: Workload, checkpointing: bool) -> dict[str, Any]:
    """The training arguments, which the TRL arm shares."""
    return {
        "output_dir": str(workload.folder / "peer"),
        "use_cpu": True,
        "bf16": True,
        "per_device_train_batch_size": workload.scale.per_device,
        "gradient_accumulation_steps": workload.scale.samples_per_step // workload.scale.per_device,
        "num_train_epochs": 1,
        # The order of the samples is random already, and the same in all arms.
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "activation_checkpointing": checkpointing,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


class Laps(TrainerCallback):
    """Tells the meter where a step ends, and what it logs."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.step_done()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.meter.losses.append(logs["loss"])


def load_peer(workload: Workload, meter: Meter) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The stock model with its tower frozen, under the meter, and its processor."""
    folder = workload.folder / "model"
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.model.vision_tower.requires_grad_(False)
    meter.watch(model)
    model.register_forward_pre_hook(lambda _, args, inputs: meter.fed(inputs["labels"]), with_kwargs=True)
    processor = AutoProcessor.from_pretrained(folder)
    # Not backend="pil" above: it would reach the tokenizer too, which then refuses to mask.
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return model, processor


def train(workload: Workload, meter: Meter, checkpointing: bool) -> None:
    """Trains one epoch of the workload."""
    model, processor = load_peer(workload, meter)
    Trainer(
        model=model,
        args=TrainingArguments(**settings(workload, checkpointing)),
        data_collator=padding_collator(processor.tokenizer.pad_token_id),
        train_dataset=Samples(workload, processor),
        callbacks=[Laps(meter)],
    ).train()
