from __future__ import annotations

import numpy as np
import pytest

from xmcdist.trees.halving import lower_half, rearrange
from xmcdist.trees.kernels import bisect_subtree, pack_columns, pick_two
from xmcdist.trees.matrix import frozen

_RNG = np.random.default_rng(0)
_SCORES = {
    "few": _RNG.normal(size=21),
    "two": np.array([0.5, -0.5]),
    "many": _RNG.normal(size=5001),
    "nearly all alike": np.where(_RNG.random(3000) < 0.99, 0.0, _RNG.normal(size=3000)),
    "alike": np.full(999, 0.25),
    "few values": _RNG.integers(0, 4, 4000) / 4,
    "one far away": np.append(_RNG.normal(size=2000), 1e8),
    "next to zero": _RNG.normal(size=500) * 1e-40,
    "neighbouring numbers": 1 + _RNG.integers(0, 9, 2000) * 2.0**-23,
}


@pytest.mark.parametrize("name", _SCORES)
def test_the_lower_half_by_sorting(name: str) -> None:
    scores = _SCORES[name].astype(np.float32)
    n = len(scores)
    want = np.ones(n, dtype=np.uint8)
    want[np.argsort(scores, kind="stable")[: n // 2]] = 0
    side = np.full(n, 7, dtype=np.uint8)
    lower_half(scores, side, np.empty(n + 1, dtype=np.float32))
    np.testing.assert_array_equal(side, want)


def test_left_ones_come_first_in_the_order_they_had() -> None:
    members = _RNG.permutation(301).astype(np.uint32)
    side = (_RNG.random(301) < 0.6).astype(np.uint8)
    want = np.concatenate([members[side == 0], members[side == 1]])
    rearrange(members, side, np.empty(302, dtype=np.uint32))
    np.testing.assert_array_equal(members, want)


def test_picks_differ_and_reach_every_pair() -> None:
    seen = {pick_two(np.uint64(3), depth, node, 4) for depth in range(20) for node in range(40)}
    assert seen == {(a, b) for a in range(4) for b in range(4) if a != b}


def test_packed_columns_are_the_same_rows_renumbered_in_order_of_appearance() -> None:
    rows = [[7, 2], [], [2, 9, 0], [5, 7]]
    indptr = np.cumsum([0, *(len(row) for row in rows)]).astype(np.uint64)
    indices = np.array([c for row in rows for c in row], dtype=np.uint32)
    at, columns, where = np.full(4, 99, dtype=np.uint64), np.empty(5, dtype=np.uint32), np.zeros(10, dtype=np.uint32)
    members = np.array([2, 0], dtype=np.uint32)
    assert pack_columns(indptr, indices, members, columns, at, where, np.empty(10, dtype=np.uint32)) == 4
    np.testing.assert_array_equal(columns, [0, 1, 2, 3, 0])
    np.testing.assert_array_equal(at[[2, 0]], [0, 3])
    assert not where.any()


def test_renumbering_on_the_way_down_changes_nothing() -> None:
    """Nodes with few values for their columns: 4 of 500."""
    n, D = 64, 500
    indptr = np.arange(0, 4 * n + 1, 4).astype(np.uint64)
    indices = np.concatenate([np.sort(_RNG.choice(D, 4, replace=False)) for _ in range(n)]).astype(np.uint32)
    data, dense = frozen(_RNG.random(4 * n, dtype=np.float32) / 2), frozen(np.zeros((n, 0), dtype=np.float32))
    at, found = indptr[:-1].copy(), []
    for own in (np.empty(0, dtype=np.uint32), indices.copy()):
        members, where = np.arange(n, dtype=np.uint32), np.zeros(D, dtype=np.uint32)
        sums = [np.empty(D, dtype=np.int64) for _ in range(2)]
        used = bisect_subtree(
            frozen(indptr), frozen(at), frozen(own if own.size else indices), own, data, dense, members, D,
            np.uint64(0), False, 0, 0, 4, 20, where, np.empty(D, dtype=np.uint32), *sums, np.empty(D, dtype=np.float32),
        )  # fmt: skip
        assert not where.any()
        found.append((members, used))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == D
    assert found[1][1] == len(np.unique(indices))
