"""Starts a worker script on two gloo processes and returns what they printed; a hang fails, it does not hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def two_processes(script: str, *arguments: str, timeout: float = 240) -> str:
    """The output of `python -m torch.distributed.run --nproc_per_node 2 script`; asserts exit code 0."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / script), *arguments],
        cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
