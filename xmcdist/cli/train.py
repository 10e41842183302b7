"""``python -m xmcdist train``: from texts and labels to a measured model folder."""

from __future__ import annotations

from xmcdist.cli.app import run
from xmcdist.config.schema import RunConfig


def main() -> None:
    """Train; on several processes when started through ``accelerate launch``."""
    run("train", _train)


def _train(cfg: RunConfig) -> None:
    from xmcdist.parallel.launch import setup, shutdown
    from xmcdist.pipelines.train import train

    world = setup(use_gpu=cfg.engine.name != "cpu", timeout_s=cfg.engine.timeout_s)
    train(cfg, world)
    shutdown()
