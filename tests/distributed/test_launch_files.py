"""The launch files, read by accelerate's own loader; nothing is started."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from tests.distributed.launch import LAUNCH_FILES

FILES = {
    "ddp": {"multi_gpu": True},
    "fsdp2": {"use_fsdp": True, "fsdp_version": 2, "fsdp_cpu_ram_efficient_loading": False},
    "zero1": {"use_deepspeed": True, "zero_stage": 1, "offload_optimizer_device": "none"},
    "zero2": {"use_deepspeed": True, "zero_stage": 2, "offload_optimizer_device": "none"},
    "zero3": {"use_deepspeed": True, "zero_stage": 3, "offload_optimizer_device": "none"},
    "zero3_offload": {"use_deepspeed": True, "zero_stage": 3, "offload_optimizer_device": "cpu"},
    "two_nodes": {"use_deepspeed": True, "zero_stage": 3, "deepspeed_multinode_launcher": "standard"},
}
WAYS = ("multi_gpu", "use_fsdp", "use_deepspeed", "cpu", "tpu")


def test_every_launch_file_on_disk_is_tested():
    assert sorted(FILES) == sorted(path.stem for path in LAUNCH_FILES.glob("*.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_what_the_file_means(name):
    path = LAUNCH_FILES / f"{name}.yaml"
    parser = launch_command_parser()
    arguments = _validate_launch_command(parser.parse_args(["--config_file", str(path), "x.py"]))[0]
    assert {key: getattr(arguments, key) for key in FILES[name]} == FILES[name]
    assert sum(bool(getattr(arguments, way)) for way in WAYS) == 1
    assert arguments.mixed_precision == "no"  # run.precision decides
    nodes = 2 if name == "two_nodes" else 1
    assert (arguments.num_machines, arguments.num_processes) == (nodes, 8 * nodes)
    manual = path.read_text().partition("compute_environment")[0]
    assert manual.startswith("# ") and f"--config_file recipes/launch/{name}.yaml" in manual


def test_the_hostfile_is_one_for_deepspeed():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert runner.fetch_hostfile(str(LAUNCH_FILES / "hostfile")) == {"node-0": 8, "node-1": 8}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_is_bash_and_names_files_that_exist():
    path = LAUNCH_FILES / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "--config_file recipes/launch/two_nodes.yaml" in path.read_text()
