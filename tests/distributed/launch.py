"""Starts a worker script on two gloo processes and returns what they printed; a hang fails, it does not hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH_FILES = ROOT / "recipes" / "launch"
_TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]


def two_processes(script: str, *arguments: str, timeout: float = 240) -> str:
    """The output of `torchrun --nproc_per_node 2 script`; asserts exit code 0."""
    code, output, errors = _run([*_TORCHRUN, _worker(script), *arguments], timeout)
    assert code == 0, output[-3000:] + errors[-6000:]
    return output


def launched(file: str, script: str, *arguments: str, timeout: float) -> tuple[int, str, str]:
    """Exit code, output and errors of `accelerate launch --config_file recipes/launch/<file>.yaml script` on two."""
    options = ["--config_file", str(LAUNCH_FILES / f"{file}.yaml"), "--num_processes", "2"]
    command = ["-m", "accelerate.commands.launch", *options, _worker(script), *arguments]
    return _run(command, timeout)


def _worker(script: str) -> str:
    return str(Path(__file__).parent / script)


def _run(command: list[str], timeout: float) -> tuple[int, str, str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": os.environ.get(
            "TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions")
        ),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja lies beside python
    }
    # A session of its own: at a time-out the workers end with their launcher.
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        raise AssertionError(f"no end after {timeout} s\n{output[-3000:]}{errors[-6000:]}") from None
    return process.returncode, output, errors
