"""Killed at any step and resumed, a run ends with the same bits and saw every sample once an epoch."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from tests.tiny import LANGUAGES, TOWERS
from tests.twins import tiny_mix

ROOT = Path(__file__).parents[2]
STEPS = 30


def recipe_file(folder: Path) -> Path:
    content = {
        "name": "resume",
        "model": {
            "vision": {"config": TOWERS["clip"]},
            "projector": {"type": "mlp2x"},
            "language": {"config": LANGUAGES["llama"], "tokenizer": {"vocab_size": 400}},
        },
        "tuning": {"vision": {"mode": "full"}},
        "data": {
            "chat": {
                "mix": str(tiny_mix(folder, 40)),
                "batch_size": 7,
                "max_length": 256,
                "micro_tokens": 512,
                "augment": {"shift": 2},
                "transforms": [{"type": "shuffle_turns"}],
            }
        },
        "optim": {"lr": 1e-3},
        "schedule": {"steps": STEPS},
        "run": {"precision": "fp32", "save_every": 4, "log_every": 1, "log_samples": True},
        "evaluation": {"held_out": {"fraction": 0.0}},
        "export": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(recipe: Path, folder: Path, run: str, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "vlmtune", "train", str(recipe), f"run.dir={folder / run}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, f"data.chat.workers={workers}"],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]


def rows(folder: Path) -> list[dict]:
    path = folder / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_at(process: subprocess.Popen, folder: Path, step: int, number: signal.Signals) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        if lines_written(folder) >= step:
            process.send_signal(number)
            break
        time.sleep(0.02)
    process.communicate(timeout=60)


def lines_written(folder: Path) -> int:
    path = folder / "samples.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    recipe = recipe_file(folder)
    finish(start(recipe, folder, "whole", 0))
    return folder, recipe


def test_sigkill_at_a_random_step_and_resume_is_bitwise_equal(reference):
    """ms-swift#4083, xtuner#991: a resume repeated data or took hours."""
    folder, recipe = reference
    step = random.SystemRandom().randint(5, STEPS - 4)
    process = start(recipe, folder, "killed", 1)
    kill_at(process, folder / "killed", step, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, f"was to be killed at step {step}"
    finish(start(recipe, folder, "killed", 0))  # another number of workers

    last = f"step_{STEPS:06d}"
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        whole, resumed = (load_file(folder / run / last / file) for run in ("whole", "killed"))
        assert set(whole) == set(resumed)
        different = [key for key in whole if whole[key].tobytes() != resumed[key].tobytes()]
        assert not different, f"killed at step {step}: {different[:3]}"
    seen, again = (
        [(row["step"], row["samples"]) for row in rows(folder / run)] for run in ("whole", "killed")
    )
    assert seen == again and [number for number, _ in seen] == list(range(1, STEPS + 1))


def test_every_sample_is_seen_once_an_epoch(reference):
    folder, _ = reference
    keys = [key for row in rows(folder / "whole")[:6] for key in row["samples"]]
    assert sorted(keys) == sorted(f"toy#{i}" for i in range(40))


def test_sigterm_saves_and_exits_0(reference):
    folder, recipe = reference
    process = start(recipe, folder, "stopped", 1)
    kill_at(process, folder / "stopped", 3, signal.SIGTERM)
    assert process.returncode == 0
    assert list((folder / "stopped").glob("step_*/manifest.json"))


def test_another_recipe_in_the_same_folder_is_refused(reference):
    folder, recipe = reference
    process = start(recipe, folder, "whole", 0)
    finish(process)  # done already: ends at once
    command = [
        sys.executable,
        "-m",
        "vlmtune",
        "train",
        str(recipe),
        f"run.dir={folder / 'whole'}",
        "optim.lr=1e-4",
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "--fresh" in done.stderr and "Traceback" not in done.stderr
