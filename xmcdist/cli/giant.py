"""``python -m xmcdist giant``: embeddings of a text graph's nodes; ``giant classify``: how good they are."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from xmcdist.cli.app import run
from xmcdist.config.commands import GiantClassifyConfig, GiantConfig
from xmcdist.config.errors import UserError
from xmcdist.parallel.launch import rank_from_environment
from xmcdist.training import preemption


def main() -> None:
    """Fine-tune on a graph and embed its nodes; on several processes when started through ``accelerate launch``.

    As of ``train``, a run that a signal asked to end leaves ``preempted.json`` and has exit
    status 75 on every rank.
    """
    if len(sys.argv) > 1 and sys.argv[1] == "classify":
        del sys.argv[1]
        run("giant_classify", _classify)
        return
    with preemption.handled(rank_from_environment()[0]):
        run("giant", _giant)


def _giant(cfg: GiantConfig) -> None:
    from xmcdist.parallel.launch import setup, shutdown
    from xmcdist.pipelines.giant import giant

    world = setup(use_gpu=cfg.engine.name != "cpu", timeout_s=cfg.engine.timeout_s)
    try:
        giant(cfg, world)
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


def _classify(cfg: GiantClassifyConfig) -> None:
    if rank_from_environment()[1] > 1:
        raise UserError("giant classify runs in one process: start it without a launcher")
    from xmcdist.pipelines.node_classification import classify

    classify(cfg)
