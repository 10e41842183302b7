"""Learning-rate schedules as pure functions of the step, so that resuming needs only the step."""

from __future__ import annotations

import math

from xmcdist.config.schema import ScheduleConfig

__all__ = ["lr_factor"]


def lr_factor(cfg: ScheduleConfig, step: int, total: int) -> float:
    """What the learning rate of optimizer step ``step`` (from 0) is multiplied with.

    Linear warm-up over ``cfg.warmup`` steps from 0, then linear or half-cosine decay to 0
    at ``total``, or constant; the values of transformers' schedules of these names.

    Raises:
        ValueError: unknown name.
    """
    if cfg.warmup and step < cfg.warmup:
        return step / max(1, cfg.warmup)
    progress = (step - cfg.warmup) / max(1, total - cfg.warmup)
    if cfg.name == "linear":
        return max(0.0, 1.0 - progress)
    if cfg.name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0))))
    if cfg.name == "constant":
        return 1.0
    raise ValueError(f"schedule.name={cfg.name} is none of linear, cosine, constant")
