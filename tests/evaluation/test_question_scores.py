"""Likelihoods against one sample at a time through the model's own loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.tiny import tiny_images, tiny_model
from tests.twins import tiny_mix
from vlmtune.cli import app
from vlmtune.data.images import image_size, open_image
from vlmtune.data.render import Renderer
from vlmtune.evaluation.question_scores import question_scores
from vlmtune.models.vision import token_counter
from vlmtune.types import IGNORE, ChatSample, ImageRef, Turn


def talks(folder: Path) -> list[ChatSample]:
    """Two pictures with two rounds each, one alone among those with two pictures, one without any."""
    images = [ImageRef(name, folder) for name in tiny_images(folder, 3)]
    made = []
    for number, given in enumerate((images[:1], images[1:2], images[1:3], [])):
        first = Turn("user", "<image>\n" * len(given) + "is there a circle?")
        turns = (
            first,
            Turn("assistant", "yes"),
            Turn("user", f"what color {number}?"),
            Turn("assistant", "red 1"),
        )
        made.append(ChatSample(f"t#{number}", tuple(given), turns))
    return made


@torch.no_grad()
def nll(model: Any, processor: Any, sample: ChatSample) -> tuple[float, int]:
    """Sum and count over the labels, by transformers' own mean loss."""
    renderer = Renderer(processor.tokenizer, token_counter(model.config), processor.chat_template)
    made = renderer.render(sample, [image_size(image) for image in sample.images])
    pixels = processor.image_processor([open_image(image) for image in sample.images], return_tensors="pt")
    labels = torch.tensor([made.labels])
    count = int((labels != IGNORE).sum())
    return model(input_ids=torch.tensor([made.input_ids]), labels=labels, **pixels).loss.item() * count, count


def asked(sample: ChatSample, images: tuple[ImageRef, ...] | None = None) -> ChatSample:
    """The sample's second question as the questioner's, alone learned."""
    first, answer, question, last = sample.turns
    muted = (
        replace(answer, supervised=False),
        Turn("questioner", question.text),
        replace(last, supervised=False),
    )
    return replace(sample, turns=(first, *muted), images=images or sample.images)


def mean(*pairs: tuple[float, int]) -> float:
    return sum(total for total, _ in pairs) / sum(count for _, count in pairs)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_are_those_of_one_sample_at_a_time(tmp_path: Path, batch_size: int):
    model, processor = tiny_model(template="brief")
    samples = talks(tmp_path)
    broken = replace(samples[0], images=(ImageRef("missing.png", tmp_path),))
    seen: list[tuple[int, int]] = []
    scores = question_scores(
        model, processor, [*samples, broken], False, batch_size, lambda *done: seen.append(done)
    )
    with_images = samples[:3]
    questions = [nll(model, processor, asked(sample)) for sample in with_images]
    assert scores.question_nll == pytest.approx(mean(*questions), abs=1e-5)
    assert scores.question_tokens == sum(count for _, count in questions)
    text_only = replace(samples[3], images=())
    answers = [nll(model, processor, sample) for sample in with_images]
    answers.append(text_nll(model, processor, text_only))
    assert scores.answer_nll == pytest.approx(mean(*answers), abs=1e-5)
    one, two = with_images[:2]
    crossed = [nll(model, processor, asked(one, two.images)), nll(model, processor, asked(two, one.images))]
    assert scores.shuffled_question_nll == pytest.approx(mean(*crossed), abs=1e-5)
    # the sample with two pictures has no counterpart: it is in neither side of the gap
    assert scores.shuffle_gap == pytest.approx(mean(*crossed) - mean(*questions[:2]), abs=1e-5)
    assert scores.errors == 1 and seen[-1] == (3 + 2 + 4, 9)
    assert not model.training


@torch.no_grad()
def text_nll(model: Any, processor: Any, sample: ChatSample) -> tuple[float, int]:
    renderer = Renderer(processor.tokenizer, token_counter(model.config), processor.chat_template)
    made = renderer.render(sample, [])
    labels = torch.tensor([made.labels])
    count = int((labels != IGNORE).sum())
    return model(input_ids=torch.tensor([made.input_ids]), labels=labels).loss.item() * count, count


def test_the_first_question_counts_when_asked_for(tmp_path: Path):
    model, processor = tiny_model(template="brief")
    samples = talks(tmp_path)[:2]
    later, both = (question_scores(model, processor, samples, first) for first in (False, True))
    assert both.question_tokens > later.question_tokens and both.answer_nll == later.answer_nll


def test_nothing_to_measure_is_none(tmp_path: Path):
    model, processor = tiny_model(template="brief")
    single = replace(talks(tmp_path)[0], turns=talks(tmp_path)[0].turns[:2])
    scores = question_scores(model, processor, [single])
    assert scores.question_nll is None and scores.shuffle_gap is None and scores.answer_nll is not None
    assert any(line.endswith(" -") for line in scores.lines())


def test_the_command_scores_the_questions_of_a_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vlmtune.run.CACHE", tmp_path / "cache")
    model, processor = tiny_model(template="brief")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    mix = tiny_mix(tmp_path)
    command = [
        "eval",
        str(tmp_path / "model"),
        "--mix",
        str(mix),
        "--questions",
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "image-shuffle gap" in result.output and (tmp_path / "out" / "questions.json").is_file()
