"""A schedule that follows the loss, in the training loop: one rate on all ranks, exact in checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.ranks import on_ranks
from tests.training import problem, test_schedule_ceiling
from tests.training.problem import NODES, Hooks, Setting
from xmcdist.checkpoint.train_state import StateStore, load_state
from xmcdist.config.schema import ScheduleConfig
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.training import loop
from xmcdist.training.loop import LevelTask, train_level

GREEDY = ScheduleConfig(
    name="greedy",
    warmup=2,
    window=2,
    compare="previous",
    threshold=0.0,
    threshold_mode="abs",
    patience=0,
    factor=0.5,
    min_factor=1 / 8,
    max_factor=8.0,
)
SETTING = Setting(micro_batch=2, dropout=0.2, steps=14, save_every=4)


def _task(setting: Setting, schedule: ScheduleConfig) -> LevelTask:
    return replace(problem.task(setting), schedule=schedule)


def _by_hand(losses: list[float]) -> list[float]:
    """The factor of each step: the mean of two losses against the one before, doubled or halved."""
    factors, factor, before = [], 1.0, float("inf")
    for step in range(len(losses)):
        factors.append(factor * min(step / 2, 1))
        if step >= 2:
            x = sum(losses[max(step - 1, 2) : step + 1]) / len(losses[max(step - 1, 2) : step + 1])
            factor = min(factor * 2, 8.0) if x < before else max(factor / 2, 1 / 8)
            before = x
    return factors


@on_ranks(1, 2, 3)
def test_one_rate_and_one_ceiling_on_all_ranks_from_different_losses_and_resumed_to_the_bit(
    rank: int, world_size: int, tmp_path: Path
) -> None:
    mesh = Mesh.build(World(rank, world_size, rank, world_size, "cpu"))
    local: list[float] = []
    micro = loop._micro_loss

    def spied(*args: Any) -> torch.Tensor:
        loss = micro(*args)
        local.append(float(loss.detach()))
        return loss

    loop._micro_loss = spied  # type: ignore[assignment]

    def run(resume: dict[str, Any] | None, hooks: Hooks) -> tuple[list[torch.Tensor], list[float]]:
        encoder, own = problem.encoder(SETTING), problem.head(rank, world_size)
        engine = problem.engine(SETTING, rank, world_size)
        losses = train_level(engine, encoder, own, _task(SETTING, GREEDY), hooks, resume).losses
        return [*encoder.state_dict().values(), *own.state_dict().values()], losses

    hooks = Hooks()
    straight, losses = run(None, hooks)
    assert len({tuple(x) for x in gather_objects(local)}) == world_size  # what each rank saw by itself
    factors = [row["lr"] / 2e-3 for row in hooks.rows]
    assert gather_objects(factors) == [factors] * world_size
    assert factors == _by_hand(losses)
    assert len(set(factors)) > 4
    assert [row["head_lr"] for row in hooks.rows] == [5e-3 * f for f in factors]

    store = StateStore(tmp_path / "state", mesh, asynchronous=False)
    step, state = hooks.saved[0]
    assert factors[step] not in (0.0, 1.0)  # or the state would say nothing
    store.save(step=step, num_rows=NODES, **state)
    place = store.latest()
    assert place is not None
    rest = Hooks()
    again, last = run(load_state(place, mesh, encoder_like=problem.encoder(SETTING).state_dict()), rest)
    assert [row["lr"] for row in rest.rows] == [row["lr"] for row in hooks.rows[step:]]
    # Of three numbers the sum depends on their order, which DDP changes after its first step.
    allowed = 0.0 if world_size < 3 else 2e-5
    assert np.allclose(last, losses[step:], atol=allowed, rtol=0)
    assert all(torch.allclose(a, b, atol=allowed, rtol=0) for a, b in zip(straight, again, strict=True))
    loop._micro_loss = micro
    test_schedule_ceiling.check_on_ranks(rank, world_size)  # here, as starting ranks takes longer than all else


def test_each_level_begins_anew() -> None:
    hooks = Hooks()
    setting = Setting(steps=8)
    for _ in range(2):
        engine, encoder = problem.engine(setting), problem.encoder(setting)
        train_level(engine, encoder, problem.head(), _task(setting, GREEDY), hooks)
    rates = [row["lr"] for row in hooks.rows]
    assert rates[:8] == rates[8:]
    assert len(set(rates)) > 3


def test_a_step_that_was_left_out_is_not_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, hooks = Setting(steps=9), Hooks()
    micro = loop._micro_loss
    calls = 0

    def poisoned(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return micro(*args) * (float("nan") if calls in (5, 6) else 1.0)

    monkeypatch.setattr(loop, "_micro_loss", poisoned)
    losses = train_level(
        problem.engine(setting), problem.encoder(setting), problem.head(), _task(setting, GREEDY), hooks
    ).losses
    assert np.isnan(losses[4:6]).all()
    want = _by_hand([x for x in losses if np.isfinite(x)])
    assert [row["lr"] / 2e-3 for row in hooks.rows] == [*want[:4], want[4], want[4], *want[4:]]


def test_validation_is_fed_with_its_sign_turned() -> None:
    setting = Setting(steps=10, validation_fraction=0.1, eval_every=2, patience=9)
    schedule = replace(GREEDY, metric="validation", window=1, compare="best", warmup=0)
    hooks = Hooks([0.1, 0.3, 0.2, 0.2, 0.4])
    train_level(problem.engine(setting), problem.encoder(setting), problem.head(), _task(setting, schedule), hooks)
    assert [row["lr"] / 2e-3 for row in hooks.rows] == [1, 1, 2, 2, 4, 4, 2, 2, 1, 1]
