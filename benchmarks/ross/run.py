"""Ross in small: what a second loss that looks back at the image is worth, at equal steps from one start.

    python benchmarks/ross/run.py             # 5 arms x 3 seeds: about half an hour on 2 cores
    python benchmarks/ross/run.py --quick     # a check of under two minutes; the figures mean nothing

Two sets at once: easy-VQA (one large shape) and scenes of a few tiny shapes (scenes.py). One process, one arm after the
other. Stopped and started again it goes on: finished arms are skipped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from arms import Seed, arguments, every_seed, kept, log, quicken, summary
from facts import ROOT, commit, machine
from figures import draw_curves, draw_grid, line_of, numbers, table_lines
from scenes import test_samples, write_split

from vlmtune.config.autoencoder import load_vae_recipe
from vlmtune.config.loader import load_recipe
from vlmtune.config.lock import stage_key
from vlmtune.config.mix import EasyVqaSource
from vlmtune.config.schema import Recipe
from vlmtune.data.easy_vqa import EasyVqa, open_easy_vqa
from vlmtune.evaluation.generate import answer, open_model
from vlmtune.evaluation.scores import score
from vlmtune.objectives.spine import hidden_states
from vlmtune.provenance import base_hashes
from vlmtune.reconstruct import open_objective, paint, picture_batch
from vlmtune.run import CACHE, run, run_folder
from vlmtune.training.autoencoder import train_vae
from vlmtune.training.checkpoint import step_folders
from vlmtune.types import ChatSample

HERE = Path(__file__).resolve().parent

_HEAD = "denoiser: {depth: 2, width: 192, heads: 4}"
_PIXELS = "target: {type: pixels, side: 32}"  # 192 numbers a token, as wide as the denoiser
_VAE = "target: {type: vae, path: VAE}"
ARMS: dict[str, str] = {
    "control": f"{{type: reconstruction, weight: 0, {_PIXELS}}}",
    "denoise_vae": f"{{type: reconstruction, method: denoise, {_VAE}, {_HEAD}}}",
    "regress_vae": f"{{type: reconstruction, method: regress, {_VAE}, {_HEAD}}}",
    "denoise_pixels": f"{{type: reconstruction, method: denoise, {_PIXELS}, {_HEAD}}}",
    "regress_pixels": f"{{type: reconstruction, method: regress, {_PIXELS}, {_HEAD}}}",
}
"""Each arm's objective; weight 1 where none is given."""
DEFAULT = "denoise_vae"
"""The paper's own choice: its gap is the one reported for the whole."""


def main() -> None:
    options = parse()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    prepare(options)
    overhead = {arm: overhead_of(arm, options) for arm in options.arms}
    seeds = every_seed(options, lambda arm, seed: measured(arm, seed, options), line_of)
    report = report_of(options, seeds, overhead)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    draw_curves(report, options.out.with_name(f"{options.out.stem}_loss.png"))
    draw_grid(painted(options), options.out.with_name(f"{options.out.stem}_reconstructions.png"))
    print(*table_lines(report), "", f"written to {options.out}", sep="\n")


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "ross", ARMS, steps=240)
    parser.add_argument("--start-steps", type=int, default=440, help="of 32 captions, once")
    parser.add_argument("--vae-steps", type=int, default=600, help="of 8 pictures, once")
    parser.add_argument("--scenes", type=int, default=3000, help="training pictures of tiny shapes")
    parser.add_argument("--questions", type=int, default=1000, help="test questions of each set")
    parser.add_argument("--pictures", type=int, default=64, help="test pictures of each set in the swap test")
    options = parser.parse_args()
    if options.quick:
        quicken(options, start_steps=2, vae_steps=2, scenes=40, questions=24, pictures=4)
        options.arms = ["control", DEFAULT, "regress_pixels"]
    return options


def report_of(
    options: argparse.Namespace, seeds: dict[str, list[Seed]], overhead: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """The results file."""
    arms = {arm: summary(each, numbers) | {"overhead": overhead[arm]} for arm, each in seeds.items()}
    packages = ("torch", "transformers", "accelerate", "diffusers", "easy-vqa")
    names = ("steps", "start_steps", "vae_steps", "scenes", "questions", "pictures", "quick")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(os.cpu_count() or 1, packages),
        "settings": {name: vars(options)[name] for name in names},
        "objectives": {arm: ARMS[arm] for arm in options.arms},
        "vae": json.loads((options.work / "vae" / "vae.json").read_text()),
        "condition_swap_gap": arms.get(DEFAULT, {}).get("mean", {}).get("condition_swap_gap"),
        "arms": arms,
    }


# ---------------------------------------------------------------- what all arms share


def prepare(options: argparse.Namespace) -> None:
    """Scenes, mixes, the VAE, and the start; whatever is there already stays."""
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    write_split(work / "scenes_train", options.scenes, 1)
    write_split(work / "scenes_test", max(options.questions // 4, 8), 2)
    few = max(options.scenes // 2, 8)
    write_mix(
        work / "start_mix.yaml",
        [captions("easy"), captions("scenes"), asked("easy", few), asked("scenes", few)],
    )
    write_mix(work / "arm_mix.yaml", [asked("easy", 4 * options.scenes), asked("scenes", 4 * options.scenes)])
    vae = load_vae_recipe(
        ROOT / "recipes" / "ross" / "tiny_vae.yaml",
        [f"mix={work / 'start_mix.yaml'}", f"dir={work / 'vae'}", f"steps={options.vae_steps}"],
    )
    if not (work / "vae" / "vae.json").exists():
        log.info("VAE: %.1f dB", train_vae(vae, CACHE).psnr)
    changes = [f"data.chat.mix={work / 'start_mix.yaml'}", f"run.dir={work / 'start'}"]
    start = load_recipe(HERE / "start.yaml", [*changes, f"schedule.steps={options.start_steps}"])
    if run(start).interrupted:
        raise SystemExit("stopped; the same command goes on")


def captions(which: str) -> dict[str, Any]:
    """The captions of one set, every one once an epoch."""
    if which == "easy":
        return {"name": "easy_captions", "format": "easy_vqa", "task": "caption", "complete": True}
    return _scenes("captions")


def asked(which: str, count: int) -> dict[str, Any]:
    """So many training questions of one set an epoch."""
    easy = {"name": "easy_questions", "format": "easy_vqa", "task": "question"}
    return (easy if which == "easy" else _scenes("questions")) | {"count": count}


def _scenes(file: str) -> dict[str, Any]:
    path = f"scenes_train/{file}.json"
    return {"name": f"scenes_{file}", "format": "llava_json", "path": path, "images": "scenes_train/images"}


def write_mix(path: Path, sources: list[dict[str, Any]]) -> None:
    path.write_text(yaml.safe_dump({"sources": sources}))


# ---------------------------------------------------------------- one arm


def arm_changes(arm: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """What the command line of one arm says."""
    start = step_folders(options.work / "start")[-1] / "model"
    return [
        f"model.checkpoint={start}",
        f"data.chat.mix={options.work / 'arm_mix.yaml'}",
        f"run.dir={folder}",
        f"schedule.steps={options.steps}",
        f"objective={ARMS[arm].replace('VAE', str(options.work / 'vae'))}",
    ]


def arm_recipe(arm: str, seed: int, options: argparse.Namespace) -> Recipe:
    changes = arm_changes(arm, options.work / f"{arm}_{seed}", options)
    return load_recipe(HERE / "arm.yaml", [*changes, f"run.seed={seed}"])[0]


def measured(arm: str, seed: int, options: argparse.Namespace) -> Seed:
    """The figures of one arm and seed, read from its folder if they are there for the same settings."""
    recipe = arm_recipe(arm, seed, options)
    folder = run_folder(recipe)
    key = f"{stage_key(recipe, base_hashes(recipe))} {options.questions} {options.pictures}"

    def make() -> Seed:
        if run([recipe], fresh=True).interrupted:
            raise SystemExit("stopped; the same command goes on")
        return {
            "seed": seed,
            **answers(folder, options),
            **swapped(folder, recipe, options),
            **curves(folder),
        }

    return kept(folder / "figures.json", key, make)


def answers(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy on each set and by kind of question."""
    model, processor = open_model(str(step_folders(folder)[-1]))
    easy = easy_test()
    stride = max(len(easy) // options.questions, 1)
    chosen = [replace(easy[row], kind=f"easy {easy[row].kind}") for row in range(0, len(easy), stride)]
    samples = [*chosen[: options.questions], *test_samples(options.work / "scenes_test")[: options.questions]]
    scores = score(answer(model, processor, samples, 256, 6))
    kinds = {kind: group.accuracy for kind, group in scores.by_kind.items()}

    def mean(which: str) -> float:
        groups = [group for kind, group in scores.by_kind.items() if kind.startswith(which)]
        return sum(each.accuracy * each.questions for each in groups) / sum(each.questions for each in groups)

    return {"accuracy": {"easy": mean("easy"), "tiny": mean("tiny"), **kinds}}


def swapped(folder: Path, recipe: Recipe, options: argparse.Namespace) -> dict[str, float]:
    """The held-out reconstruction loss, and how much it rises when each picture gets another one's condition.

    The same time steps, noises and posterior draws in both, so that only the condition differs.
    """
    if recipe.objective.weight == 0:
        return {}
    objective, processor = open_objective(step_folders(folder)[-1])
    batch = picture_batch(objective.model, processor, test_pictures(options, options.pictures))
    with torch.no_grad():
        rows = objective.rows(hidden_states(objective.model, batch), batch)
        own = objective.losses(rows).mean().item()
        other = objective.losses(replace(rows, hidden=rows.hidden.roll(1, 0))).mean().item()
    return {"reconstruction_loss": own, "swapped_loss": other, "condition_swap_gap": other / own - 1}


def curves(folder: Path) -> dict[str, list[list[float]]]:
    """(step, loss) of each term while training."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    terms = ("next_token", "reconstruction") if "reconstruction" in rows[-1] else ("loss",)
    names = {"loss": "next_token"}
    return {f"{names.get(term, term)}_curve": [[row["step"], row[term]] for row in rows] for term in terms}


def overhead_of(arm: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of an optimizer step and peak memory, in a process of its own; from its file if it is there."""
    folder = options.work / f"overhead_{arm}"
    file = options.work / f"overhead_{arm}.json"
    if not file.exists():
        log.info("overhead of %s", arm)
        changes = [*arm_changes(arm, folder, options), f"schedule.steps={5 if options.quick else 20}"]
        command = [sys.executable, str(HERE / "overhead.py"), str(HERE / "arm.yaml"), *changes]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            command,
            check=True,
            cwd=ROOT,
            env=environment | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        file.write_text(done.stdout.splitlines()[-1])
    return json.loads(file.read_text())


# ---------------------------------------------------------------- test data


def easy_test() -> EasyVqa:
    config = {"name": "easy_test", "format": "easy_vqa", "split": "test", "task": "question"}
    return open_easy_vqa(EasyVqaSource.model_validate(config))


def test_pictures(options: argparse.Namespace, each: int) -> list[Path]:
    """So many held-out pictures of either set."""
    easy: Sequence[ChatSample] = easy_test()  # type: ignore[assignment]
    refs = dict.fromkeys(easy[row].images[0] for row in range(0, len(easy), max(len(easy) // each, 1)))
    tiny = [options.work / "scenes_test" / "images" / f"{number}.png" for number in range(each)]
    return [*(Path(str(ref.root)) / ref.name for ref in [*refs][:each]), *tiny]


def painted(options: argparse.Namespace) -> dict[str, Any]:
    """Columns of the picture grid: test pictures, and by arm the target and what the first seed's head paints."""
    columns: dict[str, Any] = {}
    for arm in options.arms:
        if arm == "control":
            continue
        folder = step_folders(options.work / f"{arm}_0")[-1]
        objective, processor = open_objective(folder)
        batch = picture_batch(objective.model, processor, test_pictures(options, 4))
        with torch.no_grad():
            rows = objective.rows(hidden_states(objective.model, batch), batch)
            target, found = (objective.target.decode(each) for each in paint(objective, rows, 50, 0))
        kind = arm.partition("_")[2]
        columns.setdefault("picture", objective.target.normalisation.undo(rows.pixels))
        columns.setdefault(f"target: {kind}", target)
        columns[arm] = found
    return columns


if __name__ == "__main__":
    main()
