"""What every arm trains: one stock Llava checkpoint, and samples whose lengths are those of LLaVA-665K.

model/            config, weights, tokenizer, template, image processor (stock `llava`)
images/           small noise pictures
data.json         the samples in LLaVA's format;  mix.yaml  the mix that names them
encoded.jsonl     the same samples as token ids and labels, for the arm that does not tokenise
workload.json     the figures below, and the order in which all arms see the samples
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlmtune.data.mixes import MixOrder
from vlmtune.data.render import Renderer, template_text
from vlmtune.models.processor import build_processor, square_images
from vlmtune.models.tokenizer import train_tokenizer
from vlmtune.models.vision import TOWER_FAMILIES, token_counter
from vlmtune.models.vlm import VLMConfig
from vlmtune.types import IGNORE, ChatSample, ImageRef, Size, Turn

SEED = 0
"""Of weights, texts, lengths, pictures and order."""
TEMPLATE = "vicuna_v1"
LEARNING_RATE = 2e-5
"""Constant; LLaVA-1.5's peak for its second stage."""
_SYSTEM_TOKENS = 33
"""The template's first words, and the line break after an image."""
_TURN_TOKENS = 90
"""One turn's question and answer, on average."""
_HEADER_TOKENS = 5
"""Of them, the template's own."""
_ANSWER_SHARE = 0.45
"""Of a turn's text; with 576 image tokens about one token in eight is supervised."""
_IMAGE_SHARE = 0.94
"""Samples with an image: 624,610 of LLaVA-665K's 665,298."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a model and of its samples, in tokens unless said otherwise."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    image_side: int
    """Pixels; patches are 14 wide."""
    text_with_image: int
    """Mean length of the text beside an image."""
    text_alone: int
    """Mean length of a sample without image."""
    max_length: int
    samples_per_step: int
    per_device: int
    """Samples of one micro-batch of the peers, which accumulate up to the step."""
    micro_tokens: int
    """Token budget of one micro-batch of vlmtune."""


FULL = Scale(576, 1536, 30, 9, 3, 49152, 336, 266, 1100, 2048, 8, 4, 2048)
"""SmolLM2-135M's decoder, LLaVA-1.5's 24 x 24 image tokens; mean sample 854 tokens as measured on LLaVA-665K."""
TINY = Scale(32, 64, 2, 4, 2, 600, 56, 40, 120, 256, 8, 4, 256)
"""For tests: seconds, and figures without meaning."""


@dataclass(frozen=True)
class Workload:
    """A prepared folder."""

    folder: Path
    scale: Scale
    steps: int
    """Optimizer steps, the first one being the warm-up."""
    order: tuple[int, ...]
    """The sample at each position of the epoch."""
    lengths: tuple[int, ...]
    """Tokens of each sample, image tokens included."""
    supervised: tuple[int, ...]
    """Supervised tokens of each sample."""

    @property
    def timed(self) -> tuple[int, ...]:
        """The samples after the warm-up step."""
        return self.order[self.scale.samples_per_step :]

    def figures(self) -> dict[str, float]:
        """What the timed samples are like."""
        lengths, size = [self.lengths[i] for i in self.timed], self.scale.per_device
        padded = sum(
            max(lengths[i : i + size]) * len(lengths[i : i + size]) for i in range(0, len(lengths), size)
        )
        return {
            "timed_samples": len(lengths),
            "mean_tokens": statistics.fmean(lengths),
            "longest": max(lengths),
            "supervised_share": sum(self.supervised[i] for i in self.timed) / sum(lengths),
            "fill_of_padded_batches": sum(lengths) / padded,
        }


def load_workload(folder: Path) -> Workload:
    """The workload that `prepare` wrote."""
    found = json.loads((folder / "workload.json").read_text())
    sequences = {name: tuple(found[name]) for name in ("order", "lengths", "supervised")}
    return Workload(folder, Scale(**found["scale"]), found["steps"], **sequences)


def prepare(folder: Path, scale: Scale, timed_samples: int) -> Workload:
    """The workload, written to `folder`: a warm-up step, and the steps that hold `timed_samples`."""
    steps = 1 + -(-timed_samples // scale.samples_per_step)
    rng = np.random.default_rng(SEED)
    words = _words(rng, scale.vocabulary)
    processor, config = _model_folder(folder / "model", scale, words)
    words = [word for word in words if len(processor.tokenizer.tokenize(f" {word}")) == 1]
    samples = list(_samples(rng, words, steps * scale.samples_per_step, scale, folder / "images"))
    renderer = Renderer(processor.tokenizer, token_counter(config), processor.chat_template)
    rendered = [_rendered(renderer, sample) for sample in samples]
    _write_data(folder, samples, rendered)
    order = MixOrder([len(samples)], [len(samples)], SEED).epoch(0)[:, 1]
    workload = Workload(
        folder,
        scale,
        steps,
        tuple(order.tolist()),
        tuple(len(each["input_ids"]) for each in rendered),
        tuple(sum(label != IGNORE for label in each["labels"]) for each in rendered),
    )
    rows = asdict(workload) | {"folder": str(folder), "figures": workload.figures()}
    (folder / "workload.json").write_text(json.dumps(rows))
    return workload


# ---------------------------------------------------------------- model


def _model_folder(folder: Path, scale: Scale, words: list[str]) -> tuple[LlavaProcessor, VLMConfig]:
    """The processor and config of the checkpoint written to `folder`, its weights drawn from the seed."""
    template = template_text(TEMPLATE)
    texts = [" ".join(words[start : start + 500]) for start in range(0, len(words), 500)]
    tokenizer = train_tokenizer(texts, scale.vocabulary, template)
    language = LlamaConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.key_value_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=scale.image_side,
        patch_size=14,
    )
    shared = {
        "vision_config": vision,
        "text_config": language,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_layer": TOWER_FAMILIES[vision.model_type].feature_layer,
        "vision_feature_select_strategy": TOWER_FAMILIES[vision.model_type].select,
        "tie_word_embeddings": True,
    }
    config = VLMConfig(**shared, projector={"type": "mlp2x"})
    pixels = square_images("pad", scale.image_side, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    processor = build_processor(config, tokenizer, pixels, template)
    torch.manual_seed(SEED)
    LlavaForConditionalGeneration(LlavaConfig(**shared)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor, config


# ---------------------------------------------------------------- samples


class _Plan(NamedTuple):
    text: int
    """Tokens beside those of the image."""
    image: bool


def _samples(
    rng: np.random.Generator, words: list[str], count: int, scale: Scale, images: Path
) -> Iterator[ChatSample]:
    images.mkdir(parents=True)
    for index, plan in enumerate(_plans(rng, count, scale)):
        refs = ()
        if plan.image:
            name = f"{index}.{'jpg' if index % 2 else 'png'}"
            height, width = rng.integers(120, 480, 2)
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(images / name)
            refs = (ImageRef(name, images),)
        yield ChatSample(f"bench#{index}", refs, tuple(_turns(rng, words, plan)))


def _plans(rng: np.random.Generator, count: int, scale: Scale) -> list[_Plan]:
    """Evenly spaced quantiles of both length distributions, shuffled: few samples, yet the right mean and tail."""
    with_image = round(_IMAGE_SHARE * count)
    features = (scale.image_side // 14) ** 2
    beside = _lengths(with_image, scale.text_with_image, 0.66, scale.max_length - features)
    alone = _lengths(count - with_image, scale.text_alone, 0.4, scale.max_length)
    plans = [_Plan(text, True) for text in beside] + [_Plan(text, False) for text in alone]
    return [plans[i] for i in rng.permutation(count)]


def _lengths(count: int, mean: float, sigma: float, most: int) -> list[int]:
    """Quantiles of a lognormal distribution, cut at `most`."""
    normal = statistics.NormalDist()
    middle = np.log(mean) - sigma**2 / 2
    points = (normal.inv_cdf((i + 0.5) / count) for i in range(count))
    shortest = _SYSTEM_TOKENS + _HEADER_TOKENS + 4
    return [int(np.clip(np.exp(middle + sigma * point), shortest, most)) for point in points]


def _turns(rng: np.random.Generator, words: list[str], plan: _Plan) -> Iterator[Turn]:
    written = plan.text - _SYSTEM_TOKENS
    pairs = max(1, round(written / _TURN_TOKENS))
    for pair in range(pairs):
        tokens = written // pairs - _HEADER_TOKENS
        answer = max(1, round(tokens * _ANSWER_SHARE))
        mark = "<image>\n" if plan.image and pair == 0 else ""
        yield Turn("user", mark + _text(rng, words, tokens - answer))
        yield Turn("assistant", _text(rng, words, answer))


def _text(rng: np.random.Generator, words: list[str], tokens: int) -> str:
    return " ".join(words[i] for i in rng.integers(0, len(words), max(1, tokens)))


def _words(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct words of one to three syllables."""
    syllables = [first + second for first in "bcdfghklmnprstvz" for second in "aeiou"]
    found: dict[str, None] = {}
    while len(found) < count:
        drawn = rng.integers(0, len(syllables), rng.integers(1, 4))
        found["".join(syllables[i] for i in drawn)] = None
    return list(found)


def _rendered(renderer: Renderer, sample: ChatSample) -> dict[str, Any]:
    rendered = renderer.render(sample, [Size(1, 1)] * len(sample.images))  # any size: the grid is fixed
    return {
        "input_ids": rendered.input_ids,
        "labels": rendered.labels,
        "images": [image.name for image in sample.images],
    }


def _write_data(folder: Path, samples: list[ChatSample], rendered: list[dict[str, Any]]) -> None:
    speaker = {"user": "human", "assistant": "gpt"}
    rows = []
    for sample in samples:
        turns = [{"from": speaker[turn.role], "value": turn.text} for turn in sample.turns]
        image = {"image": sample.images[0].name} if sample.images else {}
        rows.append({"id": sample.key, **image, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "encoded.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rendered))
    (folder / "mix.yaml").write_text(
        "sources:\n  - {name: bench, format: llava_json, path: data.json, images: images}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    workload = prepare(options.folder, TINY if options.tiny else FULL, options.samples)
    logging.info("workload: %s", workload.figures())


if __name__ == "__main__":
    main()
