"""``python -m xmcdist predict``: labels for the lines of a file, as JSONL."""

from __future__ import annotations

from xmcdist.cli.app import run
from xmcdist.config.commands import PredictConfig


def main() -> None:
    """Predict with a model folder; on several processes when started through ``accelerate launch``."""
    run("predict", _predict)


def _predict(cfg: PredictConfig) -> None:
    from xmcdist.parallel.launch import setup, shutdown
    from xmcdist.pipelines.predict import predict_file

    world = setup(use_gpu=False)
    count = predict_file(cfg, world)
    if world.is_main:
        print(f"{count} documents -> {cfg.output}")
    shutdown()
