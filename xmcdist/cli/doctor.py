"""``python -m xmcdist doctor``: is this machine, or this job, fit to train?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import MutableMapping

from xmcdist.cli.app import run
from xmcdist.config.commands import DoctorConfig

__all__ = ["main", "ranks_of_srun"]


def main() -> None:
    """Check; on several processes under ``accelerate launch``, ``torchrun`` or ``srun``."""
    ranks_of_srun(os.environ)
    run("doctor", _doctor)


def ranks_of_srun(env: MutableMapping[str, str]) -> None:
    """Tell torch what ``srun`` says of this task, where no launcher has done so.

    Several tasks of one step become the ranks of one job.
    """
    if "RANK" in env or int(env.get("SLURM_NTASKS", "1")) <= 1 or "SLURM_PROCID" not in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    nodes = max(int(env.get("SLURM_NNODES", "1")), 1)
    env["LOCAL_WORLD_SIZE"] = str(-(-int(env["SLURM_NTASKS"]) // nodes))
    env.setdefault("MASTER_ADDR", _first_host(env))
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def _first_host(env: MutableMapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
    try:
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return nodes
    return told.stdout.split()[0]


def _doctor(cfg: DoctorConfig) -> None:
    from xmcdist.parallel.launch import setup, shutdown
    from xmcdist.pipelines.doctor import doctor

    world = setup(use_gpu=cfg.gpu, timeout_s=cfg.timeout_s)
    good = doctor(cfg, world)
    shutdown()
    if not good:
        sys.exit(1)
