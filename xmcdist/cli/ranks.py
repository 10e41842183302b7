"""What commands that train share: the ranks of a job, and how each leaves when the job is asked to end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from xmcdist.config.schema import RunConfig
from xmcdist.training import preemption

if TYPE_CHECKING:
    from xmcdist.parallel.launch import World

__all__ = ["on_all_ranks"]


def on_all_ranks(cfg: RunConfig, story: Callable[[World], object]) -> None:
    """Join the job's ranks, tell the story, leave together.

    A job that a signal asked to end leaves ``preempted.json`` in the run folder and has exit
    status 75 on every rank.
    """
    from xmcdist.parallel.launch import setup, shutdown

    world = setup(use_gpu=cfg.engine.name != "cpu", timeout_s=cfg.engine.timeout_s)
    try:
        story(world)
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
