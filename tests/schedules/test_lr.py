"""Factors against transformers' and torch's schedulers stepping a dummy optimizer."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, SequentialLR, StepLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from xmcdist.config.errors import UserError
from xmcdist.config.schema import ScheduleConfig
from xmcdist.schedules.lr import lr_factor

CASES = [(0, 10), (1, 10), (3, 10), (10, 10), (15, 10), (0, 1), (7, 100)]


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def _reference(name: str, warmup: int, total: int, steps: int) -> list[float]:
    optimizer = _optimizer()
    if name == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    elif name == "linear":
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    else:
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    return _followed(optimizer, scheduler, steps)


def _followed(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> list[float]:
    factors = []
    for step in range(steps):
        factors.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return factors


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "total"), CASES)
def test_equals_transformers(name: str, warmup: int, total: int) -> None:
    steps = total  # beyond the end a cosine of transformers may rise again; ours stays 0
    got = [lr_factor(ScheduleConfig(name=name, warmup=warmup), step, total) for step in range(steps)]
    assert got == pytest.approx(_reference(name, warmup, total, steps), abs=1e-12)


@pytest.mark.parametrize(("warmup", "every", "gamma"), [(0, 5, 0.1), (3, 4, 0.5), (7, 30, 0.9), (2, 1, 1.0)])
def test_step_equals_torch(warmup: int, every: int, gamma: float) -> None:
    optimizer = _optimizer()
    scheduler: LRScheduler = StepLR(optimizer, every, gamma)
    if warmup:
        optimizer = _optimizer()
        rise = LambdaLR(optimizer, lambda step: step / warmup)
        scheduler = SequentialLR(optimizer, [rise, StepLR(optimizer, every, gamma)], [warmup])
    cfg = ScheduleConfig(name="step", warmup=warmup, step_every=every, step_gamma=gamma)
    got = [lr_factor(cfg, step, 1) for step in range(40)]
    assert got == pytest.approx(_followed(optimizer, scheduler, 40), abs=1e-12)


@pytest.mark.parametrize(
    ("total", "rise", "start", "end"), [(100, 0.3, 25.0, 1e4), (37, 0.5, 10.0, 7.0), (10, 0.9, 2.0, 1.0)]
)
def test_one_cycle_equals_torch(total: int, rise: float, start: float, end: float) -> None:
    optimizer = _optimizer()
    scheduler = OneCycleLR(
        optimizer,
        1.0,
        total_steps=total,
        pct_start=rise,
        div_factor=start,
        final_div_factor=end,
        cycle_momentum=False,
    )
    cfg = ScheduleConfig(name="one_cycle", warmup=0, rise=rise, start_div=start, end_div=end)
    want = _followed(optimizer, scheduler, total)
    assert [lr_factor(cfg, step, total) for step in range(total)] == pytest.approx(want, abs=1e-12)
    assert lr_factor(cfg, total + 5, total) == pytest.approx(want[-1], abs=1e-12)
    cfg.warmup = 4  # rises to where the cycle begins, which then has the steps that are left
    assert [lr_factor(cfg, step, total + 4) for step in range(5)] == pytest.approx([i / 4 / start for i in range(5)])
    assert [lr_factor(cfg, step, total + 4) for step in range(4, total + 4)] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_one_cycle_of_very_few_steps_ends_low(total: int) -> None:
    cfg = ScheduleConfig(name="one_cycle", warmup=0)
    factors = [lr_factor(cfg, step, total) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    assert factors[-1] < 1e-3 or total == 1


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_nothing_is_learned_past_the_end(name: str) -> None:
    cfg = ScheduleConfig(name=name, warmup=2)
    assert [lr_factor(cfg, step, 10) for step in (10, 11, 25)] == [0.0, 0.0, 0.0]


def test_values_by_hand() -> None:
    linear, cosine = ScheduleConfig(name="linear", warmup=4), ScheduleConfig(name="cosine", warmup=4)
    assert [lr_factor(linear, step, 12) for step in (0, 2, 4, 8, 12)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert [lr_factor(cosine, step, 12) for step in (4, 8)] == pytest.approx([1.0, 0.5])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match=r"schedule\.name=greedy"):
        lr_factor(ScheduleConfig(name="greedy"), 0, 10)
    with pytest.raises(ValueError, match="step=-1"):
        lr_factor(ScheduleConfig(), -1, 10)
