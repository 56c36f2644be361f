"""The dated results file of a finished demo run, from what the run itself wrote.

python benchmarks/demo/record.py runs/demo benchmarks/results/demo.json --command "make demo" --aim 0.93 0.90
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from facts import commit, machine

SCORES = ("accuracy", "accuracy_open", "questions", "train_seconds", "yes_no", "by_kind")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--command", required=True, help="what made the run")
    parser.add_argument("--aim", nargs=2, type=float, required=True, help="of all and of the open questions")
    options = parser.parse_args()
    scores = json.loads((options.run / "metrics.json").read_text())
    phases = json.loads((options.run / "phases.json").read_text())
    reached = scores["accuracy"] >= options.aim[0] and scores["accuracy_open"] >= options.aim[1]
    stranger = options.run / "stranger.json"
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": options.command,
        "machine": machine(os.cpu_count() or 1, ("torch", "transformers", "accelerate", "peft")),
        **{key: scores[key] for key in SCORES},
        "phases_seconds": {each["phase"]: each["seconds"] for each in phases},
        **({"opened_by_transformers_alone": json.loads(stranger.read_text())} if stranger.exists() else {}),
        "aim": {"accuracy": options.aim[0], "accuracy_open": options.aim[1], "reached": reached},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
