"""``python -m xmcdist train``: from texts and labels to a measured model folder."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from xmcdist.cli.app import run
from xmcdist.config.members import compose_members
from xmcdist.config.schema import RunConfig
from xmcdist.parallel.launch import rank_from_environment
from xmcdist.training import preemption


def main() -> None:
    """Train; on several processes when started through ``accelerate launch``.

    A run that a signal asked to end leaves ``preempted.json`` and has exit status 75 on every rank.
    """
    with preemption.handled(rank_from_environment()[0]):
        run("train", _train)


def _train(cfg: RunConfig) -> None:
    from xmcdist.parallel.launch import setup, shutdown
    from xmcdist.pipelines.members import train_members
    from xmcdist.pipelines.train import train

    members = compose_members(_overrides(), cfg, rank_from_environment()[1]) if cfg.members else {}
    world = setup(use_gpu=cfg.engine.name != "cpu", timeout_s=cfg.engine.timeout_s)
    try:
        if members:
            train_members(cfg, members, world)
        else:
            train(cfg, world)
    except preemption.Preempted as stop:
        preemption.leaving()
        if world.is_main:
            preemption.write_mark(Path(cfg.run_dir), stop)
        with suppress(Exception):  # all that matters is on disk
            shutdown()
        sys.stdout.flush()
        os._exit(preemption.EXIT_STATUS)
    preemption.leaving()
    shutdown()


def _overrides() -> list[str]:
    """What this job was asked for; of a multirun (``-m``), this one of its jobs."""
    from hydra.core.hydra_config import HydraConfig

    return [str(word) for word in HydraConfig.get().overrides.task]
