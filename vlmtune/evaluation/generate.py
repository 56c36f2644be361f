"""Greedy answers in batches, with a KV cache.

Questions about one picture share the work: the picture is encoded once, and the prompt up to where the
questions part (the picture's tokens above all) runs through the language model once; its cache is then copied
to each row.
Shape letters: b rows, g groups of rows with one beginning, t tokens, d language width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlavaForConditionalGeneration, LlavaProcessor

from vlmtune.data.images import image_size, open_image
from vlmtune.data.render import Renderer
from vlmtune.errors import DataError
from vlmtune.evaluation.scores import Prediction
from vlmtune.models.build import load_model
from vlmtune.models.vision import token_counter
from vlmtune.models.vlm import VLM
from vlmtune.types import IMAGE_MARK, ChatSample, ImageRef, Turn


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What to ask for sample `index`."""

    index: int
    ids: list[int]
    images: tuple[ImageRef, ...]


@dataclass(frozen=True, slots=True)
class _Asker:
    """What all batches share."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    ends: Int[Tensor, " e"]
    max_new_tokens: int


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
    asker = _Asker(model, processor, _ends(model, processor), max_new_tokens)
    training = model.training
    model.eval()
    try:
        for batch in _batches(prompts, batch_size):
            for prompt, text in _ask(asker, batch, samples, predictions):
                predictions[prompt.index] = _prediction(samples[prompt.index], text)
            if on_progress:
                on_progress(len(predictions), len(samples))
    finally:
        model.train(training)
    return [predictions[index] for index in range(len(samples))]


# ---------------------------------------------------------------- prompts


def _prepare(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[ChatSample],
    predictions: dict[int, Prediction],
) -> list[_Prompt]:
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
            shown = ids.count(renderer.image_token_id) // renderer.image_tokens(0, 0) if sample.images else 0
            prompts.append(_Prompt(index, ids, sample.images[:shown]))
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
    questions = [turn.text for turn in sample.turns if turn.role == "user"]
    question = questions[-1].replace(IMAGE_MARK, "").strip() if questions else ""
    return Prediction(sample.key, sample.kind, question, text, sample.references or tuple(answers), error)


def _ends(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Int[Tensor, " e"]:
    """Every token that ends an answer, for the model or for the template's tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    found = {end for end in (*ends, processor.tokenizer.eos_token_id) if end is not None}
    return torch.tensor(sorted(found), device=model.device)


def _batches(prompts: Sequence[_Prompt], batch_size: int) -> Iterator[list[_Prompt]]:
    """All prompts, those about one picture side by side, like lengths together, the longest first."""
    longest: dict[tuple[ImageRef, ...], int] = {}
    for prompt in prompts:
        longest[prompt.images] = max(longest.get(prompt.images, 0), len(prompt.ids))
    by_length = sorted(longest, key=longest.__getitem__, reverse=True)
    rank = {images: place for place, images in enumerate(by_length)}
    ordered = sorted(prompts, key=lambda prompt: (rank[prompt.images], -len(prompt.ids)))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


# ---------------------------------------------------------------- one batch


@torch.no_grad()
def _ask(
    asker: _Asker, batch: list[_Prompt], samples: Sequence[ChatSample], predictions: dict[int, Prediction]
) -> list[tuple[_Prompt, str]]:
    """The answer to each prompt whose pictures open; the others' predictions are filled in."""
    pictures, faults = {}, {}
    for image in dict.fromkeys(image for prompt in batch for image in prompt.images):
        try:
            pictures[image] = open_image(image)
        except DataError as error:
            faults[image] = str(error)
    for prompt in batch:
        if reasons := [faults[image] for image in prompt.images if image in faults]:
            predictions[prompt.index] = _prediction(samples[prompt.index], "", reasons[0])
    batch = [prompt for prompt in batch if prompt.index not in predictions]
    if not batch:
        return []
    features: dict[ImageRef, Float[Tensor, "t d"]] = {}
    if pictures:
        pixels = asker.processor.image_processor(list(pictures.values()), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(asker.model.device, asker.model.dtype)
        encoded = asker.model.get_image_features(pixel_values=pixels)
        features = dict(zip(pictures, encoded.pooler_output, strict=True))
    answers = _generate(asker, batch, features)
    texts = asker.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(prompt, text.strip()) for prompt, text in zip(batch, texts, strict=True)]


def _generate(
    asker: _Asker, batch: list[_Prompt], features: dict[ImageRef, Float[Tensor, "t d"]]
) -> list[list[int]]:
    """The new ids of each prompt, the end token left out."""
    groups: dict[tuple[ImageRef, ...], list[_Prompt]] = {}
    for prompt in batch:
        groups.setdefault(prompt.images, []).append(prompt)
    shared = {images: _shared_length([prompt.ids for prompt in group]) for images, group in groups.items()}
    cache = DynamicCache(config=asker.model.config.get_text_config())
    row_of = {images: row for row, images in enumerate(groups)}
    rows = torch.tensor([row_of[prompt.images] for prompt in batch], device=asker.model.device)

    beginnings = [(group[0].ids[: shared[images]], 0) for images, group in groups.items()]
    vectors = [torch.cat([features[image] for image in images]) for images in groups if images]
    mask = torch.zeros(len(groups), 0, dtype=torch.long, device=asker.model.device)
    _, mask = _forward(asker.model, cache, mask, beginnings, torch.cat(vectors) if vectors else None)
    cache.batch_select_indices(rows)

    endings = [(prompt.ids[shared[prompt.images] :], shared[prompt.images]) for prompt in batch]
    logits, mask = _forward(asker.model, cache, mask[rows], endings, None)
    return _greedy(asker, cache, logits, mask)


def _shared_length(prompts: list[list[int]]) -> int:
    """Tokens at the beginning that all have in common, always leaving one to ask with."""
    first, last = min(prompts), max(prompts)  # in the order of lists: all others begin as these two do
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return min(sum(1 for _ in alike), min(map(len, prompts)) - 1)


def _forward(
    model: LlavaForConditionalGeneration,
    cache: DynamicCache,
    mask: Int[Tensor, "b u"],
    pieces: list[tuple[list[int], int]],
    vectors: Float[Tensor, "n d"] | None,
) -> tuple[Float[Tensor, "b v"], Int[Tensor, "b ut"]]:
    """The logits after each row's next piece of ids, and the longer mask.

    A piece comes with the position it starts at; pieces are padded on the left. `vectors` take the places of
    the image tokens, in order.
    """
    device = model.device
    ids = _left_padded([torch.tensor(ids) for ids, _ in pieces]).to(device)
    new = _left_padded([torch.ones(len(ids), dtype=torch.long) for ids, _ in pieces]).to(device)
    starts = torch.tensor([start for _, start in pieces], device=device)
    embeds = model.get_input_embeddings()(ids)
    if vectors is not None:
        places = (ids == model.config.image_token_id) & new.bool()
        embeds = embeds.masked_scatter(places[..., None], vectors.to(embeds.dtype))
    mask = torch.cat([mask, new], dim=1)
    output = model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=(starts[:, None] + new.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1], mask


def _left_padded(rows: list[Int[Tensor, " t"]]) -> Int[Tensor, "b t"]:
    return pad_sequence(rows, batch_first=True, padding_side="left")


def _greedy(
    asker: _Asker, cache: DynamicCache, logits: Float[Tensor, "b v"], mask: Int[Tensor, "b t"]
) -> list[list[int]]:
    """The most likely token again and again; a row leaves the batch when it ends."""
    answers: list[list[int]] = [[] for _ in range(len(mask))]
    alive = list(range(len(mask)))
    for step in range(asker.max_new_tokens):
        tokens = logits.argmax(-1)
        going = ~torch.isin(tokens, asker.ends)
        alive = [row for row, goes in zip(alive, going.tolist(), strict=True) if goes]
        for row, token in zip(alive, tokens[going].tolist(), strict=True):
            answers[row].append(token)
        if not alive or step + 1 == asker.max_new_tokens:
            break
        if not going.all():
            cache.batch_select_indices(going.nonzero()[:, 0])
        mask = torch.cat([mask[going], mask.new_ones(len(alive), 1)], dim=1)
        output = asker.model(
            input_ids=tokens[going][:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    return answers
