"""Jobs on the Slurm that slurm/local/test.sh has started: submitting, watching, changing them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# The shipped data with a small random encoder: all stages, minutes on two cores, half a minute of steps on fast ones.
SHIPPED = [
    "experiment=quickstart",
    "encoder=tiny",
    "matcher.steps=[20,1000]",
    "checkpoint.every_steps=0",  # what is resumed was saved by the signal
    "tracker.log_every=5",
    "engine.threads=1",
]
TWO_BY_TWO = ["--nodes=2", "--time=60"]
LINEAR = ["experiment=quickstart", "encoder=none", "engine.threads=1"]


def environment(**more: str) -> dict[str, str]:
    """What a job gets: this interpreter, two ranks a node, nothing of the test's own process."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "XMCDIST_", "GLOO_"))}
    kept |= {"SLURM_CONF": os.environ["SLURM_CONF"], "XMCDIST_VENV": str(ROOT / "no-venv"), "NPROC": "2"}
    kept |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    kept |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true", "XMCDIST_SITE": "/dev/null"}
    return kept | more


def run(*command: str, **more: str) -> str:
    """A command at the root of the checkout; its output."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(**more), timeout=120)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Job:
    """One job; ``run_dir`` is its run folder, ``log`` its output."""

    id: str
    run_dir: Path
    log: Path

    def show(self, field: str) -> str:
        """A field of ``scontrol show job``, such as JobState, Restarts, Reason."""
        found = re.search(rf"\b{field}=(\S*)", run("scontrol", "show", "job", "-o", self.id))
        return found.group(1) if found else ""

    def wait(self, ready: Callable[[], bool], what: str, timeout_s: float = 900) -> None:
        """Wait while the job is alive; a requeued one need not wait for Slurm's two minutes."""
        began = time.monotonic()
        while not ready():
            state = self.show("JobState")
            assert state not in ("FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"), (
                f"{state}, before {what}: {self.text()}"
            )
            assert time.monotonic() - began < timeout_s, f"no {what} in {timeout_s} s: {self.text()}"
            if state == "PENDING" and self.show("Reason") == "BeginTime":
                run("scontrol", "update", f"jobid={self.id}", "StartTime=now")
            time.sleep(1)

    def finish(self, timeout_s: float = 1500) -> dict[str, Any]:
        """Wait for its end; what ``results.json`` holds."""
        self.wait(lambda: self.show("JobState") == "COMPLETED", "end", timeout_s)
        results: dict[str, Any] = json.loads((self.run_dir / "results.json").read_text())
        return results

    def end(self, timeout_s: float = 900) -> str:
        """Wait until it is in no queue any more; its state."""
        began = time.monotonic()
        while (state := self.show("JobState")) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() - began < timeout_s, f"{state} after {timeout_s} s: {self.text()}"
            if state == "PENDING" and self.show("Reason") == "BeginTime":
                run("scontrol", "update", f"jobid={self.id}", "StartTime=now")
            time.sleep(1)
        return state

    def text(self) -> str:
        """The end of its output."""
        return self.log.read_text()[-6000:] if self.log.exists() else "no output yet"

    def rows(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl`` so far."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def steps(self, level: int) -> int:
        """Steps of a level that it has logged."""
        return max((r["step"] for r in self.rows() if r.get("level") == level and "loss" in r), default=0)

    def launches(self) -> str:
        """``launches.log``."""
        return (self.run_dir / "launches.log").read_text()


def submit(
    folder: Path,
    name: str,
    *settings: str,
    options: list[str] = TWO_BY_TWO,
    script: str = "slurm/train.sbatch",
    **env: str,
) -> Job:
    """Submit a batch file of the project; run folder and log are in ``folder``."""
    run_dir, log = folder / name, folder / f"{name}.log"
    command = ["sbatch", "--parsable", f"--job-name={name}", f"--output={log}", *options, script, *settings]
    return Job(run(*command, XMCDIST_RUN_DIR=str(run_dir), **env).strip(), run_dir, log)


@contextmanager
def removed_afterwards() -> Iterator[None]:
    """No job of a test, failed or not, is left to take nodes from the next one."""
    try:
        yield
    finally:
        ids = run("squeue", "-h", "-o", "%A").split()
        if ids:
            run("scancel", *ids)
        while run("squeue", "-h", "-o", "%A").split():
            time.sleep(1)
