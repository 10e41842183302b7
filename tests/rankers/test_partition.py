"""Cutting clusters into ranges, against trying every cut."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest

from tests.rankers.tiny import problem
from xmcdist.rankers.partition import cluster_ranges, estimate_costs, level_costs, member_sizes, node_ranges
from xmcdist.sparse.features import Features


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_the_costliest_range_is_as_cheap_as_can_be(seed: int, world_size: int) -> None:
    costs = np.random.default_rng(seed).integers(1, 50, 7).astype(float)
    ranges = cluster_ranges(costs, world_size)
    assert len(ranges) == world_size
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 7
    assert all(a[1] == b[0] and a[0] <= a[1] for a, b in pairwise(ranges))
    best = min(
        max(costs[a:b].sum() for a, b in pairwise((0, *cuts, 7)))
        for cuts in combinations_with_replacement(range(8), world_size - 1)
    )
    assert max(costs[a:b].sum() for a, b in ranges) == pytest.approx(best)


def test_nodes_of_a_single_cluster_are_shared_out() -> None:
    assert node_ranges(np.array([80.0]), np.array([0, 16]), 4) == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert node_ranges(np.array([6.0, 1.0, 6.0]), np.array([0, 6, 6, 12]), 2) == [(0, 6), (6, 12)]


def test_costs_count_the_stored_values_of_a_clusters_documents() -> None:
    p = problem()
    words = (p.X.toarray() != 0).sum(1)
    member = p.M.toarray() > 0
    for features, width in ((p.both, 4), (Features(p.X, None), 0), (Features(None, p.E), 4)):
        sparse = words if features.sparse is not None else np.zeros_like(words)
        want = []
        for c in range(4):
            values = sum(int(sparse[i]) + width + 1 for i in range(len(words)) if member[i, c])
            in_memory = sum(8 * int(sparse[i]) + 4 * width for i in range(len(words)) if member[i, c])
            want.append(values * (1 + in_memory / 2**24) * (p.child_ptr[c + 1] - p.child_ptr[c]) + 1)
        np.testing.assert_allclose(estimate_costs(features, p.M, p.child_ptr), want, rtol=1e-12)
    huge = np.array([[10**9, 0], [10**9, 10**9]])
    assert level_costs(huge, 0, np.array([0, 1, 2])).tolist() == [10**9 + 1, 10**10 + 1]  # at most five times


def test_documents_counted_by_parts_add_up() -> None:
    p = problem()
    whole = member_sizes(p.both, p.M)
    parts = [member_sizes(p.both.rows(a, b), p.M[a:b]) for a, b in ((0, 7), (7, 7), (7, 120))]
    assert np.array_equal(sum(parts), whole)
    assert whole.dtype == np.int64
    assert whole[:, 0].tolist() == (p.M.toarray() > 0).sum(0).tolist()
