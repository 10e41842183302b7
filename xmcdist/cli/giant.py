"""``python -m xmcdist giant``: embeddings of a text graph's nodes; ``giant classify``: how good they are."""

from __future__ import annotations

import sys

from xmcdist.cli.app import run
from xmcdist.cli.ranks import on_all_ranks
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
    from xmcdist.pipelines.giant import giant

    on_all_ranks(cfg, lambda world: giant(cfg, world))


def _classify(cfg: GiantClassifyConfig) -> None:
    if rank_from_environment()[1] > 1:
        raise UserError("giant classify runs in one process: start it without a launcher")
    from xmcdist.pipelines.node_classification import classify

    classify(cfg)
