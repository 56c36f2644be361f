"""Starts a worker script on two gloo processes and returns what they printed; a hang fails, it does not hang."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LAUNCH_FILES = ROOT / "recipes" / "launch"
OPERATORS = {"deepspeed_shm_comm": "ShareMemCommBuilder", "cpu_adam": "CPUAdamBuilder"}
"""What DeepSpeed compiles on a CPU, and who does it; the folder below keeps it."""
EXTENSIONS = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ROOT / ".cache" / "torch_extensions"))
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


def compile_operator(name: str, timeout: float = 900) -> None:
    """Compiles one of DeepSpeed's operators unless it is there: two to three minutes, once, on an idle machine."""
    folder = EXTENSIONS / name
    if (folder / f"{name}.so").exists():
        return
    (folder / "lock").unlink(missing_ok=True)  # of a build that was killed: the next one would wait for it
    create = f"get_accelerator().create_op_builder('{OPERATORS[name]}').load()"
    code, output, errors = _run(
        ["-c", f"from deepspeed.accelerator import get_accelerator; {create}"], timeout
    )
    assert code == 0, output[-2000:] + errors[-4000:]


def search_path() -> str:
    """PATH with the folder of this Python in front: ninja from pip lies there."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _worker(script: str) -> str:
    return str(Path(__file__).parent / script)


def _run(command: list[str], timeout: float) -> tuple[int, str, str]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
        "PATH": search_path(),
    }
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(process)
        output, errors = process.communicate()
        raise AssertionError(f"no end after {timeout} s\n{output[-3000:]}{errors[-6000:]}") from None
    finally:
        _end(process)  # when pytest's own time limit struck
    return process.returncode, output, errors


def _end(process: subprocess.Popen) -> None:
    """Kills a launcher and its workers, which torchrun puts into sessions of their own."""
    if process.poll() is not None:
        return
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
