"""Every launch file on two gloo processes: the losses of one process, killed, resumed, and the same export."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distributed.launch import compile_operator, launched, search_path
from tests.distributed.strategy_worker import ADAPTED, KILLED_AFTER
from tests.tiny import LANGUAGES, TOWERS
from tests.twins import tiny_mix
from vlmtune.config.loader import load_recipe
from vlmtune.run import run
from vlmtune.training.checkpoint import Moments

STEPS, SAVED = 10, 5
LIMIT = 400
"""Seconds for a launch; 20 to 40 when nothing else runs on two cores."""
EXPECTED = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel", "AdamW", "DDP"),
    "fsdp2": ("FSDP", "FSDPAutocasting", "AdamW", "FSDP2"),
    "zero1": ("DEEPSPEED", "DeepSpeedEngine", "AdamW", "ZeRO-1"),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine", "AdamW", "ZeRO-2"),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine", "AdamW", "ZeRO-3"),
    "zero3_offload": ("DEEPSPEED", "DeepSpeedEngine", "DeepSpeedCPUAdam", "ZeRO-3, optimizer on the CPU"),
}
pytestmark = pytest.mark.timeout(2 * LIMIT + 2000)  # the first one may have to compile


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A recipe, and its run on one process, whole and never stopped, in `whole`.

    Tied embeddings, uneven micro-batches some of which have no image, and more of them than ranks. The launches
    rehearse their heaviest micro-batches, this run does not: that changes nothing.
    """
    folder = tmp_path_factory.mktemp("strategies")
    language = LANGUAGES["llama"] | {"tie_word_embeddings": True}
    chat = {"batch_size": 8, "max_length": 128, "micro_tokens": 128, "workers": 0}
    content = {
        "name": "strategies",
        "model": {
            "vision": {"config": TOWERS["clip"]},
            "projector": {"type": "mlp2x"},
            "language": {"config": language, "tokenizer": {"vocab_size": 400}},
        },
        "tuning": {"vision": {"mode": "full", "lr": 5e-4}},
        "data": {"chat": {"mix": str(tiny_mix(folder, 40)), **chat}},
        "optim": {"lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"steps": STEPS},
        "run": {"precision": "fp32", "save_every": SAVED, "log_every": 1, "rehearse": True},
        "evaluation": {"held_out": {"fraction": 0.1, "every": SAVED, "answers": 1}},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))
    train(recipe, folder / "whole", "run.rehearse=false")
    train(recipe, folder / "adapted", *ADAPTED)
    return folder


def train(recipe: Path, folder: Path, *overrides: str) -> None:
    run(load_recipe(recipe, [f"run.dir={folder}", *overrides]))


@dataclass(frozen=True)
class Launched:
    """What two launches left: one that was killed, one that resumed."""

    name: str
    folder: Path
    killed: tuple[int, str, str]
    steps_left: list[str]
    resumed: tuple[int, str, str]

    def found(self, launch: tuple[int, str, str]) -> dict:
        lines = [line for line in launch[1].splitlines() if line.startswith("found ")]
        assert len(lines) == 1, launch[1][-2000:] + launch[2][-6000:]
        return json.loads(lines[0].removeprefix("found "))


@pytest.fixture(scope="module", params=list(EXPECTED))
def launch(request, reference, tmp_path_factory) -> Launched:
    name = request.param
    if name.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
        for operator in ("deepspeed_shm_comm", "cpu_adam")[: 1 + name.endswith("offload")]:
            compile_or_skip(operator)
    folder = tmp_path_factory.mktemp(name)
    (folder / "recipe.yaml").write_text((reference / "recipe.yaml").read_text())
    killed = launched(name, "strategy_worker.py", "kill", str(folder), timeout=LIMIT)
    assert "SIGKILL" in killed[2] and "found " in killed[1], killed[1][-2000:] + killed[2][-6000:]
    left = sorted(path.name for path in (folder / "own").glob("step_*"))
    shutil.copytree(folder / "own", folder / "back")
    shutil.copytree(reference / "whole", folder / "single", ignore=shutil.ignore_patterns("export", "*10"))
    resumed = launched(name, "strategy_worker.py", "resume", str(folder), timeout=LIMIT)
    return Launched(name, folder, killed, left, resumed)


def compile_or_skip(operator: str) -> None:
    missing = [tool for tool in ("g++", "ninja") if not shutil.which(tool, path=search_path())]
    if missing:
        pytest.skip(f"DeepSpeed compiles {operator} with {' and '.join(missing)}, not found here")
    compile_operator(operator)


def test_the_launch_is_what_it_says(launch):
    """Five launches silently run one process, or DDP, with exit code 0."""
    kind, wrapped, optimizer, strategy = EXPECTED[launch.name]
    for each in (launch.killed, launch.resumed):
        assert launch.found(each) == {
            "processes": 2,
            "world": 2,
            "backend": "gloo",
            "type": kind,
            "wrapped": [wrapped],
            "optimizer": optimizer,
            "strategies": [strategy],
        }


def test_a_text_only_rank_beside_one_with_images_does_not_hang(launch):
    """LLaVA#759, ms-swift#2147, DeepSpeed#5066."""
    losses = [row["loss"] for row in rows(launch.folder / "mixed")]
    assert len(losses) == 20 and losses[-1] < 0.95 * losses[0]


def test_it_was_killed_between_two_saves_and_went_on(launch):
    code, _, errors = launch.killed
    assert code != 0 and "SIGKILL" in errors
    assert launch.steps_left == [f"step_{SAVED:06d}"] and SAVED < KILLED_AFTER < STEPS
    assert launch.resumed[0] == 0, launch.resumed[2][-6000:]


def test_losses_and_gradient_norms_are_those_of_one_process(launch, reference):
    """Before the kill and after it; and after going on with the checkpoint of one process."""
    expected = rows(reference / "whole")
    assert len(expected) == STEPS
    worst = {}
    for run_name in ("own", "single"):
        found = rows(launch.folder / run_name)
        assert [row["step"] for row in found] == list(range(1, STEPS + 1))
        for key in ("loss", "grad_norm"):
            pairs = zip(expected, found, strict=True)
            worst[run_name, key] = max(abs(a[key] - b[key]) / max(1, abs(a[key])) for a, b in pairs)
    print(launch.name, worst)
    assert max(worst.values()) < 1e-4, worst
    held = {"own": held_out(launch.folder / "own"), "single": held_out(launch.folder / "single")}
    for found in held.values():
        assert found == pytest.approx(held_out(reference / "whole"), abs=1e-4)


def test_exports_are_identical(launch, reference):
    """The export of the killed and resumed run is that of one process that never stopped."""
    difference = largest(launch.folder / "own" / "export", reference / "whole" / "export")
    print(launch.name, "export", difference)
    assert difference < 1e-6


def test_any_strategy_goes_on_with_any_checkpoint(launch, reference):
    """One process -> two under the strategy, and back; moments too."""
    train(launch.folder / "recipe.yaml", launch.folder / "back")
    last = f"step_{STEPS:06d}"
    for name in ("single", "back"):
        ours, theirs = launch.folder / name / last, reference / "whole" / last
        assert apart(ours / "model/model.safetensors", theirs / "model/model.safetensors") < 1e-6
        with Moments(ours) as found, Moments(theirs) as expected:
            difference = furthest(dict(found), dict(expected))
        print(launch.name, name, "moments", difference)
        assert difference < 1e-6, name


def test_each_rank_writes_the_moments_it_holds(launch):
    """About half each: none is gathered on the main process, which would need the memory of all."""
    files = sorted((launch.folder / "own" / f"step_{STEPS:06d}").glob("optimizer*"))
    if launch.name == "ddp":
        assert [file.name for file in files] == ["optimizer.safetensors"]
        return
    assert [file.name for file in files] == [f"optimizer-0000{rank}-of-00002.safetensors" for rank in (1, 2)]
    sizes = [sum(value.numel() for value in load_file(file).values()) for file in files]
    assert min(sizes) > 0.45 * sum(sizes), sizes


def test_half_precision_trains_and_saves_whole_weights(launch, reference):
    """A checkpoint holds float32 masters, never weights rounded for computing."""
    pairs = zip(rows(reference / "whole"), rows(launch.folder / "half"), strict=True)
    worst = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    print(launch.name, "half", worst)
    assert 0 < worst < 2e-2
    weights = load_file(launch.folder / "half" / f"step_{STEPS:06d}" / "model" / "model.safetensors")
    projector = weights["multi_modal_projector.linear_1.weight"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert (projector != projector.bfloat16()).float().mean() > 0.9


def test_adapters_beside_a_full_and_a_frozen_part(launch, reference):
    file = Path("adapted") / f"step_{STEPS:06d}" / "model" / "trained.safetensors"
    difference = apart(launch.folder / file, reference / file)
    print(launch.name, "adapted", difference)
    assert difference < 1e-5  # B starts at zero, where Adam's first steps turn rounding into 2e-6


def rows(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def held_out(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["held_out"]["toy"] for line in lines if "held_out" in line]


def largest(folder: Path, other: Path) -> float:
    return apart(folder / "model.safetensors", other / "model.safetensors")


def apart(file: Path, other: Path) -> float:
    """The largest difference of any number in two files with the same names and types."""
    return furthest(load_file(file), load_file(other))


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == theirs[key].dtype for key in ours)
    return max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours)
