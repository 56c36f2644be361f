"""Training speed and memory of vlmtune, transformers' Trainer and TRL's SFTTrainer on the same model and samples.

    python benchmarks/training_speed/run.py                 # full size: about 15 minutes on 2 quiet cores
    python benchmarks/training_speed/run.py --tiny          # seconds; the figures mean nothing

Every arm and repetition is a process of its own, one at a time, in the order A B C A B C. This file imports
nothing heavy: what it holds in memory would be in the children's peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from facts import commit, machine  # noqa: E402  (beside this folder, not installed)

OURS, PEERS = "vlmtune", ("trainer", "trl")
LOSS_TOLERANCE = 2e-3
"""Relative spread of the first step's loss between arms: bfloat16 sums in another order, and no more."""
FIGURES = (
    "samples_per_s",
    "useful_tokens_per_s",
    "seconds",
    "peak_memory_bytes",
    "peak_memory_above_model_bytes",
)

Runs = dict[str, list[dict[str, Any]]]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="vlmtune-bench-") as folder:
        workload = prepare(Path(folder), options)
        runs: Runs = {arm: [] for arm in options.arms}
        for repetition in range(options.repetitions):
            for arm in options.arms:
                runs[arm].append(run_arm(arm, Path(folder), options))
                print(f"{repetition + 1}/{options.repetitions} {line_of(arm, runs[arm][-1])}", flush=True)
    check(runs)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(options.threads, ("torch", "transformers", "accelerate", "trl", "datasets")),
        "settings": settings(workload, options),
        "arms": {arm: summary(each) for arm, each in runs.items()},
        "agreement": agreement(runs),
        **ratios(runs),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(*closing(report), f"written to {options.out}", sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=8, help="timed samples of a run, after a warm-up step of 8"
    )
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=(OURS, *PEERS), default=[OURS, *PEERS])
    parser.add_argument("--threads", type=int, default=2, help="of every process")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing, in all arms")
    parser.add_argument("--tiny", action="store_true", help="a miniature model and miniature samples")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training_speed.json")
    return parser.parse_args()


# ---------------------------------------------------------------- processes


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The workload's description, after a process of its own has written it."""
    size = ["--tiny"] if options.tiny else []
    call([HERE / "workload.py", folder, "--samples", options.samples, *size], options.threads)
    return json.loads((folder / "workload.json").read_text())


def run_arm(arm: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the meter read in one run, with the machine's load before it."""
    load, out = os.getloadavg()[0], folder / "result.json"
    flags = ["--checkpointing"] if options.checkpointing else []
    call([HERE / "arm.py", arm, folder, out, *flags], options.threads)
    return {"load_before": round(load, 2), **json.loads(out.read_text())}


def call(command: list[Any], threads: int) -> None:
    """Runs a script of this folder; SystemExit with its last words when it fails."""
    environment = os.environ | {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-4000:]}")


# ---------------------------------------------------------------- results


def check(runs: Runs) -> None:
    """SystemExit unless all runs supervised the same tokens and began with the same loss."""
    found = agreement(runs)
    if len(found["supervised_tokens"]) != 1 or len(found["first_step_supervised_tokens"]) != 1:
        raise SystemExit(f"the arms supervise different tokens: {found}")
    if found["first_step_loss_spread"] > LOSS_TOLERANCE:
        raise SystemExit(f"the arms begin with different losses: {found}")


def agreement(runs: Runs) -> dict[str, Any]:
    """The supervised tokens met (one number each if all agree) and the relative spread of the first loss."""
    every = [run for each in runs.values() for run in each]
    losses = [run["first_step_loss"] for run in every]
    counts = ("supervised_tokens", "first_step_supervised_tokens")
    return {
        **{name: sorted({run[name] for run in every}) for name in counts},
        "first_step_loss_spread": (max(losses) - min(losses)) / max(losses),
        "first_step_loss_tolerance": LOSS_TOLERANCE,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's runs, their medians, and the share of the time that each phase takes."""
    phases = {
        name: statistics.median(run["phases_seconds"][name] for run in runs)
        for name in runs[0]["phases_seconds"]
    }
    total = sum(phases.values())
    return {
        "runs": runs,
        "medians": {name: median(runs, name) for name in FIGURES},
        "time_per_sample_s": {name: seconds / runs[0]["samples"] for name, seconds in phases.items()},
        "time_share": {name: seconds / total for name, seconds in phases.items()},
    }


def median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def ratios(runs: Runs) -> dict[str, Any]:
    """vlmtune against the better of the peers, figure by figure, and against each."""

    def against(name: str, better: Callable[..., float]) -> tuple[float, dict[str, float]]:
        ours = median(runs[OURS], name)
        peers = {arm: median(runs[arm], name) for arm in PEERS if arm in runs}
        return ours / better(peers.values()), {arm: ours / value for arm, value in peers.items()}

    if OURS not in runs or not set(PEERS) & set(runs):
        return {}
    speed, speeds = against("samples_per_s", max)
    memory, memories = against("peak_memory_bytes", min)
    return {
        "ratio_samples_per_s": speed,
        "ratio_peak_memory": memory,
        "ratios": {"samples_per_s": speeds, "peak_memory": memories},
    }


def settings(workload: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What was run: sizes, samples, and what all arms have in common."""
    return {
        "tiny": options.tiny,
        "repetitions": options.repetitions,
        **workload["figures"],
        "activation_checkpointing": options.checkpointing,
        "precision": "bf16 autocast over float32 weights",
        "optimizer": "fused AdamW, constant rate, gradient norm clipped at 1",
        "trained": "projector and language model; the tower is frozen",
        "loader_workers": 0,
        **workload["scale"],
    }


def line_of(arm: str, figures: dict[str, Any]) -> str:
    """One arm's figures in a line."""
    return (
        f"{arm:<8} {figures['samples_per_s']:7.3f} samples/s  {figures['useful_tokens_per_s']:8.1f} useful tokens/s  "
        f"peak {figures['peak_memory_bytes'] / 2**30:6.2f} GiB  {figures['seconds']:6.1f} s"
    )


def closing(report: dict[str, Any]) -> Iterator[str]:
    """The summary for the terminal."""
    yield "medians"
    for arm, each in report["arms"].items():
        yield line_of(arm, each["medians"])
        yield "         " + "  ".join(f"{name} {share:.0%}" for name, share in each["time_share"].items())
    for name in ("ratio_samples_per_s", "ratio_peak_memory"):
        if name in report:
            yield f"{name} {report[name]:.2f}"


if __name__ == "__main__":
    main()
