"""``python -m xmcdist predict``: labels for the lines of a file, as JSONL."""

from __future__ import annotations

from xmcdist.cli.app import run
from xmcdist.config.schema import PredictConfig


def main() -> None:
    """Predict with a model folder."""
    run("predict", _predict)


def _predict(cfg: PredictConfig) -> None:
    from xmcdist.pipelines.predict import predict_file

    count = predict_file(cfg)
    print(f"{count} documents -> {cfg.output}")
