"""The data order: the same on any number of ranks, every document once an epoch."""

from __future__ import annotations

import numpy as np
import pytest

from xmcdist.data.batches import GlobalBatches, local, sizes


def reference(lengths: list[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The epoch's batches by plain python lists."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths)).tolist()
    sorted_order: list[int] = []
    for start in range(0, len(order), 64 * batch):
        sorted_order += sorted(order[start : start + 64 * batch], key=lambda i: lengths[i])
    batches = [sorted_order[i : i + batch] for i in range(0, len(order), batch)]
    full = [b for b in batches if len(b) == batch]
    return [full[i] for i in rng.permutation(len(full))] + [b for b in batches if len(b) < batch]


@pytest.mark.parametrize(("n", "batch"), [(1, 4), (4, 4), (5, 4), (3, 1), (700, 4), (1000, 3), (64, 128)])
def test_agrees_with_plain_lists(n: int, batch: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 9, n)
    order = GlobalBatches(lengths, batch, seed=7)
    assert order.steps_per_epoch == -(-n // batch)
    for epoch in range(3):
        expected = reference(lengths.tolist(), batch, 7, epoch)
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        got = [order.batch(step) for step in steps]
        assert [b.tolist() for b in got] == expected
        assert sorted(np.concatenate(got)) == list(range(n))
        assert {order.epoch(step) for step in steps} == {epoch}
        assert all(b.dtype == np.int64 for b in got)


def test_a_step_does_not_depend_on_those_before() -> None:
    lengths = np.arange(1, 500, dtype=np.int32)
    onward = GlobalBatches(lengths, 8, seed=0)
    steps = [onward.batch(step).tolist() for step in range(200)]
    for step in (199, 3, 70, 0):
        assert GlobalBatches(lengths, 8, seed=0).batch(step).tolist() == steps[step]
        assert onward.batch(step).tolist() == steps[step]


def test_seed_and_epoch_change_the_order() -> None:
    lengths = np.ones(100)
    a, b = GlobalBatches(lengths, 10, seed=0), GlobalBatches(lengths, 10, seed=1)
    assert a.batch(0).tolist() != b.batch(0).tolist()
    assert a.batch(0).tolist() != a.batch(10).tolist()


def test_the_callers_change_does_not_reach_the_order() -> None:
    order = GlobalBatches(np.ones(10), 5, seed=0)
    first = order.batch(0)
    first[:] = -1
    assert order.batch(0).min() >= 0


def test_batches_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 64 * 16)
    order = GlobalBatches(lengths, 16, seed=0)
    spread = [np.ptp(lengths[order.batch(step)]) for step in range(order.steps_per_epoch)]
    assert np.mean(spread) < 25


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 2, 10, 13])
def test_ranks_part_a_batch(n: int, world: int) -> None:
    ids = np.arange(n) * 3
    parts = [local(ids, rank, world) for rank in range(world)]
    assert np.concatenate(parts).tolist() == ids.tolist()
    assert [len(p) for p in parts] == sizes(n, world)
    assert max(sizes(n, world)) - min(sizes(n, world)) <= 1


def test_refused_arguments() -> None:
    with pytest.raises(ValueError, match="at least one"):
        GlobalBatches(np.zeros(0), 4, seed=0)
    with pytest.raises(ValueError, match="global_batch=0"):
        GlobalBatches(np.ones(3), 0, seed=0)
    with pytest.raises(ValueError, match="step=-1"):
        GlobalBatches(np.ones(3), 2, seed=0).batch(-1)
