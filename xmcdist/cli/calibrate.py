"""``python -m xmcdist calibrate``: probabilities beside a model's scores."""

from __future__ import annotations

from xmcdist.cli.app import run
from xmcdist.config.commands import CalibrateConfig


def main() -> None:
    """Calibrate a model folder; on several processes when started through ``accelerate launch``."""
    run("calibrate", _calibrate)


def _calibrate(cfg: CalibrateConfig) -> None:
    from xmcdist.parallel.launch import setup, shutdown
    from xmcdist.pipelines.calibration import calibrate

    world = setup(use_gpu=False)
    text = calibrate(cfg, world)
    if world.is_main:
        print(text)
    shutdown()
