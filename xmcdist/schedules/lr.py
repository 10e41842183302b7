"""Learning-rate factors as plain functions of the step, so that resuming needs the step alone."""

from __future__ import annotations

import math

from xmcdist.config.errors import UserError
from xmcdist.config.schema import ScheduleConfig

__all__ = ["PLAIN", "lr_factor"]

PLAIN = ("linear", "cosine", "constant", "step", "one_cycle")


def lr_factor(cfg: ScheduleConfig, step: int, total: int) -> float:
    """What to multiply the configured learning rate by at an optimizer step.

    All schedules rise linearly from 0 over the first ``cfg.warmup`` steps, to where they begin.
    Then

    * ``linear`` falls from 1 to 0 at ``total``,
    * ``cosine`` falls there along half a cosine,
    * ``constant`` stays at 1,
    * ``step`` is multiplied by ``step_gamma`` every ``step_every`` steps,
    * ``one_cycle`` rises along half a cosine from 1 / ``start_div`` to 1 within the share ``rise``
      of the steps left, then falls along another to 1 / (``start_div`` ``end_div``) at the last.

    The same factors as transformers' ``get_*_schedule_with_warmup``, torch's ``StepLR`` and its
    ``OneCycleLR`` without cycled momentum.  Sources: Loshchilov & Hutter, SGDR (ICLR 2017) for
    half a cosine; Smith & Topin, Super-Convergence (arXiv:1708.07120) for one cycle.

    Args:
        step: optimizer steps done before this one, counted from 0; may exceed ``total``.
        total: optimizer steps of the level; without effect for ``constant`` and ``step``.

    Returns:
        A factor in [0, 1].

    Raises:
        UserError: ``cfg.name`` is none of these.
        ValueError: a negative step or total.
    """
    if step < 0 or total < 0:
        raise ValueError(f"step={step} and total={total} must not be negative")
    if cfg.name not in PLAIN:
        raise UserError(f"schedule.name={cfg.name} is none of {', '.join(PLAIN)}, the functions of the step")
    if step < cfg.warmup:
        return step / cfg.warmup * (1.0 / cfg.start_div if cfg.name == "one_cycle" else 1.0)
    if cfg.name == "constant":
        return 1.0
    done = step - cfg.warmup
    if cfg.name == "step":
        return cfg.step_gamma ** (done // cfg.step_every)
    if cfg.name == "one_cycle":
        return _one_cycle(cfg, done, total - cfg.warmup)
    if step >= total:
        return 0.0
    share = done / (total - cfg.warmup)
    return 1.0 - share if cfg.name == "linear" else _half_cosine(1.0, 0.0, share)


def _one_cycle(cfg: ScheduleConfig, step: int, total: int) -> float:
    """The first step has the lowest rate of the rise, step ``rise * total - 1`` the highest."""
    low, top, last = 1.0 / cfg.start_div, cfg.rise * total - 1, total - 1
    if step <= top:
        return _half_cosine(low, 1.0, step / top if top > 0 else 1.0)
    begin = max(top, 0.0)
    share = (step - begin) / (last - begin) if last > begin else 1.0
    return _half_cosine(1.0, low / cfg.end_div, min(share, 1.0))


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))
