"""The speed benchmark runs in all its arms and compares like with like. No figure of time is asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.opened import opened

FOLDER = Path(__file__).parents[2] / "benchmarks" / "training_speed"
ARMS = ["vlmtune", "trainer", *(["trl"] if importlib.util.find_spec("trl") else [])]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return opened("training_speed", "run.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the command writes at its miniature size."""
    out = tmp_path_factory.mktemp("bench") / "speed.json"
    options = ["--tiny", "--samples", "8", "--repetitions", "1", "--out", str(out), "--arms", *ARMS]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.timeout(600)
def test_every_arm_trains_on_the_same_supervised_tokens_from_the_same_loss(report):
    assert set(report["arms"]) == set(ARMS)
    agreement = report["agreement"]
    assert len(agreement["supervised_tokens"]) == len(agreement["first_step_supervised_tokens"]) == 1
    assert agreement["supervised_tokens"][0] > 0
    assert agreement["first_step_loss_spread"] < 1e-3
    first, second = report["arms"]["vlmtune"]["runs"][0]["losses"]
    assert first != second


@pytest.mark.timeout(600)
def test_the_peers_compute_padding_and_vlmtune_none(report):
    runs = {arm: each["runs"][0] for arm, each in report["arms"].items()}
    useful = {run["useful_tokens"] for run in runs.values()}
    assert useful == {runs["vlmtune"]["computed_tokens"]}
    assert all(runs[arm]["computed_tokens"] > runs["vlmtune"]["computed_tokens"] for arm in ARMS[1:])


@pytest.mark.timeout(600)
def test_the_phases_of_a_run_add_up_to_its_seconds(report):
    for each in report["arms"].values():
        run = each["runs"][0]
        assert sum(run["phases_seconds"].values()) == pytest.approx(run["seconds"])
        assert all(run["phases_seconds"][name] > 0 for name in ("language", "head_and_loss", "optimizer"))
        assert run["peak_memory_bytes"] > run["memory_with_model_bytes"] > 0


def _run(speed: float, memory: int, tokens: int = 5, loss: float = 2.0) -> dict:
    counts = {"supervised_tokens": tokens, "first_step_supervised_tokens": tokens, "first_step_loss": loss}
    return {"samples_per_s": speed, "peak_memory_bytes": memory, **counts}


def test_each_ratio_is_against_the_better_peer(bench):
    runs = {"vlmtune": [_run(6, 3)], "trainer": [_run(3, 12)], "trl": [_run(2, 4)]}
    ratios = bench.ratios(runs)
    assert ratios["ratio_samples_per_s"] == 2  # the trainer is the faster one
    assert ratios["ratio_peak_memory"] == 0.75  # TRL is the leaner one


@pytest.mark.parametrize("other", [_run(1, 1, tokens=6), _run(1, 1, loss=2.1)])
def test_arms_that_do_other_work_are_not_compared(bench, other):
    bench.check({"vlmtune": [_run(1, 1)], "trainer": [_run(1, 1)]})
    with pytest.raises(SystemExit, match="arms"):
        bench.check({"vlmtune": [_run(1, 1)], "trainer": [other]})
