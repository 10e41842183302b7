"""Settings of schedules that cannot be are told, all at once."""

from __future__ import annotations

import pytest

from xmcdist.config.compose import compose_run
from xmcdist.config.errors import ConfigError

FAULTS = {
    "schedule.name=greedy": None,
    "schedule.metric=validation": "schedule.metric=validation needs documents to validate on",
    "schedule.compare=beste": "schedule.compare=beste is none of window_before, previous, best; did you mean best?",
    "schedule.factor=1.0": "schedule.factor=1.0 must be in (0, 1)",
    "schedule.min_factor=0": "schedule.min_factor=0.0 must be in (0, 1]",
    "schedule.max_factor=0.5": "schedule.max_factor=0.5 must be at least 1",
    "schedule.window=1": "schedule.threshold_mode=noise needs schedule.window of at least 2",
    "schedule.patience=2": "schedule.patience=2 cuts the rate at the 3. evaluation",
    "schedule.max_head_lr=auto": "schedule.max_head_lr=auto is a bound of plain gradient descent",
    "schedule.step_gamma=0": "schedule.step_gamma=0.0 must be in (0, 1]",
    "schedule.rise=0.4": "schedule.rise=0.4 has no effect on schedule.name=greedy: it is of one_cycle",
    "optimizer.head=sparse_adam": None,
    "optimizer.weight_decay=0.1": "optimizer.weight_decay=0.1 has no effect on optimizer.head=sparse_adam",
}


def test_all_faults_are_told() -> None:
    with pytest.raises(ConfigError) as told:
        compose_run(["encoder=tiny", "dataset.path=somewhere", *FAULTS])
    lines = str(told.value).splitlines()
    wanted = [fault for fault in FAULTS.values() if fault]
    assert [sum(fault in line for line in lines) for fault in wanted] == [1] * len(wanted)
    assert len(lines) == len(wanted) + 1  # the share of a cut of step is wrong, and has no effect, too


@pytest.mark.parametrize(("limit", "fault"), [("-1", True), ("much", True), ("0.5", False), ("auto", False)])
def test_the_bound_of_the_heads_rate_is_a_number_or_auto(limit: str, fault: bool) -> None:
    settings = ["encoder=tiny", "dataset.path=somewhere", "optimizer.head=sgd", f"schedule.max_head_lr={limit}"]
    if not fault:
        assert compose_run(settings).schedule.max_head_lr == limit
        return
    with pytest.raises(ConfigError, match="must be a positive number, auto or null"):
        compose_run(settings)
