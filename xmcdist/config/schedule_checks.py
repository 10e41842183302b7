"""What must hold of the settings of a learning-rate schedule, alone and with others."""

from __future__ import annotations

from collections.abc import Sequence

from xmcdist.config.schema import RunConfig, ScheduleConfig

__all__ = ["SCHEDULE_AT_LEAST", "SCHEDULE_CHOICES", "schedule_faults"]

SCHEDULE_CHOICES: dict[str, Sequence[str]] = {
    "schedule.name": ("linear", "cosine", "constant", "step", "one_cycle", "greedy"),
    "schedule.metric": ("train_loss", "validation"),
    "schedule.compare": ("window_before", "previous", "best"),
    "schedule.threshold_mode": ("noise", "rel", "abs"),
    "schedule.waiting": ("all", "own"),
}
SCHEDULE_AT_LEAST: dict[str, float] = {
    "schedule.warmup": 0,
    "schedule.step_every": 1,
    "schedule.start_div": 1,
    "schedule.end_div": 1,
    "schedule.window": 1,
    "schedule.patience": 0,
    "schedule.threshold": 0,
    "schedule.max_factor": 1,
    "schedule.wait_after_cut": 0,
    "schedule.wait_after_raise": 0,
    "schedule.reset_after": 1,
}

_ONLY: dict[str, tuple[str, ...]] = {
    "step": ("step_every", "step_gamma"),
    "one_cycle": ("rise", "start_div", "end_div"),
    "greedy": (
        "metric",
        "window",
        "compare",
        "threshold",
        "threshold_mode",
        "patience",
        "factor",
        "min_factor",
        "max_factor",
        "wait_after_cut",
        "wait_after_raise",
        "waiting",
        "reset_after",
    ),
}


def schedule_faults(cfg: RunConfig) -> list[tuple[bool, str]]:
    """Whether each fault is there, and the sentence that tells it."""
    s, m = cfg.schedule, cfg.matcher
    validated = s.name == "greedy" and s.metric == "validation"
    default = ScheduleConfig()
    return [
        *(
            (
                s.name != owner and getattr(s, name) != getattr(default, name),
                f"schedule.{name}={getattr(s, name)} has no effect on schedule.name={s.name}: it is of {owner}",
            )
            for owner, names in _ONLY.items()
            for name in names
        ),
        *(
            (not 0 < getattr(s, name) < 1, f"schedule.{name}={getattr(s, name)} must be in (0, 1)")
            for name in ("factor", "rise")
        ),
        *(
            (not 0 < getattr(s, name) <= 1, f"schedule.{name}={getattr(s, name)} must be in (0, 1]")
            for name in ("step_gamma", "min_factor")
        ),
        (
            s.threshold_mode == "noise" and s.window == 1,
            "schedule.threshold_mode=noise needs schedule.window of at least 2: one value tells nothing of its noise",
        ),
        (
            validated and not m.validation_fraction,
            "schedule.metric=validation needs documents to validate on: set matcher.validation_fraction",
        ),
        (
            validated and s.patience + 1 >= m.patience,
            f"schedule.patience={s.patience} cuts the rate at the {s.patience + 1}. evaluation in a row without "
            f"improvement, and matcher.patience={m.patience} ends the level no later: raise matcher.patience",
        ),
        *_head_lr_faults(cfg),
    ]


def _head_lr_faults(cfg: RunConfig) -> list[tuple[bool, str]]:
    limit = cfg.schedule.max_head_lr
    if limit is None:
        return []
    if limit == "auto":
        return [
            (
                cfg.optimizer.head != "sgd",
                f"schedule.max_head_lr=auto is a bound of plain gradient descent, and says nothing of "
                f"optimizer.head={cfg.optimizer.head}: use optimizer.head=sgd, or give a number",
            )
        ]
    try:
        number = float(limit)
    except ValueError:
        number = 0.0
    return [(not number > 0, f"schedule.max_head_lr={limit} must be a positive number, auto or null")]
