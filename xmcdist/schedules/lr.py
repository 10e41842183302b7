"""Learning-rate factors as plain functions of the step, so that resuming needs the step alone."""

from __future__ import annotations

import math

from xmcdist.config.errors import UserError
from xmcdist.config.schema import ScheduleConfig

__all__ = ["lr_factor"]


def lr_factor(cfg: ScheduleConfig, step: int, total: int) -> float:
    """What to multiply the configured learning rate by at an optimizer step.

    All schedules rise linearly from 0 over the first ``cfg.warmup`` steps.  Then ``linear``
    falls to 0 at ``total``, ``cosine`` falls there along half a cosine, and ``constant``
    stays at 1.  The same factors as transformers' ``get_*_schedule_with_warmup``.

    Args:
        step: optimizer steps done before this one, counted from 0; may exceed ``total``.
        total: optimizer steps of the level; without effect for ``constant``.

    Returns:
        A factor in [0, 1].

    Raises:
        UserError: ``cfg.name`` is no schedule.
        ValueError: a negative step or total.
    """
    if step < 0 or total < 0:
        raise ValueError(f"step={step} and total={total} must not be negative")
    if cfg.name not in ("linear", "cosine", "constant"):
        raise UserError(f"schedule.name={cfg.name} is none of linear, cosine, constant")
    if step < cfg.warmup:
        return step / cfg.warmup
    if cfg.name == "constant":
        return 1.0
    if step >= total:
        return 0.0
    done = (step - cfg.warmup) / (total - cfg.warmup)
    return 1.0 - done if cfg.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
