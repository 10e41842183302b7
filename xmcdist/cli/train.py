"""``python -m xmcdist train``: from texts and labels to a measured model folder."""

from __future__ import annotations

from xmcdist.cli.app import run
from xmcdist.cli.ranks import on_all_ranks
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
    from xmcdist.pipelines.members import train_members
    from xmcdist.pipelines.train import train

    members = compose_members(_overrides(), cfg, rank_from_environment()[1]) if cfg.members else {}
    on_all_ranks(cfg, lambda world: train_members(cfg, members, world) if members else train(cfg, world))


def _overrides() -> list[str]:
    """What this job was asked for; of a multirun (``-m``), this one of its jobs."""
    from hydra.core.hydra_config import HydraConfig

    return [str(word) for word in HydraConfig.get().overrides.task]
