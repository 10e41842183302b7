"""GreedyLR against tables written by hand, transformers' own, and rates that were set wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GreedyLR

from xmcdist.config.schema import ScheduleConfig
from xmcdist.schedules.greedy import Greedy
from xmcdist.schedules.level import LevelSchedule

PLAIN: dict[str, Any] = {"name": "greedy", "threshold": 0.0, "threshold_mode": "abs", "warmup": 0}
TRACED = ScheduleConfig(
    **PLAIN,
    window=1,
    compare="best",
    patience=1,
    factor=0.5,
    min_factor=0.25,
    max_factor=2.0,
    wait_after_cut=1,
    wait_after_raise=1,
    reset_after=2,
)
METRIC = [5, 4, 3, 4.5, 4, 9, 9, 9, 1, 9, 9, 9, 9, 9, 7, 7, 6, 5, 5, 4]
# Nothing is compared while it waits: 3 and 1 are never the best.  Two cuts at the floor start it anew.
ALL = [1, 2, 2, 2, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 1, 1, 1, 2, 2, 2, 2]
# 3 and 1 are compared and become the best; after the new start 7 counts at once, the second 7 does not.
OWN = [1, 2, 2, 2, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 1, 1, 1, 1, 2, 2, 2]


def _changed(cfg: ScheduleConfig, **values: Any) -> ScheduleConfig:
    return ScheduleConfig(**{**vars(cfg), **values})


@pytest.mark.parametrize(("waiting", "want"), [("all", ALL), ("own", OWN)])
def test_the_trace_is_that_of_the_table(waiting: str, want: list[float]) -> None:
    greedy = Greedy(_changed(TRACED, waiting=waiting))
    assert [greedy.feed(m) for m in METRIC] == want


def test_a_window_is_compared_with_the_one_before() -> None:
    cfg = _changed(TRACED, compare="window_before", window=2, patience=0, max_factor=4.0)
    cfg = _changed(cfg, wait_after_cut=0, wait_after_raise=0)
    greedy = Greedy(cfg)
    # averages of two: -, -, -, 4 < 7, 6 > 5, 4 = 4, 1 < 6
    assert [greedy.feed(m) for m in (8, 6, 4, 4, 8, 0, 2)] == [1, 1, 1, 2, 1, 0.5, 1]


def test_the_previous_average_is_compared_with() -> None:
    greedy = Greedy(_changed(TRACED, compare="previous", wait_after_cut=0, wait_after_raise=0))
    # better: 5 (the first), 4; not 6, 6; then 5.5 and 5, though 4 was better than both
    assert [greedy.feed(m) for m in (5, 4, 6, 6, 5.5, 5)] == [1, 2, 2, 1, 1, 2]


def test_noise_is_the_standard_error() -> None:
    # averages 7 and 4: the squared error of the first is 2 / 2, of the second 0
    cfg = _changed(TRACED, compare="window_before", window=2, patience=0, threshold_mode="noise")
    for threshold, factor in ((2.9, 2.0), (3.0, 0.5)):
        greedy = Greedy(_changed(cfg, threshold=threshold))
        assert [greedy.feed(m) for m in (8, 6, 4, 4)][-1] == factor


def test_a_relative_threshold_of_a_negative_metric_asks_for_more_not_less() -> None:
    for metric, factor in ((-1.05, 0.5), (-1.2, 2.0)):
        greedy = Greedy(_changed(TRACED, patience=0, threshold=0.1, threshold_mode="rel", wait_after_raise=0))
        greedy.feed(-1.0)
        greedy.factor = 1.0
        assert greedy.feed(metric) == factor


def _walk(rng: np.random.Generator, drift: float) -> list[float]:
    """A metric that drifts, above 0, as a relative threshold of theirs wants it."""
    values: list[float] = (8 + np.cumsum(rng.normal(drift, 0.1, 150)) + rng.normal(0, 0.05, 150)).tolist()
    assert min(values) > 0
    return values


def test_equals_transformers_where_it_is_meant_to() -> None:
    rng = np.random.default_rng(0)
    raised = cut = anew = 0
    for case in range(40):
        mode, largest = ("abs", "rel")[case % 2], case % 3 == 0
        smooth, window = bool(rng.integers(2)), int(rng.integers(2, 8))
        same: dict[str, Any] = {"factor": float(rng.uniform(0.5, 0.95)), "patience": int(rng.integers(0, 4))}
        waits, anew_after = rng.integers(0, 3, 2).tolist(), int(rng.integers(1, 5))
        threshold = float(rng.choice([0.0, 1e-3, 0.05]))
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = GreedyLR(
            optimizer,
            mode="max" if largest else "min",
            threshold=threshold,
            threshold_mode=mode,
            cooldown=waits[0],
            warmup=waits[1],
            min_lr=0.1,
            max_lr=5.0,
            eps=0.0,
            smooth=smooth,
            window_size=window,
            reset_start=anew_after,
            **same,
        )
        ours = Greedy(
            ScheduleConfig(
                name="greedy",
                compare="best",
                threshold=threshold,
                threshold_mode=mode,
                wait_after_cut=waits[0],
                wait_after_raise=waits[1],
                min_factor=0.1,
                max_factor=5.0,
                window=window if smooth else 1,
                reset_after=anew_after,
                **same,
            )
        )
        before = 1.0
        for metric in _walk(rng, (0.03, -0.03)[case % 4 // 2]):
            theirs.step(metric)
            factor = ours.feed(-metric if largest else metric)
            assert abs(factor / optimizer.param_groups[0]["lr"] - 1) < 1e-12, case
            raised, cut, anew = (
                raised + (factor > before),
                cut + (factor < before),
                anew + (before == 0.1 < 1 == factor),
            )
            before = factor
    assert min(raised, cut, anew) > 20


def _classes(rate: float, cfg: ScheduleConfig, flipped: bool = False) -> float:
    """Loss on all documents after Adam with small batches, on a fixed two-class problem."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 20)) * np.linspace(0.3, 2, 20)
    y = np.sign(X @ rng.normal(size=20) / np.sqrt(20) + 0.5 * rng.normal(size=600))
    w, m, v, schedule = np.zeros(20), np.zeros(20), np.zeros(20), LevelSchedule(cfg, 2000)

    def loss(some: Any) -> tuple[float, Any]:
        gap = np.maximum(0, 1 - y[some] * (X[some] @ w))
        return float((gap**2).mean()), -2 * X[some].T @ (y[some] * gap) / len(gap)

    for step in range(2000):
        value, g = loss(rng.integers(0, 600, 16))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        up = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        w = w - rate * schedule.factor(step) * up
        schedule.trained(step, -value if flipped else value)
    return loss(slice(None))[0]


def test_a_rate_wrong_by_a_thousand_is_mended_and_not_by_the_rule_with_its_sign_turned() -> None:
    constant = ScheduleConfig(name="constant", warmup=0)
    best, rate = min((_classes(rate, constant), rate) for rate in 10.0 ** np.arange(-4, 0, 0.5))
    wide = ScheduleConfig(name="greedy", warmup=0, min_factor=1e-5, max_factor=1e5)
    for wrong in (1e-3, 1e3):
        assert _classes(rate * wrong, constant) > 3 * best  # so that there is something to mend
        assert _classes(rate * wrong, wide) < 2 * best
        assert _classes(rate * wrong, wide, flipped=True) > 2 * best


@pytest.mark.parametrize("compare", ["best", "previous", "window_before"])
@pytest.mark.parametrize("waiting", ["all", "own"])
def test_going_on_from_json_is_exact(compare: str, waiting: str) -> None:
    cfg = ScheduleConfig(
        name="greedy", compare=compare, waiting=waiting, window=3, patience=1, wait_after_cut=2, wait_after_raise=1
    )
    metric = (1 + np.random.default_rng(1).normal(0, 1 / 3, 200)).tolist()
    straight = Greedy(cfg)
    want = [straight.feed(m) for m in metric]
    assert len(set(want)) > 4
    greedy, got = Greedy(cfg), []
    for m in metric:
        saved = json.loads(json.dumps(greedy.state(), allow_nan=False))
        greedy = Greedy(cfg)
        greedy.load(saved)
        got.append(greedy.feed(m))
    assert got == want


def test_it_is_fed_behind_the_warm_up_and_with_its_own_metric_alone() -> None:
    cfg = _changed(TRACED, warmup=4, patience=0, wait_after_raise=0)
    by_loss = LevelSchedule(cfg, 100)
    for step in range(4):
        assert by_loss.factor(step) == step / 4
        by_loss.trained(step, 1.0)
    assert by_loss.factor(4) == 1.0  # nothing was fed
    by_loss.evaluated(5, 0.5)
    assert by_loss.factor(5) == 1.0
    by_loss.trained(5, 1.0)
    assert by_loss.factor(6) == 2.0
    by_score = LevelSchedule(_changed(cfg, metric="validation", factor=0.7), 100)
    by_score.trained(5, 1.0)
    assert by_score.factor(6) == 1.0
    by_score.evaluated(6, 0.5)
    by_score.evaluated(8, 0.4)  # a smaller score is worse
    assert by_score.factor(9) == pytest.approx(1.0)
    by_score.evaluated(12, 0.6)
    assert by_score.factor(13) == 1.0  # a pause of one after the cut
    by_score.evaluated(14, 0.6)
    assert by_score.factor(15) == pytest.approx(1 / 0.7)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"factor=1\.5"):
        Greedy(ScheduleConfig(factor=1.5))
    with pytest.raises(ValueError, match="compare=worst"):
        Greedy(ScheduleConfig(compare="worst"))
