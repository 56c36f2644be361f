"""Answers to the last question of samples: prompts as in training, pictures encoded once a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlmtune.data.images import image_size, open_image
from vlmtune.data.render import Renderer
from vlmtune.errors import DataError
from vlmtune.evaluation.decode import Choose, Prompt, decode, greedy
from vlmtune.evaluation.scores import Prediction
from vlmtune.models.build import load_model
from vlmtune.models.vision import token_counter
from vlmtune.models.vlm import VLM
from vlmtune.types import IMAGE_MARK, ChatSample, ImageRef, Turn


def open_model(path: str) -> tuple[VLM, LlavaProcessor]:
    """Model and processor of an export, a step folder or a hub id, on the GPU if there is one, for `answer`.

    Raises CheckpointError when a file is missing or the weights do not fit.
    """
    step = Path(path) / "model"
    model, processor = load_model(step if step.is_dir() else path)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[ChatSample],
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """The model's answer to the last question of each sample, in the samples' order.

    A sample that cannot be read or asked (also one whose lookup raises DataError) gets a prediction with
    `error`. Calls `on_progress(done, total)` after each batch. The model is left in the mode it came in.
    """
    predictions: dict[int, Prediction] = {}
    prompts = _prepare(model, processor, samples, predictions)
    for batch in complete(model, processor, prompts, batch_size, max_new_tokens):
        for each in batch:
            predictions[each.index] = _prediction(samples[each.index], each.text, each.error)
        if on_progress:
            on_progress(len(predictions), len(samples))
    return [predictions[index] for index in range(len(samples))]


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote after prompt `index`; `error` says why nothing."""

    index: int
    text: str
    ended: bool
    """Whether an end token came before the limit."""
    error: str = ""


def complete(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    prompts: Sequence[Prompt],
    batch_size: int,
    max_new_tokens: int,
    choose: Choose = greedy,
) -> Iterator[list[Completion]]:
    """The completions of all prompts, batch by batch in an order of its own; pictures are encoded once a batch.

    The model is in eval mode meanwhile.
    """
    ends = _ends(model, processor)
    with _evaluating(model):
        for batch in _batches(prompts, batch_size):
            features, faults = _encode(model, processor, batch)
            bad = {
                prompt.index: faults[image] for prompt in batch for image in prompt.images if image in faults
            }
            askable = [prompt for prompt in batch if prompt.index not in bad]
            written = decode(model, askable, features, ends, max_new_tokens, choose) if askable else []
            yield [Completion(index, "", False, error) for index, error in bad.items()] + [
                Completion(prompt.index, _text(processor, ids), len(ids) < max_new_tokens)
                for prompt, ids in zip(askable, written, strict=True)
            ]


def _text(processor: LlavaProcessor, ids: list[int]) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@contextmanager
def _evaluating(model: LlavaForConditionalGeneration) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _prepare(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[ChatSample],
    predictions: dict[int, Prediction],
) -> list[Prompt]:
    """The prompts of all samples that can be asked; the others' predictions are filled in."""
    renderer = Renderer(processor.tokenizer, token_counter(model.config), processor.chat_template)
    size = lru_cache(maxsize=4096)(image_size)
    prompts = []
    for index in range(len(samples)):
        try:
            sample = samples[index]
        except DataError as error:
            predictions[index] = Prediction(error.faults[0].where, "", "", "", (), str(error))
            continue
        try:
            ids = renderer.prompt(_answered(sample), [size(image) for image in sample.images])
            if len(ids) < 2:  # at most the token that begins every text
                raise DataError("the chat template leaves nothing of the question", sample.key)
            prompts.append(Prompt(index, ids, sample.images))
        except DataError as error:
            predictions[index] = _prediction(sample, "", str(error))
    return prompts


def _answered(sample: ChatSample) -> ChatSample:
    """The sample with an answer to its last question, if need be an empty one: a prompt ends before it."""
    if sample.turns and sample.turns[-1].role == "assistant":
        return sample
    return replace(sample, turns=(*sample.turns, Turn("assistant", "")))


def _prediction(sample: ChatSample, text: str, error: str = "") -> Prediction:
    answers = [turn.text for turn in sample.turns[-1:] if turn.role == "assistant"]
    questions = [turn.text for turn in sample.turns if turn.role in ("user", "questioner")]
    question = questions[-1].replace(IMAGE_MARK, "").strip() if questions else ""
    return Prediction(sample.key, sample.kind, question, text, sample.references or tuple(answers), error)


def _ends(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Int[Tensor, " e"]:
    """Every token that ends an answer, for the model or for the template's tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    found = {end for end in (*ends, processor.tokenizer.eos_token_id) if end is not None}
    return torch.tensor(sorted(found), device=model.device)


def _batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[Prompt]]:
    """All prompts, those about one picture side by side, like lengths together, the longest first."""
    longest: dict[tuple[ImageRef, ...], int] = {}
    for prompt in prompts:
        longest[prompt.images] = max(longest.get(prompt.images, 0), len(prompt.ids))
    by_length = sorted(longest, key=longest.__getitem__, reverse=True)
    rank = {images: place for place, images in enumerate(by_length)}
    ordered = sorted(prompts, key=lambda prompt: (rank[prompt.images], -len(prompt.ids)))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


@torch.no_grad()
def _encode(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, batch: list[Prompt]
) -> tuple[dict[ImageRef, Float[Tensor, "n d"]], dict[ImageRef, str]]:
    """The features of each different picture of a batch, and why some cannot be opened."""
    pictures, faults = {}, {}
    for image in dict.fromkeys(image for prompt in batch for image in prompt.images):
        try:
            pictures[image] = open_image(image)
        except DataError as error:
            faults[image] = str(error)
    if not pictures:
        return {}, faults
    pixels = processor.image_processor(list(pictures.values()), return_tensors="pt")["pixel_values"]
    encoded = model.get_image_features(pixel_values=pixels.to(model.device, model.dtype)).pooler_output
    return dict(zip(pictures, encoded, strict=True)), faults
