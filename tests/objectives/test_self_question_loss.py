"""One cross entropy over answers and questions together: check 5 of SQ-LLaVA's specification."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.llama_pieces import llama_pieces
from vlmtune.config.plugins import SelfQuestionConfig
from vlmtune.data.render import Renderer, template_text
from vlmtune.data.transforms import self_question
from vlmtune.models.vision import ImageTokens
from vlmtune.objectives.functional import linear_cross_entropy, next_token_targets
from vlmtune.types import IGNORE, ChatSample, ImageRef, Size, Turn

VOCABULARY, WIDTH = 32_000, 8


def example(role: str = "both") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of the worked example with its second turn asked; of all learned turns or those of a role."""
    turns = (
        Turn("user", "<image>\nWhat animal is this?"),
        Turn("assistant", "A dog."),
        Turn("user", "What color is it?"),
        Turn("assistant", "Brown."),
    )
    config = SelfQuestionConfig(type="self_question", probability=1.0)
    sample = self_question(ChatSample("s#0", (ImageRef("x.png"),), turns), config, np.random.default_rng(0))
    if role != "both":
        kept = tuple(replace(turn, supervised=turn.role == role) for turn in sample.turns)
        sample = replace(sample, turns=kept)
    renderer = Renderer(llama_pieces("legacy"), ImageTokens(576), template_text("vicuna_v1_sq"))
    made = renderer.render(sample, [Size(8, 8)])
    return torch.tensor([made.input_ids]), torch.tensor([made.labels])


def loss_of(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    states, targets = next_token_targets(hidden, labels)
    return linear_cross_entropy(states, weight, targets, 4) / len(targets)


def test_check_5_constant_logits_give_the_log_of_the_vocabulary():
    ids, labels = example()
    hidden = torch.zeros(1, ids.shape[1], WIDTH)
    loss = loss_of(hidden, torch.randn(VOCABULARY, WIDTH), labels)
    assert loss.item() == pytest.approx(10.373491, abs=2e-6) == pytest.approx(math.log(32_000), abs=2e-6)


def test_check_5_seven_answer_and_six_question_tokens():
    ids, labels = example()
    hidden = torch.randn(1, ids.shape[1], WIDTH, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(600, WIDTH, generator=torch.Generator().manual_seed(1))
    means = {}
    for role, count in (("assistant", 7), ("questioner", 6)):
        own = example(role)[1]
        places = (own[0, 1:] != IGNORE).nonzero()[:, 0]
        assert len(places) == count
        means[role] = F.cross_entropy(hidden[0, places] @ weight.T, own[0, 1:][places]).item()
    both = loss_of(hidden, weight, labels).item()
    assert both == pytest.approx((7 * means["assistant"] + 6 * means["questioner"]) / 13, abs=1e-6)
    assert abs(both - means["assistant"]) > 1e-3


def test_check_5_the_gradient_stands_one_before_each_of_the_thirteen_labels():
    ids, labels = example()
    hidden = torch.randn(1, ids.shape[1], WIDTH, requires_grad=True)
    loss_of(hidden, torch.randn(600, WIDTH), labels).backward()
    touched = hidden.grad.abs().sum(-1)[0].nonzero()[:, 0]
    assert len(touched) == 13
    assert (touched + 1).tolist() == (labels[0] != IGNORE).nonzero()[:, 0].tolist()
