"""Adapters land where they are asked for, change nothing before step 1, and learn."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig

from tests.chat_batches import encoded_samples
from tests.models.adapted import FROZEN, adapted, answers, distance, shake, tuning
from tests.tiny import tiny_model, tiny_processor
from vlmtune.config.plugins import NextTokenConfig
from vlmtune.config.schema import OptimConfig
from vlmtune.data.collate import collate
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.adapters import adapt, inject, merge_in_place, merged_state
from vlmtune.models.tuning import apply_tuning, is_adapter, part_of
from vlmtune.models.vlm import VLM, VLMConfig
from vlmtune.objectives.next_token import NextToken
from vlmtune.training.engine import prove_gradients
from vlmtune.training.optim import build_optimizer

MODES = ["lora", "dora", "qlora"]
LANGUAGE_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TOWER_LAYERS = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def layers(model: VLM) -> dict[str, list[str]]:
    """The names of adapted layers by part."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        if ".lora_A." in name:
            found.setdefault(part_of(name), []).append(name.partition(".lora_A.")[0])
    return found


def batch_of(model: VLM):
    """Packed samples with no, one and two images."""
    return collate(encoded_samples(model.config.image_token_id, 16, 32, count=4), "isolated")


processor_once = cache(tiny_processor)


def next_token(model: VLM) -> NextToken:
    """The plain objective, around the model."""
    return NextToken(NextTokenConfig(), model, processor_once())


def proven(objective: NextToken) -> bool:
    """The engine's probe."""
    reached = {name for name, weight in objective.named_parameters() if weight.grad is not None}
    return prove_gradients(objective, reached)


def trained(model: VLM, config, steps: int, optim: str = "adamw") -> list[float]:
    """The losses of `steps` steps on one batch, through our objective and optimizer."""
    objective = next_token(model)
    optimizer = build_optimizer(
        objective.named_parameters(), config, OptimConfig.model_validate({"type": optim, "lr": 1e-2})
    )
    batch = batch_of(model)
    losses = []
    objective.train()
    for step in range(steps):
        torch.manual_seed(step)
        loss = objective(batch, objective.counts(batch)).loss
        loss.backward()
        assert proven(objective)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


# ---------------------------------------------------------------- where they land


def test_language_adapters_never_land_in_the_tower() -> None:
    """LLaVA#1647: the target `q_proj` also hit the vision tower."""
    model, _ = adapted(tuning(language={"mode": "lora", "rank": 4}))
    found = layers(model)
    assert set(found) == {"language"}
    assert {name.rpartition(".")[2] for name in found["language"]} == LANGUAGE_LAYERS
    assert len(found["language"]) == 2 * 7
    assert not any(name.startswith("lm_head") or "embed" in name for name in found["language"])
    learns = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learns == {name for name, _ in model.named_parameters() if is_adapter(name)}


def test_tower_adapters_stay_in_front_of_the_feature_layer() -> None:
    model, _ = adapted(tuning(vision={"mode": "lora", "rank": 4}))
    found = layers(model)
    assert set(found) == {"vision"}
    assert {name.rpartition(".")[2] for name in found["vision"]} == TOWER_LAYERS
    assert len(found["vision"]) == 2 * 6  # of three layers; features are those of the last but one


def test_a_named_layer_behind_the_feature_layer_has_frozen_adapters() -> None:
    config = tuning(vision={"mode": "lora", "rank": 4, "targets": ["encoder.layers.*"]})
    model, _ = adapted(config)
    rows = apply_tuning(model, config)
    weights = {name: weight for name, weight in model.named_parameters() if is_adapter(name)}
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    assert len(weights) == 3 * 6 * 2 and len(frozen) == 6 * 2
    assert all(".layers.2." in name for name in frozen)
    assert rows[0].unreachable == sum(weights[name].numel() for name in frozen)


@pytest.mark.parametrize("projector", ["mlp2x", "resampler", "clustering"])
def test_all_linear_layers_of_a_projector(projector: str) -> None:
    config = tuning(projector={"mode": "lora", "rank": 2})
    model, _ = adapted(config, projector=projector)
    linear = [
        name
        for name, layer in tiny_model(projector=projector)[0].model.multi_modal_projector.named_modules()
        if type(layer) is nn.Linear
    ]
    assert len(layers(model)["projector"]) == len(linear) >= 2


def test_rank_alpha_and_dropout_differ_by_part() -> None:
    model, _ = adapted(
        tuning(
            vision={"mode": "lora", "rank": 2, "alpha": 8, "dropout": 0.2},
            language={"mode": "dora", "rank": 6, "dropout": 0.0},
        )
    )
    tower = model.model.vision_tower.encoder.layers[0].self_attn.q_proj
    language = model.model.language_model.layers[0].self_attn.q_proj
    assert (tower.r["default"], tower.scaling["default"], tower.lora_dropout["default"].p) == (2, 4.0, 0.2)
    assert (language.r["default"], language.scaling["default"]) == (6, 2.0)
    assert isinstance(language.lora_dropout["default"], nn.Identity)
    assert "default" in language.lora_magnitude_vector and "default" not in tower.lora_magnitude_vector


def test_a_target_that_does_not_exist_is_an_error_with_the_nearest() -> None:
    config = tuning(language={"mode": "lora", "targets": ["layers.*.self_attn.query_proj"]})
    with pytest.raises(RecipeError, match=r"(?s)tuning.language.targets.*Did you mean 'layers.*_proj'"):
        adapted(config)


def test_embeddings_and_lm_head_are_no_targets() -> None:
    for name in ("embed_tokens", "lm_head"):
        with pytest.raises(RecipeError, match="no linear layer of language"):
            adapted(tuning(language={"mode": "lora", "targets": [name]}))


def test_a_model_of_unknown_origin_cannot_be_adapted() -> None:
    model = VLM(tiny_model()[0].config)
    with pytest.raises(CheckpointError, match="build_model"):
        adapt(model, tuning(language={"mode": "lora"}), 0)


def test_the_sizes_of_sq_llava() -> None:
    """SQ-LLaVA's adapters (released files): 288 tensors, 14,155,776 weights in the tower; 319,815,680 in Vicuna-7B.

    Features are those of the last but one layer: 276 of the 288 get a gradient.
    """
    with torch.device("meta"):
        sizes = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096}
        tower = CLIPVisionConfig(num_hidden_layers=24, num_attention_heads=16, **sizes)
        model = VLM(VLMConfig(vision_config=tower, text_config=LlamaConfig(intermediate_size=11008)))
        config = tuning(
            vision={"mode": "lora", "rank": 32, "alpha": 64, "dropout": 0.2, "targets": ["encoder.layers.*"]},
            language={"mode": "lora", "rank": 128, "alpha": 256},
        )
        inject(model, config, seed=0)
    apply_tuning(model, config)
    adapters = {name: weight for name, weight in model.named_parameters() if is_adapter(name)}
    vision = {name: weight for name, weight in adapters.items() if part_of(name) == "vision"}
    language = [weight for name, weight in adapters.items() if part_of(name) == "language"]
    assert len(vision) == 288 and sum(weight.numel() for weight in vision.values()) == 14_155_776
    assert sum(weight.requires_grad for weight in vision.values()) == 276
    assert len(language) == 448 and sum(weight.numel() for weight in language) == 319_815_680


# ---------------------------------------------------------------- what they compute


@pytest.mark.parametrize(("mode", "dtype"), [("lora", "float32"), ("dora", "float32"), ("dora", "bfloat16")])
def test_nothing_changes_before_the_first_step(mode: str, dtype: str) -> None:
    """DoRA's magnitudes, rounded to bfloat16, would change a bfloat16 model by half a percent."""
    model, processor = tiny_model()
    model.to(getattr(torch, dtype))
    before = answers(model, processor)
    config = tuning(vision={"mode": mode}, projector={"mode": mode}, language={"mode": mode})
    inject(model, config, 0)
    largest = max(float(each.abs().max()) for each in before)
    assert distance(answers(model, processor), before) <= (1e-6 if dtype == "float32" else 0.01 * largest)
    adapters = [weight for name, weight in model.named_parameters() if is_adapter(name)]
    assert all(weight.dtype == torch.float32 for weight in adapters)


def test_adapters_are_drawn_from_the_seed_alone() -> None:
    config = tuning(language={"mode": "lora"})
    torch.manual_seed(1)
    first, _ = adapted(config)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, _ = adapted(config)
    assert torch.equal(torch.get_rng_state(), state)
    ours, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_lora_is_the_low_rank_update_of_its_definition() -> None:
    """W x + alpha / rank B A x (arXiv 2106.09685, section 4.1)."""
    model, _ = adapted(tuning(language={"mode": "lora", "rank": 3, "alpha": 12}))
    shake(model)
    layer = model.model.language_model.layers[1].mlp.down_proj
    x = torch.randn(2, layer.in_features)
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + 12 / 3 * x @ low.T @ high.T
    torch.testing.assert_close(layer(x), expected)


def test_dora_is_magnitude_times_direction() -> None:
    """m (W + BA) / ||W + BA||, the norm along the inputs (arXiv 2402.09353, equation 5)."""
    model, _ = adapted(tuning(language={"mode": "dora", "rank": 3, "alpha": 6}))
    shake(model)
    layer = model.model.language_model.layers[0].self_attn.k_proj
    changed = layer.base_layer.weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    expected = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-5)


def test_qlora_keeps_the_language_model_in_four_bits_and_nothing_else() -> None:
    """A skip list of `vision_tower` skips nothing in bitsandbytes: names match from the start."""
    from bitsandbytes.nn import Linear4bit

    config = tuning(projector={"mode": "full"}, language={"mode": "qlora", "targets": ["*.q_proj"]})
    plain, processor = tiny_model()
    model, _ = adapted(config)
    quantized = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    assert len(quantized) == 14 and all(part_of(name) == "language" for name in quantized)
    assert all(layer.weight.dtype == torch.uint8 for layer in quantized.values())
    assert all(layer.weight.quant_state.nested for layer in quantized.values())
    assert len(layers(model)["language"]) == 2
    rows = {row.part: row for row in apply_tuning(model, config)}
    expected = sum(w.numel() for n, w in plain.named_parameters() if part_of(n) == "language")
    assert rows["language"].total - rows["language"].trainable == expected
    largest = max(float(each.abs().max()) for each in answers(plain, processor))
    assert 0 < distance(answers(model, processor), answers(plain, processor)) < 0.5 * largest


def test_evaluating_does_not_repack_four_bit_weights() -> None:
    """On CPUs with AVX512-BF16 bitsandbytes rounds them for good in the first forward without gradient."""
    model, processor = adapted(tuning(language={"mode": "qlora", "rank": 2}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = answers(model, processor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.train()
    batch = batch_of(model)
    next_token(model)(batch, {"tokens": 10}).loss.backward()
    assert distance(answers(model, processor), first) == 0.0


def test_without_bitsandbytes_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.models.adapters.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r'qlora needs bitsandbytes.*pip install "vlmtune\[quant\]"'):
        adapted(tuning(language={"mode": "qlora"}))
    with pytest.raises(RecipeError, match="adamw_8bit needs bitsandbytes"):
        build_optimizer([], tuning(), OptimConfig(type="adamw_8bit", lr=1.0))


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_and_only_what_is_tuned_moves(mode: str) -> None:
    config = tuning(
        vision={"mode": "lora", "rank": 2},
        projector={"mode": "full"},
        language={"mode": mode, "rank": 4, "dropout": 0.1},
    )
    model, _ = adapted(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = trained(model, config, 6)
    assert losses[-1] < 0.96 * losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_gradients_arrive_through_activation_checkpointing() -> None:
    """Qwen2-VL-Finetune#193: with frozen embeddings reentrant checkpointing leaves adapters without gradient."""
    config = tuning(vision={"mode": "lora"}, language={"mode": "lora"})
    gradients = []
    for checkpointing in (False, True):
        model, _ = adapted(config)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        objective = next_token(model).train()
        batch = batch_of(model)
        torch.manual_seed(0)
        objective(batch, objective.counts(batch)).loss.backward()
        assert proven(objective)
        gradients.append({n: w.grad for n, w in model.named_parameters() if w.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_no_grad_adapters_of_the_tower_exist_and_never_move() -> None:
    """SQ-LLaVA's tower runs without gradients (clip_encoder.py:46): its adapters are an exact no-op."""
    config = tuning(vision={"mode": "lora", "rank": 4, "no_grad": True}, projector={"mode": "full"})
    model, _ = adapted(config)
    plain, _ = tiny_model()
    rows = apply_tuning(model, config)
    assert len(layers(model)["vision"]) == 12 and rows[0].trainable == 0
    trained(model, config, 3)
    pixels = torch.randn(2, 3, 32, 32)
    ours, theirs = (
        each.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        for each in (model, plain)
    )
    assert torch.equal(ours, theirs)


def test_no_grad_is_for_the_tower_only() -> None:
    with pytest.raises(ValidationError, match="for the vision tower only"):
        tuning(language={"mode": "lora", "no_grad": True})


def test_every_trained_tensor_is_in_one_group_at_its_parts_rate() -> None:
    """SQ-LLaVA's rates: adapters of the language model 2e-4, projector and adapters of the tower 2e-5."""
    config = tuning(
        vision={"mode": "lora", "lr": 1e-5},
        projector={"mode": "full", "lr": 2e-5},
        language={"mode": "dora", "lr": 2e-4, "weight_decay": 0.1},
    )
    model, _ = adapted(config)
    objective = next_token(model)
    optimizer = build_optimizer(objective.named_parameters(), config, OptimConfig(lr=1.0))
    grouped = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {weight for weight in model.parameters() if weight.requires_grad}
    seen = {(group["part"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert seen == {
        ("vision", 1e-5, 0.0),
        ("projector", 2e-5, 0.0),
        ("language", 2e-4, 0.1),
        ("language", 2e-4, 0.0),  # magnitudes are vectors
    }


def test_eight_bit_adam_learns_with_a_quarter_of_the_memory() -> None:
    config = tuning(language={"mode": "full"})
    full, small = (adapted(config)[0] for _ in range(2))
    found, expected = trained(small, config, 4, "adamw_8bit"), trained(full, config, 4)
    assert found[-1] < 0.9 * found[0] and found[-1] == pytest.approx(expected[-1], rel=0.05)
    objective = next_token(small)
    optimizer = build_optimizer(
        objective.named_parameters(), config, OptimConfig.model_validate({"type": "adamw_8bit", "lr": 1e-3})
    )
    batch = batch_of(small)
    objective(batch, objective.counts(batch)).loss.backward()
    optimizer.step()
    large = [state for weight, state in optimizer.state.items() if weight.numel() >= 4096]
    assert large and all(state["state1"].dtype == state["state2"].dtype == torch.uint8 for state in large)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize(("mode", "tied"), [("lora", True), ("dora", False), ("qlora", False)])
def test_merged_weights_give_the_same_logits_under_the_bases_names(mode: str, tied: bool) -> None:
    """LLaVA#462 #1581, LlamaFactory#3725: the merged model is not my model."""
    config = tuning(
        vision={"mode": "dora", "rank": 3},
        projector={"mode": "lora", "rank": 3},
        language={"mode": mode, "rank": 4, "targets": ["*.q_proj", "*.down_proj"]},
    )
    model, processor = adapted(config, tied=tied)
    shake(model)
    expected = answers(model, processor)
    plain, _ = tiny_model(tied=tied)
    state = merged_state(model)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    assert distance(answers(plain, processor), expected) <= 1e-5
    merge_in_place(model)
    assert model.adaptation is None and model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_a_merge_in_bfloat16_rounds_once() -> None:
    model, _ = tiny_model()
    model.to(torch.bfloat16)
    config = tuning(language={"mode": "lora", "rank": 4})
    adapt(model, config, 0)
    shake(model)
    layer = model.model.language_model.layers[0].mlp.up_proj
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    expected = (layer.base_layer.weight.float() + update).bfloat16()
    assert torch.equal(merged_state(model)["model.language_model.layers.0.mlp.up_proj.weight"], expected)


def test_a_broken_adapter_is_not_merged() -> None:
    model, _ = adapted(tuning(language={"mode": "lora", "rank": 4}))
    model.model.language_model.layers[0].mlp.up_proj.lora_B["default"].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        merged_state(model)


def test_frozen_parts_take_no_adapters() -> None:
    model, _ = adapted(tuning(language={"mode": "full"}, vision=FROZEN))
    assert model.adaptation is None and not layers(model)
