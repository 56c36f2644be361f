"""Plans LLaVA-1.5-7B's second stage and writes benchmarks/results/plan.json; prints the README's table.

python benchmarks/plan/run.py [RECIPE] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from facts import ROOT, commit, machine

from vlmtune.planning.estimate import Machine
from vlmtune.planning.plan import Plan, make_plans
from vlmtune.planning.report import COLUMNS, as_json, comparison_rows

RECIPE = Path("recipes/llava15/finetune_7b.yaml")
A100 = Machine(gpus=8, memory=80 * 2**30, tflops=312, mfu=0.4)
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan.json")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    began = time.monotonic()
    plans = make_plans(options.recipe, (), A100)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(torch.get_num_threads(), PACKAGES),
        "command": f"python benchmarks/plan/run.py {options.recipe}",
        "gpus": vars_of(A100),
        "seconds": round(time.monotonic() - began, 1),
        "plans": [as_json(plan) for plan in plans],
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for plan in plans:
        print("\n".join(table(plan)))
    print(f"{report['seconds']} s; written to {options.out}")


def vars_of(gpu: Machine) -> dict[str, Any]:
    """The machine that was planned for."""
    return {"count": gpu.gpus, "memory_bytes": gpu.memory, "peak_tflops": gpu.tflops, "mfu": gpu.mfu}


def table(plan: Plan) -> Iterator[str]:
    """The comparison as Markdown; GiB on each rank."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|---|---|{'---:|' * (len(COLUMNS) - 3)}---|"
    for cells in comparison_rows(plan.others):
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
