"""Factors against transformers' schedulers stepping a dummy optimizer."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from xmcdist.config.errors import UserError
from xmcdist.config.schema import ScheduleConfig
from xmcdist.schedules.lr import lr_factor

CASES = [(0, 10), (1, 10), (3, 10), (10, 10), (15, 10), (0, 1), (7, 100)]


def _reference(name: str, warmup: int, total: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    if name == "constant":
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    elif name == "linear":
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    else:
        scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    factors = []
    for _ in range(steps):
        factors.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "total"), CASES)
def test_equals_transformers(name: str, warmup: int, total: int) -> None:
    steps = total  # beyond the end a cosine of transformers may rise again; ours stays 0
    got = [lr_factor(ScheduleConfig(name=name, warmup=warmup), step, total) for step in range(steps)]
    assert got == pytest.approx(_reference(name, warmup, total, steps), abs=1e-12)


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
