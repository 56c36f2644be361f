"""SQ-LLaVA as its recipes train it: checks 9 to 12 of the specification, on models of a few thousand weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from vlmtune.config.loader import load_recipe
from vlmtune.config.plugins import NextTokenConfig, SelfQuestionConfig
from vlmtune.config.schema import ModelConfig, OptimConfig, Recipe
from vlmtune.config.tuning import TuningConfig
from vlmtune.data.collate import collate
from vlmtune.data.images import open_image
from vlmtune.data.render import Renderer, template_text
from vlmtune.data.transforms import self_question
from vlmtune.evaluation.asking import Asking, ask
from vlmtune.evaluation.question_scores import QuestionScores, question_scores
from vlmtune.models.adapters import adapt
from vlmtune.models.attention import use_attention
from vlmtune.models.build import build_model
from vlmtune.models.tuning import apply_tuning, is_adapter
from vlmtune.models.vision import token_counter
from vlmtune.objectives.next_token import NextToken
from vlmtune.training.optim import build_optimizer, lr_factor, set_lr
from vlmtune.types import ChatBatch, ChatSample, Encoded, ImageRef, Size, Turn

RECIPES = Path(__file__).parents[2] / "recipes" / "sq_llava"
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "yellow": (230, 220, 30),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "purple": (150, 30, 170),
    "orange": (250, 140, 10),
}


@cache
def recipe(name: str = "finetune_7b") -> Recipe:
    (only,) = load_recipe(RECIPES / f"{name}.yaml")
    return only


# ---------------------------------------------------------------- data and models


def talks(folder: Path, seed: int) -> list[ChatSample]:
    """Eight pictures of one colour each (with noise of `seed`); the later questions need to see it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    samples = []
    for color, rgb in COLORS.items():
        pixels = np.clip(np.array(rgb) + rng.normal(0, 12, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{color}.png")
        rounds = (("what is this?", "a picture"), (f"is it {color}?", "yes"), (f"how {color}?", "very"))
        turns = [turn for q, a in rounds for turn in (Turn("user", q), Turn("assistant", a))]
        turns[0] = Turn("user", f"<image>\n{turns[0].text}")
        samples.append(ChatSample(f"s#{color}", (ImageRef(f"{color}.png", folder),), tuple(turns)))
    return samples


def made(tower: dict[str, Any] | None = None, texts: tuple[str, ...] = tiny.TEXTS) -> Any:
    config = ModelConfig.model_validate(
        {
            "vision": {"config": tower or tiny.TOWERS["clip"]},
            "projector": {"type": "mlp2x"},
            "language": {"config": tiny.LANGUAGES["llama"], "tokenizer": {"vocab_size": 400}},
        }
    )
    model, processor = build_model(config, 0, template_text("brief"), lambda: texts)
    use_attention(model, "sdpa")
    return model, processor


def batch_of(model: Any, processor: Any, samples: list[ChatSample]) -> ChatBatch:
    renderer = Renderer(processor.tokenizer, token_counter(model.config), processor.chat_template)
    rows = []
    for sample in samples:
        rendered = renderer.render(sample, [Size(32, 32)])
        pixels = processor.image_processor([open_image(sample.images[0])], return_tensors="pt")[
            "pixel_values"
        ]
        ids, labels = torch.tensor(rendered.input_ids), torch.tensor(rendered.labels)
        rows.append(Encoded(sample.key, ids, labels, pixels))
    return collate(rows, "isolated")


def loss_of(model: Any, processor: Any, batch: ChatBatch) -> torch.Tensor:
    objective = NextToken(NextTokenConfig(), model, processor)
    return objective(batch, objective.counts(batch)).loss


def adapted(tuning: TuningConfig, blocks: int = 24) -> Any:
    """A model with as many blocks in its tower as CLIP-L, eight wide, and the adapters of `tuning`."""
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": blocks}
    model, processor = made(tiny.TOWERS["clip"] | small)
    adapt(model, tuning, 0)
    apply_tuning(model, tuning)
    return model, processor


def with_vision(**options: Any) -> TuningConfig:
    """The recipe's tuning, the tower's adapters changed; on all blocks, as released."""
    tuning = recipe().tuning
    vision = tuning.vision.model_copy(update={"targets": ("encoder.layers.*",), **options})
    return tuning.model_copy(update={"vision": vision})


# ---------------------------------------------------------------- checks 9 to 11


def test_check_9_the_towers_adapters_learn_but_for_the_last_block(tmp_path: Path):
    model, processor = adapted(with_vision())
    loss_of(model, processor, batch_of(model, processor, talks(tmp_path, 0)[:2])).backward()
    tensors = {name: w for name, w in model.model.vision_tower.named_parameters() if is_adapter(name)}
    without = [name for name, weight in tensors.items() if weight.grad is None]
    assert len(tensors) == 288 and len(without) == 12
    assert all(name.startswith("encoder.layers.23.") for name in without)
    assert recipe().tuning.vision.rank == 32 and recipe("finetune_13b").tuning.vision.rank == 64


@pytest.mark.parametrize("no_grad", [True, False])
def test_check_9_the_release_never_moved_its_tower(tmp_path: Path, no_grad: bool):
    """Its forward runs without gradients: B stays zero, so features stay what they were, bit for bit."""
    model, processor = adapted(with_vision(no_grad=no_grad), blocks=3)
    batch = batch_of(model, processor, talks(tmp_path, 0)[:2])
    before = model.eval().get_image_features(batch.pixel_values).pooler_output[0].clone()
    optimizer = build_optimizer(named(model), recipe().tuning, OptimConfig(lr=1e-2))
    model.train()
    for _ in range(3):
        loss_of(model, processor, batch).backward()
        optimizer.step()
    tower = [weight for name, weight in model.model.vision_tower.named_parameters() if is_adapter(name)]
    after = model.eval().get_image_features(batch.pixel_values).pooler_output[0]
    if no_grad:
        assert len(tower) == 36 and not any(weight.grad is not None for weight in tower)
        before_projector = features(model, batch)
        assert torch.equal(before_projector, features(without_adapters(model), batch))
    else:
        assert sum(weight.grad is not None for weight in tower) == 24
        assert not torch.equal(features(model, batch), features(without_adapters(model), batch))
    assert not torch.equal(before, after)  # the projector learns in both


def named(model: Any) -> list[tuple[str, Any]]:
    """The parameters as an objective names them."""
    return [(f"model.{name}", weight) for name, weight in model.named_parameters()]


@torch.no_grad()
def features(model: Any, batch: ChatBatch) -> torch.Tensor:
    """Patch features of the tower."""
    return model.model.vision_tower(batch.pixel_values, output_hidden_states=True).hidden_states[-2]


def without_adapters(model: Any) -> Any:
    with torch.no_grad():
        for name, weight in model.model.vision_tower.named_parameters():
            if ".lora_B." in name:
                weight.zero_()
    return model


def test_check_10_the_base_does_not_move(tmp_path: Path):
    model, processor = adapted(recipe().tuning, blocks=3)
    projector = "model.multi_modal_projector."
    base = {
        name: weight
        for name, weight in model.named_parameters()
        if not is_adapter(name) and projector not in name
    }
    assert not any(weight.requires_grad for weight in base.values())
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = build_optimizer(named(model), recipe().tuning, OptimConfig(lr=1e-2))
    loss_of(model, processor, batch_of(model, processor, talks(tmp_path, 0)[:2])).backward()
    optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and not moved & base.keys()
    assert any(name.startswith("model.language_model.") and is_adapter(name) for name in moved)
    assert any(name.startswith(projector) for name in moved)


def test_check_11_each_part_has_its_own_rate():
    model, _ = adapted(recipe().tuning, blocks=3)
    optimizer = build_optimizer(named(model), recipe().tuning, recipe().optim)
    total, warm = 1000, 30
    set_lr(optimizer, lr_factor(warm, total, recipe().schedule))
    rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"vision": 2e-5, "projector": 2e-5, "language": 2e-4})
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    grouped = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    trained = [id(weight) for weight in model.parameters() if weight.requires_grad]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trained)


def test_the_control_differs_in_the_probability_only():
    control, ours = (recipe(name).model_dump() for name in ("finetune_7b_control", "finetune_7b"))
    assert control["data"]["chat"]["transforms"][0].pop("probability") == 0.0
    assert ours["data"]["chat"]["transforms"][0].pop("probability") == 0.5
    for each in (control, ours):
        del each["name"], each["paper"]
    assert control == ours


# ---------------------------------------------------------------- check 12

STEPS = 110


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Any]:
    """Models trained on eight pictures with three rounds each, by probability; equal but for it."""
    folder = tmp_path_factory.mktemp("pictures")
    samples = talks(folder, 0)
    models = {}
    for probability in (0.5, 0.0):
        model, processor = made(texts=tuple(turn.text for sample in samples for turn in sample.turns))
        apply_tuning(model, TuningConfig.model_validate({"vision": {"mode": "full"}}))
        optimizer = torch.optim.AdamW(
            [weight for weight in model.parameters() if weight.requires_grad], lr=3e-3
        )
        config = SelfQuestionConfig(type="self_question", probability=probability)
        model.train()
        for step in range(STEPS):
            rng = np.random.default_rng(step)
            batch = batch_of(model, processor, [self_question(sample, config, rng) for sample in samples])
            loss = loss_of(model, processor, batch)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (step + 1) / 10, 2 * (1 - step / STEPS))
            optimizer.step()
        models[probability] = (model.eval(), processor)
    return models


def scores(trained: dict[float, Any], probability: float, folder: Path) -> QuestionScores:
    return question_scores(*trained[probability], talks(folder, seed=1))


def test_check_12_it_asks_a_question_of_its_picture_and_ends(trained: dict[float, Any], tmp_path: Path):
    held_out = talks(tmp_path, seed=1)  # the same colours with other noise
    asking = Asking(
        3, request="what is this?", temperature=0.3, max_new_tokens=20, max_answer_tokens=8, answers=True
    )
    asked = ask(*trained[0.5], [sample.images for sample in held_out], asking)
    for color, each in zip(COLORS, asked, strict=True):
        assert each.context[-1].text == "a picture"
        assert all(question.ended for question in each.questions)
        assert {question.text for question in each.questions} <= {f"is it {color}?", f"how {color}?"}
        assert {question.answer for question in each.questions} <= {"yes", "very"}
    assert len({question.text for each in asked for question in each.questions}) >= 8


def test_check_12_the_right_picture_makes_its_question_likelier(trained: dict[float, Any], tmp_path: Path):
    found = scores(trained, 0.5, tmp_path)
    assert found.question_nll < 1.0 and found.shuffle_gap > 0.5


def test_check_12_without_questions_it_answers_as_well_and_asks_worse(
    trained: dict[float, Any], tmp_path: Path
):
    control, ours = scores(trained, 0.0, tmp_path / "a"), scores(trained, 0.5, tmp_path / "b")
    assert control.question_nll > ours.question_nll + 1.0
    assert abs(control.answer_nll - ours.answer_nll) < 0.05
