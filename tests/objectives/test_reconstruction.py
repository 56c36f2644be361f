"""Ross's objective: routing, causality, parity at weight 0, masking, and draws that do not depend on the split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.chat_batches import encoded_samples, micro_batches
from tests.contracts.test_objectives import step, stir
from tests.tiny import IMAGE_SIZE, tiny_model
from tests.vaes import tiny_vae_folder
from vlmtune.config.plugins import NextTokenConfig, ReconstructionConfig
from vlmtune.config.tuning import Frozen, Full, TuningConfig
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.attention import use_attention
from vlmtune.models.tuning import apply_tuning
from vlmtune.models.vision import token_counter
from vlmtune.objectives import build_objective
from vlmtune.objectives.functional import rows_mean
from vlmtune.objectives.reconstruction import image_counts
from vlmtune.objectives.spine import hidden_states
from vlmtune.types import IGNORE, Encoded

SMALL = {"depth": 2, "width": 32, "heads": 4}


def config_of(**changes) -> ReconstructionConfig:
    base = {"type": "reconstruction", "target": {"type": "pixels"}, "denoiser": SMALL}
    return ReconstructionConfig.model_validate(base | changes)


def build(config, projector="mlp2x", stirred=True, **tuning):
    """The objective around a tiny model whose tower is frozen, as Ross has it."""
    model, processor = tiny_model(projector=projector)
    use_attention(model, "sdpa")
    apply_tuning(model, TuningConfig(**tuning))
    objective = build_objective(config, model, processor, 0)
    objective.train()
    if stirred:
        stir(objective)
    return objective


def samples_of(objective, count=8) -> list[Encoded]:
    model = objective.model
    per_image = token_counter(model.config).tokens
    return encoded_samples(model.config.image_token_id, per_image, IMAGE_SIZE, count)


def second_loss(objective, batch) -> torch.Tensor:
    rows = objective.rows(hidden_states(objective.model, batch), batch)
    return objective.losses(rows)[:, rows.counted]


# ---------------------------------------------------------------- the law


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory):
    return tiny_vae_folder(tmp_path_factory.mktemp("vae"))


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "vae"},
        {"as_written": True},
        {"method": "regress"},
        {"weight": 0.3, "denoiser": SMALL | {"profile": "additive"}, "draws": 2},
    ],
    ids=str,
)
def test_the_law_holds_for_both_terms(changes, vae_path):
    """Uneven micro-batches, text-only ones among them; packed and padded rows draw the same noise."""
    if changes.get("target") == "vae":
        changes = {"target": {"type": "vae", "path": vae_path}}
    objective = build(config_of(**changes))
    samples = samples_of(objective)
    whole, reference = step(objective, micro_batches(samples, 1))
    scale = torch.sqrt(sum((g**2).sum() for g in reference.values()))
    for count, packing in ((2, "isolated"), (4, "none"), (8, "isolated")):
        parts, grads = step(objective, micro_batches(samples, count, packing))
        assert parts == pytest.approx(whole, rel=1e-5)
        error = torch.sqrt(sum(((grads[key] - reference[key]) ** 2).sum() for key in reference))
        assert set(grads) == set(reference) and error / scale < 1e-5


def test_draws_change_with_sample_seed_and_place_and_with_nothing_else():
    objective = build(config_of())
    samples = samples_of(objective)
    (batch,) = micro_batches(samples, 1)
    names, _ = objective._names(batch)
    assert len(set(names)) == len(names) == len(batch.pixel_values)
    split = [name for part in micro_batches(samples, 3, "none") for name in objective._names(part)[0]]
    assert tuple(split) == names
    t, noise = objective.draw(names, torch.device("cpu"))
    assert t.shape == (4, len(names)) and noise.shape == (4, len(names), 16, 192)
    assert len(t.unique()) > 20 and abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    again = objective.draw(names[3:5], torch.device("cpu"))
    assert torch.equal(again[0], t[:, 3:5]) and torch.equal(again[1], noise[:, 3:5])
    later = objective._names(replace(batch, seeds=tuple(range(1, 9))))[0]
    assert not set(later) & set(names)


def test_draws_leave_the_global_generator_alone():
    objective = build(config_of())
    (batch,) = micro_batches(samples_of(objective), 1)
    before = torch.get_rng_state()
    objective(batch, objective.counts(batch))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_are_counted_per_sample_in_packed_and_padded_rows():
    objective = build(config_of(weight=0))
    image = objective.model.config.image_token_id
    for packing in ("isolated", "none"):
        (batch,) = micro_batches(samples_of(objective), 1, packing)
        assert image_counts(batch, image, 16) == [i % 3 for i in range(8)]


# ---------------------------------------------------------------- gradients


def with_text_around(objective, before, after) -> list[Encoded]:
    """One sample: `before`, an image, `after`."""
    image = torch.full((objective.per_image,), objective.model.config.image_token_id)
    ids = torch.cat([before, image, after])
    labels = torch.full_like(ids, IGNORE)
    labels[-len(after) :] = after
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))
    return [Encoded("one#0", ids, labels, pixels)]


def test_where_the_second_loss_reaches():
    """The projector, every layer, the final norm, the denoiser, tokens before the image: nothing else."""
    objective = build(config_of(), vision=Full(mode="full"))
    model = objective.model
    before, after = torch.arange(10, 16), torch.arange(30, 40)
    (batch,) = micro_batches(with_text_around(objective, before, after), 1)
    model.model.vision_tower.requires_grad_(False)
    second_loss(objective, batch).mean().backward()
    for name, weight in objective.named_parameters():
        reached = weight.grad is not None and weight.grad.abs().max() > 0
        outside = name.startswith(("model.lm_head", "model.model.vision_tower"))
        assert reached != outside, name
    rows = model.get_input_embeddings().weight.grad.abs().amax(1)
    assert (rows[before] > 0).all() and (rows[after] == 0).all()
    assert rows[model.config.image_token_id] == 0  # the projector's tokens stand there


def test_gradient_reaches_the_projector_through_a_frozen_language_model():
    """Stage 1: the language model is frozen and differentiated through."""
    objective = build(config_of(), language=Frozen(mode="frozen"))
    (batch,) = micro_batches(samples_of(objective), 1)
    second_loss(objective, batch).mean().backward()
    grads = {name: weight.grad for name, weight in objective.named_parameters() if weight.grad is not None}
    assert grads.keys() == {
        name
        for name, _ in objective.named_parameters()
        if "projector" in name or name.startswith("denoiser.")
    }
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_text_behind_the_image_changes_nothing_and_text_before_it_does():
    objective = build(config_of())
    before, after = torch.arange(10, 16), torch.arange(30, 40)

    def seen(front, back):
        (batch,) = micro_batches(with_text_around(objective, front, back), 1)
        with torch.no_grad():
            rows = objective.rows(hidden_states(objective.model, batch), batch)
            return rows.hidden, objective.losses(rows)

    hidden, loss = seen(before, after)
    same_hidden, same_loss = seen(before, after.flip(0))
    assert (hidden - same_hidden).abs().max() == 0 and (loss - same_loss).abs().max() == 0
    other_hidden, other_loss = seen(before.flip(0), after)
    assert (hidden - other_hidden).abs().max() > 0 and (loss - other_loss).abs().max() > 0


@pytest.mark.parametrize("changes", [{}, {"denoiser": SMALL | {"profile": "additive"}}])
def test_a_fresh_denoiser_has_gradients_everywhere_if_only_zeros(changes):
    """The engine's probe asks for a gradient of every trained weight, on a text-only first step too."""
    objective = build(config_of(**changes), stirred=False)
    samples = samples_of(objective)
    for chosen in (samples, samples[::3]):  # every third has no image
        objective.zero_grad()
        (batch,) = micro_batches(chosen, 1)
        output = objective(batch, objective.counts(batch))
        output.loss.backward()
        grads = [weight.grad for weight in objective.denoiser.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert output.terms["reconstruction"] == 0 and all(grad.abs().max() == 0 for grad in grads)


def test_the_first_loss_is_about_one():
    objective = build(config_of(), stirred=False)
    (batch,) = micro_batches(samples_of(objective), 1)
    output = objective(batch, objective.counts(batch))
    assert output.terms["reconstruction"].item() == pytest.approx(1.0, abs=0.02)


# ---------------------------------------------------------------- masking


@pytest.mark.parametrize(("as_written", "expected"), [(True, 0.75 * 4 / (4 + 1e-6)), (False, 0.6)])
def test_a_mixed_batch_intended_and_as_written(as_written, expected):
    """Row losses 0.1 j in tiling order, sample 0 the only image of four."""
    losses = (0.1 * torch.arange(16.0)).view(4, 4)
    totals = {"images": 1, "rows": 4}
    counted = torch.tensor([True, as_written, as_written, as_written])
    found = rows_mean(losses, counted, totals, as_written)
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("as_written", [True, False])
def test_an_all_text_batch_is_exactly_nothing(as_written):
    objective = build(config_of(as_written=as_written))
    (batch,) = micro_batches(samples_of(objective)[::3], 1)
    totals = objective.counts(batch)
    assert totals["images"] == 0 and totals.get("rows", 3) == 3
    output = objective(batch, totals)
    assert output.terms["reconstruction"].item() == 0.0
    output.loss.backward()
    assert all(weight.grad.abs().max() == 0 for weight in objective.denoiser.parameters())


def test_text_only_samples_count_as_written_and_not_as_intended():
    samples = samples_of(build(config_of(weight=0)))
    found = {}
    for as_written in (True, False):
        objective = build(config_of(as_written=as_written))
        (mixed,), (alone,) = (
            micro_batches(samples, 1),
            micro_batches([s for i, s in enumerate(samples) if i % 3], 1),
        )
        found[as_written] = [
            objective(batch, objective.counts(batch)).terms["reconstruction"].item()
            for batch in (mixed, alone)
        ]
    assert found[False][0] == pytest.approx(found[False][1], rel=1e-6)
    assert found[True][0] != pytest.approx(found[True][1], rel=1e-4)
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-5)


# ---------------------------------------------------------------- parity


def one_step(config):
    """Loss, gradients and weights around one AdamW step over three micro-batches."""
    objective = build(config)
    samples = samples_of(objective)
    optimizer = torch.optim.AdamW([w for w in objective.parameters() if w.requires_grad], lr=1e-3)
    loss, grads = step(objective, micro_batches(samples, 3))
    optimizer.step()
    model = {
        name: weight.detach() for name, weight in objective.named_parameters() if name.startswith("model.")
    }
    return loss, {name: grad for name, grad in grads.items() if name in model}, model


def test_weight_zero_is_next_token():
    loss, grads, weights = one_step(config_of(weight=0))
    expected, expected_grads, expected_weights = one_step(NextTokenConfig())
    assert loss == pytest.approx(expected, rel=1e-6)
    assert grads.keys() == expected_grads.keys() and weights.keys() == expected_weights.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-6)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-6)


def test_weight_zero_has_neither_denoiser_nor_target():
    """So a control run needs no VAE on disk."""
    objective = build(config_of(weight=0, target={"type": "vae", "path": "nowhere"}))
    assert objective.state_dict().keys() == {f"model.{name}" for name in objective.model.state_dict()}


@pytest.mark.parametrize(
    ("kind", "factors"), [("linear", (2.0, 1.75, 1.25, 1.0)), ("cosine", (2.0, 1.853553, 1.146447, 1.0))]
)
def test_the_weight_follows_its_schedule(kind, factors):
    """Of a start of 2 and an end of 1, by the share of the stage that is done."""
    schedule = {"type": kind, "start": 2.0, "end": 1.0}
    objective, constant = build(config_of(weight=0.5, weight_schedule=schedule)), build(config_of(weight=0.5))
    (batch,) = micro_batches(samples_of(objective), 1)
    totals = objective.counts(batch)
    once = {name: term.item() for name, term in constant(batch, totals).terms.items()}
    for progress, factor in zip((0.0, 0.25, 0.75, 1.0), factors, strict=True):
        objective.progress = constant.progress = progress
        terms = objective(batch, totals).terms
        assert constant.weight() == 0.5
        assert terms["reconstruction"].item() == pytest.approx(factor * once["reconstruction"], rel=1e-5)
        assert terms["next_token"].item() == pytest.approx(once["next_token"], rel=1e-6)


def test_a_vanishing_weight_comes_close_to_next_token():
    """The term is added, and nothing else about the first one changes."""
    _, grads, _ = one_step(config_of(weight=1e-9))
    _, expected, _ = one_step(NextTokenConfig())
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-6)


def test_in_eval_mode_only_the_first_term_is_computed():
    objective = build(config_of())
    (batch,) = micro_batches(samples_of(objective), 1)
    objective.eval()
    objective.target = objective.denoiser.forward = None  # a call would fail
    output = objective(batch, objective.counts(batch))
    reference = build(NextTokenConfig())
    reference.eval()
    assert output.terms.keys() == {"next_token"}
    assert torch.equal(output.loss, reference(batch, reference.counts(batch)).loss)


def test_the_vae_is_outside_the_saved_tree(vae_path):
    objective = build(config_of(target={"type": "vae", "path": vae_path}))
    objective.train()
    assert not objective.target.vae.training
    named = {name for name, _ in objective.named_parameters()}
    assert all(name.startswith(("model.", "denoiser.")) for name in named)
    assert {name for name in objective.state_dict() if not name.startswith("model.")} == {
        name for name in named if name.startswith("denoiser.")
    }


# ---------------------------------------------------------------- starting


def test_a_denoiser_goes_on_from_an_earlier_run(tmp_path):
    from safetensors.torch import save_file

    first = build(config_of())
    own = {name: value for name, value in first.state_dict().items() if not name.startswith("model.")}
    for run_step in ("step_000002", "step_000010"):
        (tmp_path / run_step).mkdir()
        scaled = {name: value * (2 if run_step.endswith("2") else 1) for name, value in own.items()}
        save_file(scaled, tmp_path / run_step / "objective.safetensors")
    for path in (tmp_path, tmp_path / "step_000010"):
        second = build(config_of(weights=str(path)), stirred=False)
        assert all(torch.equal(second.state_dict()[name], value) for name, value in own.items())
    with pytest.raises(CheckpointError, match="another one"):
        build(config_of(weights=str(tmp_path), denoiser=SMALL | {"depth": 1}))
    with pytest.raises(CheckpointError, match="an export holds the model alone"):
        build(config_of(weights=str(tmp_path / "export")))


def test_fresh_weights_come_from_the_seed():
    model, processor = tiny_model()
    found = []
    for seed in (0, 0, 1):
        torch.randn(3)  # the global generator does not matter
        found.append(build_objective(config_of(), model, processor, seed).denoiser.embed.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_projector_without_a_grid_is_refused():
    with pytest.raises(RecipeError, match="5 tokens"):
        build(config_of(), projector="resampler")


def test_a_projector_that_merges_patches_has_a_smaller_grid():
    objective = build(config_of(), projector="pixel_shuffle")
    assert objective.target.grid == 2 and objective.target.channels == 3 * 16**2
    (batch,) = micro_batches(samples_of(objective), 1)
    assert second_loss(objective, batch).shape == (4, len(batch.pixel_values))
