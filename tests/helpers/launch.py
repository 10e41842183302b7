"""Start xmcdist as its users do: real ``accelerate launch``, real processes, real signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(processes: int, *args: str, log: Path, module: str = "xmcdist", **variables: str) -> subprocess.Popen[bytes]:
    """Start ``xmcdist <args>`` on some gloo processes; output goes to a file."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_"))}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= variables
    command = [sys.executable, "-m", module, *args]
    if processes > 1:
        env["ACCELERATE_USE_CPU"] = "true"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(free_port()), "-m", module, *args]
    with open(log, "wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT)


def start_node(processes: int, *args: str, log: Path, restarts: int = 0, **variables: str) -> subprocess.Popen[bytes]:
    """Start ``xmcdist train <args>`` through launch/node.sh, as a node of a cluster does."""
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "SLURM_"))
    }
    env |= {"NPROC": str(processes), "MASTER_PORT": str(free_port()), "XMCDIST_MAX_RESTARTS": str(restarts)}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"XMCDIST_VENV": str(ROOT / "no-venv"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= variables
    with open(log, "wb") as out:
        return subprocess.Popen(
            ["bash", "launch/node.sh", *args], stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT
        )


def rank_pid(job: subprocess.Popen[bytes], rank: int) -> int:
    """Process id of one rank of a running job."""
    for pid in _family(job.pid):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"RANK={rank}".encode() in environ and b"LOCAL_RANK" in b"".join(environ):
            return pid
    raise AssertionError(f"no process of rank {rank}")


def wait_until(job: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool], timeout_s: float = 240) -> None:
    """Wait for the first moment that ``ready`` holds while a job runs."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert job.poll() is None, f"ended too early:\n{log.read_text()[-6000:]}"
        assert time.monotonic() < deadline, f"not ready in time:\n{log.read_text()[-6000:]}"
        time.sleep(0.002)


def finish(job: subprocess.Popen[bytes], log: Path, timeout_s: float = 240) -> None:
    """Wait for a job; its output is the message when it failed or hung."""
    try:
        code = job.wait(timeout_s)
    except subprocess.TimeoutExpired:
        kill_all(job)
        raise AssertionError(f"hung for {timeout_s} s:\n{log.read_text()[-6000:]}") from None
    assert code == 0, log.read_text()[-6000:]


def launch(processes: int, *args: str, log: Path) -> None:
    """Start and finish."""
    finish(start(processes, *args, log=log), log)


def kill_when(job: subprocess.Popen[bytes], log: Path, ready: Callable[[], bool], timeout_s: float = 240) -> None:
    """SIGKILL the launcher and every rank at the first moment ``ready`` holds."""
    wait_until(job, log, ready, timeout_s)
    kill_all(job)


def kill_all(job: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all that descend from it, the ranks first stopped from being noticed."""
    family = _family(job.pid)
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    job.wait()


def _family(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        current = queue.pop()
        found.append(current)
        queue += children.get(current, [])
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
