"""A model that learned to ask, asking: questions about pictures, and its own answers to them (SQ-LLaVA).

The paper's models never learned to ask in a first turn: they describe the picture first (a seed turn). A model tuned
with `self_question: {first_turn: true}` asks with nothing but the picture before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vlmtune.data.caching import digest
from vlmtune.data.images import image_size
from vlmtune.data.render import Renderer
from vlmtune.errors import DataError
from vlmtune.evaluation.decode import Prompt, Sampler
from vlmtune.evaluation.generate import answer, complete
from vlmtune.models.vision import token_counter
from vlmtune.types import IMAGE_MARK, ChatSample, ImageRef, Turn


@dataclass(frozen=True, slots=True)
class Asking:
    """How to ask. The settings are those of SQ-LLaVA's released demo (visual_questioning.py)."""

    number: int = 3
    """Questions a picture, each drawn by itself from the same prompt."""
    first_turn: bool = False
    """Ask with nothing but the picture before; else after a seed turn."""
    answers: bool = False
    """Also answer each question, greedily."""
    request: str = "Please describe the image in detail."
    """The seed turn."""
    temperature: float = 1.2
    top_k: int = 300
    top_p: float = 0.95
    max_new_tokens: int = 300
    """Longest question in tokens."""
    max_answer_tokens: int = 1024
    """Longest answer, the seed turn's too."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `ended` says whether the end token came before the limit."""

    text: str
    ended: bool
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked about the pictures of one scene; `error` says why nothing."""

    key: str
    images: tuple[ImageRef, ...]
    context: tuple[Turn, ...] = ()
    """The turns before each question."""
    questions: tuple[Question, ...] = ()
    error: str = ""

    @property
    def distinct(self) -> tuple[Question, ...]:
        """The questions that ended, each text once."""
        return tuple({each.text: each for each in self.questions if each.ended and each.text}.values())


def ask(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Sequence[tuple[ImageRef, ...]],
    asking: Asking,
    batch_size: int = 16,
) -> list[Asked]:
    """What the model asks about each scene, in order.

    A draw depends on the seed, the names of the scene's pictures and the question's number, on no other scene.
    Pictures that cannot be read, and scenes without a description, get an `error`.
    """
    scenes_asked = _seeded(model, processor, scenes, asking, batch_size)
    renderer = Renderer(processor.tokenizer, token_counter(model.config), processor.chat_template)
    prompts: list[Prompt] = []
    for place, each in enumerate(scenes_asked):
        try:
            ids = [] if each.error else _prompt(renderer, each)
        except DataError as error:
            scenes_asked[place] = replace(each, error=str(error))
            continue
        first = place * asking.number
        prompts += [Prompt(first + shot, ids, each.images) for shot in range(asking.number) if ids]
    seeds = {each.index: _seed(asking, scenes_asked, each.index) for each in prompts}
    sampler = Sampler(asking.temperature, asking.top_k, asking.top_p, seeds)
    batches = complete(model, processor, prompts, batch_size, asking.max_new_tokens, sampler)
    written = sorted((each for batch in batches for each in batch), key=lambda each: each.index)
    for place, group in groupby(written, key=lambda each: each.index // asking.number):
        found = list(group)
        questions = () if found[0].error else tuple(Question(each.text, each.ended) for each in found)
        scenes_asked[place] = replace(scenes_asked[place], questions=questions, error=found[0].error)
    return _answered(model, processor, scenes_asked, asking, batch_size) if asking.answers else scenes_asked


def _seeded(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Sequence[tuple[ImageRef, ...]],
    asking: Asking,
    batch_size: int,
) -> list[Asked]:
    """The scenes with their context: marks alone, or the request and the model's answer to it."""
    keys = ["+".join(image.name for image in images) for images in scenes]
    if asking.first_turn:
        contexts = [(Turn("user", "\n".join([IMAGE_MARK] * len(images))),) for images in scenes]
        return [Asked(*each) for each in zip(keys, scenes, contexts, strict=True)]
    requests = [
        ChatSample(key, images, (Turn("user", f"{IMAGE_MARK}\n" * len(images) + asking.request),))
        for key, images in zip(keys, scenes, strict=True)
    ]
    replies = answer(model, processor, requests, batch_size, asking.max_answer_tokens)
    return [
        Asked(
            sample.key, sample.images, (*sample.turns, Turn("assistant", reply.prediction)), (), reply.error
        )
        if reply.prediction or reply.error
        else Asked(sample.key, sample.images, error="the model describes the picture with no word")
        for sample, reply in zip(requests, replies, strict=True)
    ]


def _prompt(renderer: Renderer, asked: Asked) -> list[int]:
    sample = ChatSample(asked.key, asked.images, asked.context)
    return renderer.question_prompt(sample, [image_size(image) for image in asked.images])


def _seed(asking: Asking, scenes: Sequence[Asked], index: int) -> tuple[int, ...]:
    place, shot = divmod(index, asking.number)
    return asking.seed, int(digest("asked about", scenes[place].key), 16), shot


def _answered(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: list[Asked],
    asking: Asking,
    batch_size: int,
) -> list[Asked]:
    """The scenes with an answer to each distinct question, as in training after the questioner's turn."""
    samples = [
        ChatSample(each.key, each.images, (*each.context, Turn("questioner", question.text)))
        for each in scenes
        for question in each.distinct
    ]
    replies = iter(answer(model, processor, samples, batch_size, asking.max_answer_tokens))
    answered = []
    for each in scenes:
        texts = {question.text: next(replies).prediction for question in each.distinct}
        questions = tuple(replace(one, answer=texts.get(one.text, "")) for one in each.questions)
        answered.append(replace(each, questions=questions))
    return answered


# ---------------------------------------------------------------- what questions are like


@dataclass(frozen=True, slots=True)
class QuestionStatistics:
    """How a set of questions looks; shares from 0 to 1."""

    questions: int
    ended: float
    """Share that came to its end token."""
    question_marks: float
    """Share ending in `?`."""
    distinct_1: float
    """Different words over all words (distinct-n, arXiv 1510.03055)."""
    distinct_2: float

    def lines(self) -> list[str]:
        """What to print."""
        return [
            f"{self.questions:,} questions, {self.ended:.1%} ended, {self.question_marks:.1%} end in '?', "
            f"distinct-1 {self.distinct_1:.4f}, distinct-2 {self.distinct_2:.4f}"
        ]


def question_statistics(questions: Sequence[Question]) -> QuestionStatistics:
    """The statistics of questions drawn by a model, repeated ones included."""
    count = max(len(questions), 1)
    texts = [each.text for each in questions]
    return QuestionStatistics(
        len(questions),
        sum(each.ended for each in questions) / count,
        sum(text.endswith("?") for text in texts) / count,
        distinct(texts, 1),
        distinct(texts, 2),
    )


def distinct(texts: Sequence[str], size: int) -> float:
    """Different runs of `size` words over all of them (arXiv 1510.03055, section 5); 0 without any."""
    words = [text.lower().split() for text in texts]
    runs = Counter(tuple(row[start : start + size]) for row in words for start in range(len(row) - size + 1))
    return len(runs) / max(runs.total(), 1)
