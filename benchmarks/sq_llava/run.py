"""SQ-LLaVA in small on easy-VQA: what questions, prototypes and a tuned tower are worth, at equal steps.

    python benchmarks/sq_llava/run.py             # 5 arms x 3 seeds: about half an hour on 2 cores
    python benchmarks/sq_llava/run.py --quick     # a check of under two minutes; the figures mean nothing

One process, one arm after the other. Stopped and started again it goes on: finished arms are skipped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arms import Seed, arguments, every_seed, kept, quicken, summary
from asking import TEMPERATURE, asked_about, test_set
from facts import ROOT, commit, machine
from table import figures_of, numbers, plot, table_lines

from vlmtune.config.loader import load_recipe
from vlmtune.config.lock import stage_key
from vlmtune.config.schema import Recipe
from vlmtune.evaluation.asking import Asking
from vlmtune.evaluation.generate import answer, open_model
from vlmtune.evaluation.question_scores import question_scores
from vlmtune.evaluation.scores import score
from vlmtune.run import run, run_folder
from vlmtune.training.checkpoint import step_folders

HERE = Path(__file__).resolve().parent

ASKS = "data.chat.transforms=[{type: self_question, probability: 0.5, first_turn: true}]"
CLUSTERS = "model.projector={type: clustering, centers: 28}"  # of 64 patches; in the paper 256 of 576
ADAPTS = "tuning.vision={mode: lora, rank: 8, alpha: 16, dropout: 0.0, lr: 5e-4}"
ARMS: dict[str, tuple[str, ...]] = {
    "control": (),
    "sq": (ASKS,),
    "prototypes": (CLUSTERS,),
    "sq_prototypes": (ASKS, CLUSTERS),
    "all": (ASKS, CLUSTERS, ADAPTS),
}
"""What each arm changes in arm.yaml."""


def main() -> None:
    options = parse()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    tower = build_tower(options)
    seeds = every_seed(options, lambda arm, seed: measured(arm, seed, tower, options), figures_of)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(os.cpu_count() or 1, ("torch", "transformers", "accelerate", "peft", "easy-vqa")),
        "settings": settings(options),
        "arms": {arm: summary(each, numbers) for arm, each in seeds.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, options.out.with_suffix(".png"))
    print(*table_lines(report), "", f"written to {options.out}", sep="\n")


def parse() -> argparse.Namespace:
    parser = arguments(__doc__, "sq_llava", ARMS, steps=200)
    parser.add_argument("--questions", type=int, default=2000, help="test questions answered")
    parser.add_argument("--conversations", type=int, default=500, help="test conversations measured")
    options = parser.parse_args()
    if options.quick:
        quicken(options, questions=40, conversations=12)
    return options


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was run."""
    return {
        "steps": options.steps,
        "test_questions": options.questions,
        "test_conversations": options.conversations,
        "quick": options.quick,
        "temperature": TEMPERATURE,
        "changes": {arm: list(ARMS[arm]) for arm in options.arms},
    }


# ---------------------------------------------------------------- training


def build_tower(options: argparse.Namespace) -> Path:
    """The export of the demo's tower, trained on captions; all arms and seeds look through it."""
    folder = options.work / "tower"
    changes = [f"run.dir={folder}", "stages=[align]", "evaluation.mix=null"]
    if options.quick:
        changes.append("stages.align.schedule={steps: 4, epochs: null}")
    report = run(load_recipe(ROOT / "recipes" / "demo" / "easy_vqa_tower.yaml", changes))
    if report.interrupted:
        raise SystemExit("stopped; the same command goes on")
    return folder / "export"


def arm_recipe(arm: str, seed: int, tower: Path, options: argparse.Namespace) -> Recipe:
    """The recipe of one arm and seed."""
    common = [
        f"model.vision.path={tower}",
        f"run.dir={options.work / f'{arm}_{seed}'}",
        f"run.seed={seed}",
        f"schedule.steps={options.steps}",
    ]
    (recipe,) = load_recipe(HERE / "arm.yaml", [*common, *ARMS[arm]])
    return recipe


def measured(arm: str, seed: int, tower: Path, options: argparse.Namespace) -> Seed:
    """The figures of one arm and seed, read from its folder if they are there for the same settings."""
    recipe = arm_recipe(arm, seed, tower, options)
    folder = run_folder(recipe)
    key = f"{stage_key(recipe, {})} {options.questions} {options.conversations}"

    def make() -> Seed:
        began = time.monotonic()
        if run([recipe], fresh=True).interrupted:
            raise SystemExit("stopped; the same command goes on")
        trained = {"seed": seed, "train_seconds": round(time.monotonic() - began, 1)}
        return trained | measure(step_folders(folder)[-1], seed, options)

    return kept(folder / "figures.json", key, make)


# ---------------------------------------------------------------- measuring


def measure(step: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Answers, likelihoods and questions of a model on test pictures."""
    model, processor = open_model(str(step))
    single = test_set("question")
    samples = [single[row] for row in range(0, len(single), max(len(single) // options.questions, 1))]
    answers = score(answer(model, processor, samples[: options.questions], 256, 8))
    talks = test_set("conversation")
    chosen = [talks[row] for row in range(min(options.conversations, len(talks)))]
    likelihoods = question_scores(model, processor, chosen, first_turn=True, batch_size=64)
    return {
        "accuracy": answers.overall.accuracy,
        "accuracy_open": answers.open.accuracy if answers.open else None,
        **likelihoods.as_dict(),
        "asked": asked_about(model, processor, talks, seed, TEMPERATURE),
        "asked_as_in_the_demo": asked_about(model, processor, talks, seed, Asking().temperature),
    }


if __name__ == "__main__":
    main()
