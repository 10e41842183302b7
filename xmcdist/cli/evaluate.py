"""``python -m xmcdist evaluate``: measure a model folder on a data set's test split."""

from __future__ import annotations

from xmcdist.cli.app import run
from xmcdist.config.commands import EvaluateConfig


def main() -> None:
    """Evaluate a model folder; on several processes when started through ``accelerate launch``."""
    run("evaluate", _evaluate)


def _evaluate(cfg: EvaluateConfig) -> None:
    from xmcdist.evaluation.table import format_table
    from xmcdist.parallel.launch import setup, shutdown
    from xmcdist.pipelines.evaluation import TABLE_KEYS, evaluate_model

    world = setup(use_gpu=False)
    metrics = evaluate_model(cfg, world)
    if world.is_main:
        print(format_table({"model": metrics}, TABLE_KEYS))
    shutdown()
