"""How likely a model finds the questions and the answers of a mix, and whether its questions need the picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlmtune.config.loader import load_mix
from vlmtune.config.plugins import SelfQuestionConfig
from vlmtune.data.collate import collate
from vlmtune.data.images import image_size, open_image
from vlmtune.data.render import Renderer
from vlmtune.data.sources import SampleSequence, open_source
from vlmtune.data.transforms import self_question
from vlmtune.errors import DataError
from vlmtune.evaluation.generate import open_model
from vlmtune.models.vision import token_counter
from vlmtune.types import IGNORE, ChatSample, Encoded, ImageRef, Size


@dataclass(frozen=True, slots=True)
class QuestionScores:
    """Mean negative log likelihoods per token, in nats; None where nothing was to measure."""

    question_nll: float | None
    """Of the questions in the questioner's turns."""
    shuffled_question_nll: float | None
    """The same with another sample's picture before them."""
    answer_nll: float | None
    """Of the answers, the questions being the user's."""
    question_tokens: int
    answer_tokens: int
    errors: int
    """Samples that could not be read; they count nowhere."""
    shuffle_gap: float | None = None
    """What the right picture is worth to a question: shuffled less true, over the same questions."""

    def lines(self) -> list[str]:
        """What to print."""
        shown = {
            f"question NLL        ({self.question_tokens:,} tokens)": self.question_nll,
            "  another picture's": self.shuffled_question_nll,
            "  image-shuffle gap": self.shuffle_gap,
            f"answer NLL          ({self.answer_tokens:,} tokens)": self.answer_nll,
        }
        lines = [f"{name:<44} {'-' if value is None else f'{value:.4f}'}" for name, value in shown.items()]
        return [*lines, f"{self.errors} samples could not be read"] if self.errors else lines

    def as_dict(self) -> dict[str, float | int | None]:
        """The fields by name."""
        return asdict(self)


def score_mix(
    model: str,
    mix: Path,
    cache: Path,
    limit: int | None = None,
    first_turn: bool = False,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> QuestionScores:
    """The scores of an export, a step folder or a hub id on (the first `limit` samples of each source of) a mix."""
    opened, processor = open_model(model)
    sources = [open_source(source, mix.parent, cache) for source in load_mix(mix).sources]
    samples = SampleSequence(sources, limit)
    return question_scores(opened, processor, samples, first_turn, batch_size, on_progress)


def question_scores(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[ChatSample],
    first_turn: bool = False,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> QuestionScores:
    """The scores of a model on conversations about pictures.

    Every user turn but the first (with `first_turn` that one too) becomes the questioner's; answers are measured in
    the conversations as they are stored. A picture is exchanged for the next one of its mix in a fixed order.
    """
    renderer = Renderer(processor.tokenizer, token_counter(model.config), processor.chat_template)
    read = [sample for index in range(len(samples)) if (sample := _readable(samples, index, renderer))]
    always = SelfQuestionConfig(type="self_question", probability=1.0, first_turn=first_turn)
    turned = [self_question(sample, always, np.random.default_rng(0)) for sample in read]
    asked = [_questions_only(sample) for sample in turned]
    asked = [sample for sample in asked if any(turn.is_supervised for turn in sample.turns)]
    swapped = _exchanged(asked)
    parts = [asked, [sample for _, sample in swapped], read]
    total, done = sum(map(len, parts)), 0
    sums: list[Float[Tensor, "samples 2"]] = []
    for part in parts:
        rows = torch.zeros(len(part), 2, dtype=torch.float64)
        for places, values in _nll(model, processor, renderer, part, batch_size):
            rows[places] = values
            done += len(places)
            if on_progress:
                on_progress(done, total)
        sums.append(rows)
    questions, shuffled, answers = sums
    true, false = _mean(questions[[place for place, _ in swapped]]), _mean(shuffled)
    return QuestionScores(
        _mean(questions),
        false,
        _mean(answers),
        int(questions[:, 1].sum()),
        int(answers[:, 1].sum()),
        len(samples) - len(read),
        None if true is None or false is None else false - true,
    )


def _readable(samples: Sequence[ChatSample], index: int, renderer: Renderer) -> ChatSample | None:
    """The sample, if it can be rendered and its pictures opened."""
    try:
        sample = samples[index]
        renderer.length(sample, [Size(*open_image(image).size) for image in sample.images])
    except DataError:
        return None
    return sample


def _questions_only(sample: ChatSample) -> ChatSample:
    turns = tuple(replace(turn, supervised=turn.role == "questioner") for turn in sample.turns)
    return replace(sample, turns=turns)


def _exchanged(samples: Sequence[ChatSample]) -> list[tuple[int, ChatSample]]:
    """Place and copy of each sample with other pictures, as many; without those that have no counterpart."""
    kinds: dict[int, list[tuple[ImageRef, ...]]] = defaultdict(list)
    for images in dict.fromkeys(sample.images for sample in samples):
        kinds[len(images)].append(images)
    following: dict[tuple[ImageRef, ...], tuple[ImageRef, ...]] = {}
    for kind in kinds.values():
        order = [kind[place] for place in np.random.default_rng(0).permutation(len(kind))]
        following |= dict(zip(order, (*order[1:], order[0]), strict=True))
    return [
        (place, replace(sample, images=following[sample.images]))
        for place, sample in enumerate(samples)
        if following[sample.images] != sample.images
    ]


def _mean(rows: Float[Tensor, "samples 2"]) -> float | None:
    total, tokens = rows.sum(0).tolist()
    return total / tokens if tokens else None


@torch.no_grad()
def _nll(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    renderer: Renderer,
    samples: Sequence[ChatSample],
    batch_size: int,
) -> Iterator[tuple[list[int], Float[Tensor, "b 2"]]]:
    """Yields places, and the summed negative log likelihood and number of learned tokens of those samples."""
    size = lru_cache(maxsize=4096)(image_size)
    rendered = [renderer.render(sample, [size(image) for image in sample.images]) for sample in samples]
    order = sorted(range(len(samples)), key=lambda place: len(rendered[place].input_ids))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        rows = []
        for place in places:
            ids, labels = torch.tensor(rendered[place].input_ids), torch.tensor(rendered[place].labels)
            rows.append(Encoded(samples[place].key, ids, labels, _pixels(processor, samples[place])))
        yield places, _batch_nll(model, rows)


def _pixels(processor: LlavaProcessor, sample: ChatSample) -> Tensor | None:
    images = [open_image(image) for image in sample.images]
    return processor.image_processor(images, return_tensors="pt")["pixel_values"] if images else None


def _batch_nll(model: LlavaForConditionalGeneration, rows: list[Encoded]) -> Float[Tensor, "b 2"]:
    batch = collate(rows, "none")
    pixels, device = batch.pixel_values, model.device
    hidden = model.model(
        input_ids=batch.input_ids.to(device),
        pixel_values=None if pixels is None else pixels.to(device, model.dtype),
        attention_mask=None if batch.attention_mask is None else batch.attention_mask.to(device),
        use_cache=False,
    ).last_hidden_state[:, :-1]
    targets = batch.labels[:, 1:].to(device)
    wanted = targets != IGNORE
    losses = F.cross_entropy(model.lm_head(hidden[wanted]).float(), targets[wanted], reduction="none")
    owners = wanted.nonzero()[:, 0].cpu()
    sums = torch.zeros(len(rows), 2, dtype=torch.float64)
    values = torch.stack([losses.cpu().double(), torch.ones(len(losses), dtype=torch.float64)], dim=1)
    return sums.index_add_(0, owners, values)
