"""The loop: what it refuses, how it stops, and what it writes."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from accelerate import Accelerator

from tests.chat_batches import micro_batches
from tests.contracts.test_objectives import objective_and_samples
from tests.tiny import tiny_processor
from tests.training.setups import engine_of
from vlmtune.errors import CheckpointError, TrainingError
from vlmtune.training.checkpoint import restore_moments, save_step, step_folders


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def engine(accelerator, folder, micros=None, **changes):
    objective, samples = objective_and_samples("next_token")
    return engine_of(
        accelerator, objective, micros or micro_batches(samples, 2), folder, tiny_processor(), **changes
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_every_step_is_recorded(accelerator, tmp_path):
    report = engine(accelerator, tmp_path, schedule={"steps": 12}).fit()
    losses = [row["loss"] for row in rows(tmp_path)]
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    assert report.checkpoint == tmp_path / "step_000012" and not report.interrupted
    for key in ("grad_norm", "lr", "tokens_per_s", "samples_per_s", "padding", "memory_gb", "epoch"):
        assert key in rows(tmp_path)[0]


def test_the_objective_knows_how_far_the_stage_is(accelerator, tmp_path, monkeypatch):
    """A weight's schedule reads it; it follows from the step alone, so a resumed run sees the same."""
    objective, samples = objective_and_samples("next_token")
    running = engine_of(
        accelerator, objective, micro_batches(samples, 2), tmp_path, tiny_processor(), schedule={"steps": 4}
    )
    seen: list[float] = []
    counts = objective.counts
    monkeypatch.setattr(objective, "counts", lambda batch: seen.append(objective.progress) or counts(batch))
    running.fit()
    assert list(dict.fromkeys(seen)) == [0.0, 0.25, 0.5, 0.75]


def test_a_non_finite_loss_stops_before_the_step_and_names_the_samples(accelerator, tmp_path):
    """LLaVA#1231 #1278: loss NaN from step 2, training went on."""
    objective, samples = objective_and_samples("next_token")
    good, bad = micro_batches(samples, 2)
    bad.pixel_values.fill_(float("inf"))
    stopped = engine_of(accelerator, objective, [good, bad], tmp_path, tiny_processor())
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    with pytest.raises(TrainingError) as caught:
        stopped.fit()
    message = str(caught.value)
    assert "not finite" in message and "step 1" in message
    assert all(key in message for key in bad.keys) and not any(key in message for key in good.keys)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


def test_a_trainable_weight_without_gradient_is_an_error(accelerator, tmp_path):
    """LLaVA#1647, Qwen2-VL-Finetune#193: a part silently not trained."""
    objective, samples = objective_and_samples("next_token")
    objective.lonely = torch.nn.Linear(2, 2)
    broken = engine_of(accelerator, objective, micro_batches(samples, 2), tmp_path, tiny_processor())
    with pytest.raises(TrainingError, match="lonely"):
        broken.fit()


def test_text_only_steps_do_not_trip_the_gradient_proof(accelerator, tmp_path):
    objective, samples = objective_and_samples("next_token")
    micros = micro_batches(samples[::3], 1)
    tested = engine_of(accelerator, objective, micros, tmp_path, tiny_processor(), schedule={"steps": 2})
    tested.fit()
    assert not tested._probed  # still to be proven once an image comes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_reports_it(accelerator, tmp_path, number):
    running = engine(accelerator, tmp_path, schedule={"steps": 50})
    steps = running.setup.stream.steps

    def kill_at_three(start, stop):
        for index, micros in enumerate(steps(start, stop)):
            if index == 3:
                os.kill(os.getpid(), number)
            yield micros

    running.setup.stream.steps = kill_at_three
    before = signal.getsignal(number)
    report = running.fit()
    assert report.interrupted and report.steps == 4
    assert step_folders(tmp_path) == [tmp_path / "step_000004"]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("kind", ["next_token", "reconstruction"])
def test_a_rehearsal_changes_not_a_bit(accelerator, tmp_path, kind, monkeypatch):
    """trl#3481: out of memory late in the run. The heaviest micro-batches come first, and weigh nothing."""
    folders, learned = [tmp_path / "with", tmp_path / "without"], []
    for folder in folders:
        objective, samples = objective_and_samples(kind)
        run = {"precision": "fp32", "rehearse": folder.name == "with"}
        running = engine_of(
            accelerator,
            objective,
            micro_batches(samples, 2),
            folder,
            tiny_processor(),
            run=run,
            schedule={"steps": 3},
        )
        learn, seen = running.strategy.learn, []

        def counted(*args, learn=learn, seen=seen, **named):
            seen.append(0)
            return learn(*args, **named)

        monkeypatch.setattr(running.strategy, "learn", counted)
        running.fit()
        learned.append(len(seen))
    assert learned == [2 + 3 * 2, 3 * 2]
    ours, theirs = (folder / "step_000003" for folder in folders)
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()


def test_too_little_memory_is_said_before_the_first_step(accelerator, tmp_path, monkeypatch):
    running = engine(accelerator, tmp_path, run={"precision": "fp32", "rehearse": True})

    def learn(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(running.strategy, "learn", learn)
    with pytest.raises(TrainingError, match=r"heaviest micro-batch \(\d+ tokens, \d+ images\).*micro_tokens"):
        running.fit()


def test_rotation_keeps_the_newest_and_clears_torn_saves(accelerator, tmp_path):
    (tmp_path / "step_000001.partial").mkdir(parents=True)
    engine(
        accelerator, tmp_path, schedule={"steps": 7}, run={"precision": "fp32", "save_every": 2, "keep": 2}
    ).fit()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000006", "step_000007"]


def test_held_out_loss_by_dataset_is_the_mean_over_tokens(accelerator, tmp_path):
    objective, samples = objective_and_samples("next_token")
    running = engine_of(accelerator, objective, micro_batches(samples, 1), tmp_path, tiny_processor())
    running.setup.stream.held = {"a": micro_batches(samples[:4], 2), "b": micro_batches(samples[4:], 2)}
    running.setup.stream.held_out = lambda: running.setup.stream.held
    with torch.no_grad():
        (whole,) = micro_batches(samples[:4], 1)
        expected = objective(whole, objective.counts(whole)).loss.item()
        for _ in range(2):  # the second time, what was counted is known
            found = running._held_out_loss("a", running.setup.stream.held["a"])
            assert found == pytest.approx(expected, rel=1e-5)
    running.fit()
    assert set(next(row for row in rows(tmp_path) if "held_out" in row)["held_out"]) == {"a", "b"}


def test_optimizer_state_round_trips_without_pickle(accelerator, tmp_path):
    first = engine(accelerator, tmp_path, schedule={"steps": 3})
    first.fit()
    folder = tmp_path / "step_000003"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".jinja",
        ".md",
    }
    second = engine(accelerator, tmp_path / "other")
    restore_moments(folder, second.strategy)
    ours, theirs = (
        {key: piece.value for key, piece in each.strategy.moments().items()} for each in (first, second)
    )
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {key.partition(":")[0] for key in ours} == {"exp_avg", "exp_avg_sq", "step"}
    assert all(value == 3 for key, value in theirs.items() if key.startswith("step:"))


def test_a_checkpoint_of_another_tuning_is_refused(accelerator, tmp_path):
    """LLaVA#1200: resuming lost the projector's state without a word."""
    first = engine(accelerator, tmp_path, schedule={"steps": 1})
    first.fit()
    second = engine(accelerator, tmp_path / "other")
    for weight in second.setup.objective.model.model.multi_modal_projector.parameters():
        weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match="multi_modal_projector"):
        restore_moments(tmp_path / "step_000001", second.strategy)


def test_a_torn_save_is_never_a_checkpoint(accelerator, tmp_path, monkeypatch):
    running = engine(accelerator, tmp_path)
    monkeypatch.setattr(
        "vlmtune.training.checkpoint.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        save_step(tmp_path, 5, running.strategy, running.setup.processor, {"key": "k"})
    assert step_folders(tmp_path) == []
