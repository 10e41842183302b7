"""Each file of launch/accelerate starts the processes it says, on gloo in place of GPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "launch" / "accelerate"


def _start(config: str, *options: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_"))}
    env |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *options]
    command += ["-m", "tests.helpers.meet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)


def _said(*jobs: subprocess.Popen[str]) -> list[str]:
    """What the ranks of all launchers said, in order of rank."""
    outputs = []
    for job in jobs:
        try:
            outputs.append(job.communicate(timeout=240)[0])
        finally:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * len(jobs), "\n".join(outputs)
    return sorted(line for output in outputs for line in output.splitlines() if line.startswith("rank "))


@pytest.mark.distributed
@pytest.mark.parametrize("config", ["1gpu.yaml", "8gpu.yaml", "cpu_2.yaml"])
def test_one_machine(config: str) -> None:
    n = yaml.safe_load((CONFIGS / config).read_text(encoding="utf-8"))["num_processes"]
    assert _said(_start(config)) == [f"rank {r} of {n}, local {r} of {n}: sum {n * (n + 1) // 2}" for r in range(n)]


@pytest.mark.distributed
def test_two_machines_of_two_processes_in_place_of_eight() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = ("--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--num_processes", "4")
    machines = [_start("2x8gpu.yaml", "--machine_rank", str(i), *options) for i in range(2)]
    assert _said(*machines) == [f"rank {r} of 4, local {r % 2} of 2: sum 10" for r in range(4)]


def test_no_file_is_left_out() -> None:
    assert {p.name for p in CONFIGS.iterdir()} == {"1gpu.yaml", "2x8gpu.yaml", "8gpu.yaml", "cpu_2.yaml"}
