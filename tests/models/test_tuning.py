"""Trainable means: asked for, and reached by the gradient."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from tests.tiny import PROJECTORS, TOWERS, tiny_model
from vlmtune.config.tuning import TuningConfig
from vlmtune.models.tuning import PartRow, apply_tuning, part_of, table
from vlmtune.models.vlm import VLM

FULL = TuningConfig.model_validate({"vision": {"mode": "full"}})


def probe(model: VLM, processor) -> None:
    """A backward pass through an image, as the engine does before step 1."""
    pixels = torch.randn(1, 3, 32, 32)
    text = processor.image_token * processor_count(processor) + "hello"
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    model(input_ids=ids, pixel_values=pixels, use_cache=False).logits.square().mean().backward()


def processor_count(processor) -> int:
    grid = (32 // processor.patch_size) ** 2 + processor.num_additional_image_tokens
    return grid - (processor.vision_feature_select_strategy == "default")


@pytest.mark.parametrize("feature_layer", [-1, -2, 1, 3])
@pytest.mark.parametrize("tower", TOWERS)
def test_trainable_means_reached_by_the_gradient(tower: str, feature_layer: int) -> None:
    """Weights behind the feature layer without gradient: DDP trains on unsynchronised gradients."""
    model, processor = tiny_model(tower)
    model.config.vision_feature_layer = feature_layer
    rows = apply_tuning(model, FULL)
    probe(model, processor)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (weight.grad is not None), name
    frozen = sum(w.numel() for w in model.model.vision_tower.parameters() if not w.requires_grad)
    assert rows[0].unreachable == frozen > 0


@pytest.mark.parametrize("tower", TOWERS)
def test_exactly_what_gets_no_gradient_is_frozen(tower: str) -> None:
    """Not one weight more: with everything trainable, those without gradient are those that are frozen."""
    model, processor = tiny_model(tower)
    probe(model, processor)
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    apply_tuning(model, FULL)
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == without


@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_projector_is_reached(projector: str) -> None:
    model, processor = tiny_model(projector=projector)
    apply_tuning(model, FULL)
    probe(model, processor)
    weights = [*model.model.multi_modal_projector.parameters()]
    assert all(w.requires_grad == (w.grad is not None) for w in weights) and any(
        w.requires_grad for w in weights
    )


def test_modes_and_rates_by_part() -> None:
    model, _ = tiny_model()
    tuning = TuningConfig.model_validate(
        {"projector": {"mode": "full", "lr": 1e-3, "weight_decay": 0.1}, "language": {"mode": "frozen"}}
    )
    rows = {row.part: row for row in apply_tuning(model, tuning)}
    trained = {part_of(name) for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"projector"}
    size = sum(weight.numel() for weight in model.model.multi_modal_projector.parameters())
    assert rows["projector"] == PartRow("projector", size, size, 0, "full", 1e-3, 0.1)
    assert (rows["language"].trainable, rows["language"].unreachable, rows["language"].lr) == (0, 0, None)
    assert apply_tuning(model, TuningConfig())[2].trainable == rows["language"].total


def test_a_tied_head_counts_once() -> None:
    untied, tied = (apply_tuning(tiny_model(tied=tied)[0], TuningConfig())[2] for tied in (False, True))
    model, _ = tiny_model()
    assert untied.total - tied.total == model.lm_head.weight.numel()


def test_rows_cover_the_model() -> None:
    model, _ = tiny_model()
    assert sum(row.total for row in apply_tuning(model, FULL)) == model.num_parameters()


def test_the_table_shows_every_part() -> None:
    model, _ = tiny_model()
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(apply_tuning(model, TuningConfig())))
    shown = capture.get()
    assert all(part in shown for part in ("vision", "projector", "language", "frozen", "full", "optim's"))


def test_an_unknown_parameter_has_no_part() -> None:
    with pytest.raises(AssertionError, match="belongs to no part"):
        part_of("model.visual.weight")
