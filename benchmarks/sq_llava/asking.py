"""What a model asks about 20 test pictures of easy-VQA, and whether that makes sense.

vlmtune train recipes/sq_llava/easy_vqa.yaml
python benchmarks/sq_llava/asking.py runs/sq_llava_easy_vqa/export
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from facts import ROOT, commit, machine
from scene import Judgement, judge, truth

from vlmtune.config.mix import EasyVqaSource
from vlmtune.data.easy_vqa import EasyVqa, open_easy_vqa
from vlmtune.evaluation.asking import Asking, ask, question_statistics
from vlmtune.evaluation.generate import open_model

TEMPERATURE = 0.7
"""Of the questions in the table. The released demo's 1.2 is for 32,000 tokens, of which top-k 300 leaves 1 %; here it
leaves more than half, and a model of two layers goes astray. Figures at 1.2 are in the file too."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an export, or a step folder")
    parser.add_argument("--seeds", type=int, default=3, help="of the draws")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sq_llava_asking.json")
    options = parser.parse_args()
    model, processor = open_model(options.model)
    talks = test_set("conversation")
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(os.cpu_count() or 1, ("torch", "transformers", "easy-vqa")),
        "model": options.model,
    }
    for name, temperature in (("asked", TEMPERATURE), ("asked_as_in_the_demo", Asking().temperature)):
        report[name] = [
            asked_about(model, processor, talks, seed, temperature) for seed in range(options.seeds)
        ]
        for each in report[name]:
            print(*(f"{key} {value}" for key, value in each.items() if key != "examples"), sep="  ")
    print(*report["asked"][0]["examples"], f"written to {options.out}", sep="\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def asked_about(model: Any, processor: Any, talks: EasyVqa, seed: int, temperature: float) -> dict[str, Any]:
    """What the model asks about 20 test pictures, as `vlmtune ask --first-turn` does, and whether that makes sense."""
    scenes = list(dict.fromkeys(talks[row].images for row in range(200)))[:20]
    truths = truths_of(talks)
    asking = Asking(3, first_turn=True, max_new_tokens=40, seed=seed, temperature=temperature)
    asked = ask(model, processor, scenes, asking, 64)
    own = [judge(each.questions, truths[each.key]) for each in asked]
    turned = zip(asked, asked[1:] + asked[:1], strict=True)
    others = [judge(each.questions, truths[other.key]) for each, other in turned]
    total, elsewhere = (Judgement(*map(sum, zip(*judged, strict=True))) for judged in (own, others))
    statistics = question_statistics([question for each in asked for question in each.questions])
    return {
        "temperature": temperature,
        "pictures": len(scenes),
        "questions": total.questions,
        "well_formed": total.well_formed / max(total.questions, 1),
        "answerable": total.answerable / max(total.well_formed, 1),
        "answerable_of_next_picture": elsewhere.answerable / max(elsewhere.well_formed, 1),
        "ended": statistics.ended,
        "question_marks": statistics.question_marks,
        "distinct_1": statistics.distinct_1,
        "distinct_2": statistics.distinct_2,
        "different_sets_of_questions": len({each.distinct for each in asked}),
        "examples": [[question.text for question in each.questions] for each in asked[:3]],
    }


def truths_of(talks: EasyVqa) -> dict[str, Any]:
    """What is true of each test picture, by its name."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for sample in talks.samples:
        pairs.setdefault(f"{sample.image}.png", []).extend(sample.pairs)
    return {name: truth(each) for name, each in pairs.items()}


def test_set(task: str) -> EasyVqa:
    """The official test split: single questions, or conversations of up to four."""
    turns = {"turns": 4} if task == "conversation" else {}
    config = {"name": f"test_{task}", "format": "easy_vqa", "split": "test", "task": task, **turns}
    return open_easy_vqa(EasyVqaSource.model_validate(config))


if __name__ == "__main__":
    main()
