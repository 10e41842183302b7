"""Nodes side by side: the vector operations against plain numpy, and that a lane never sees another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from tests.rankers.tiny import objective, problem, reference
from xmcdist.rankers import lanes as v
from xmcdist.rankers import solver
from xmcdist.rankers.solver import SolverParams, solve_level

WIDTHS = [4, 8, 16]
KINDS = [np.float32, np.float64]


@njit
def _over_words(width: Any, cols: Any, vals: Any, begin: Any, end: Any, weights: Any, vector: Any, adds: bool) -> None:
    if adds:
        v.add_sparse(width, cols, vals, begin, end, weights, vector)
    else:
        v.sparse_products(width, cols, vals, begin, end, weights, vector)


@njit
def _over_all(width: Any, row: Any, weights: Any, vector: Any, adds: bool) -> None:
    if adds:
        v.add_dense(width, row, weights, vector)
    else:
        v.dense_products(width, row, weights, vector)


@njit
def _step(
    width: Any,
    on: Any,
    yes: Any,
    margin: Any,
    row: Any,
    alpha: Any,
    cost: Any,
    norm: Any,
    bounds: Any,
    hinge: Any,
    out: Any,
) -> Any:
    return v.dual_step(width, on, yes, margin, row, alpha, cost, norm, bounds, hinge, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lanes", WIDTHS)
def test_products_and_additions_are_those_of_numpy(lanes: int, kind: type) -> None:
    rng = np.random.default_rng(lanes)
    weights = rng.normal(size=(30, lanes)).astype(kind)
    vals = rng.normal(size=20).astype(np.float32)
    cols = rng.permutation(30)[:20].astype(np.uint32)
    for begin, count in ((0, 0), (1, 1), (3, 3), (2, 4), (5, 7), (0, 20)):
        span = slice(begin, begin + count)
        start = rng.normal(size=(1, lanes)).astype(kind)
        out, plain = start.copy(), start + vals[span] @ weights[cols[span]]
        _over_words((0,) * lanes, cols, vals, np.uint64(begin), np.uint64(begin + count), weights, out, False)
        np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-5)
        dense, again = vals[span], start.copy()
        _over_all((0,) * lanes, dense, weights, again, False)
        np.testing.assert_allclose(again, start + dense @ weights[:count], rtol=1e-5, atol=1e-5)

        changed, want = weights.copy(), weights.copy()
        want[cols[span]] += vals[span, None] * start
        _over_words((0,) * lanes, cols, vals, np.uint64(begin), np.uint64(begin + count), changed, start, True)
        np.testing.assert_allclose(changed, want, rtol=1e-5, atol=1e-6)
        changed, want = weights.copy(), weights.copy()
        want[:count] += dense[:, None] * start
        _over_all((0,) * lanes, dense, changed, start, True)
        np.testing.assert_allclose(changed, want, rtol=1e-5, atol=1e-6)


def _step_by_hand(
    y: float, margin: float, a: float, c: float, norm: float, bounds: list[float], hinge: bool
) -> tuple[bool, float, float | None]:
    """Whether the lane stays, its new alpha, its projected gradient."""
    above, below = bounds
    diagonal, top = (0.0, c) if hinge else (c, np.inf)
    gradient = y * margin - 1 + a * diagonal
    if (a <= 0 and gradient > above) or (a >= top and gradient < below):
        return False, a, None
    projected = min(gradient, 0.0) if a <= 0 else max(gradient, 0.0) if a >= top else gradient
    new = min(max(a - gradient / (norm + diagonal), 0.0), top) if projected != 0 else a
    return True, new, projected


@pytest.mark.parametrize("hinge", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lanes", WIDTHS)
def test_a_step_minimises_every_lane(lanes: int, kind: type, hinge: bool) -> None:
    rng = np.random.default_rng(7)
    left_out = moved_any = 0
    for _ in range(40):
        cost = rng.uniform(0.3, 2, (3, lanes)).astype(kind)
        alpha = rng.choice([0.0, 0.2, 5.0], (3, lanes)).astype(kind)
        alpha = np.minimum(alpha, cost) if hinge else alpha
        margin = rng.normal(size=(1, lanes)).astype(kind) * 2
        bounds = np.stack([rng.uniform(0, 2, lanes), rng.uniform(-2, 0, lanes), *np.zeros((2, lanes))]).astype(kind)
        bounds[2], bounds[3] = -np.inf, np.inf
        on, yes = (int(x) for x in rng.integers(0, 1 << lanes, 2))
        before, out = alpha.copy(), np.empty((1, lanes), kind)
        found = int(
            _step(
                (0,) * lanes, np.uint16(on), np.uint16(yes), margin, np.uint64(1), alpha, cost, 0.8, bounds, hinge, out
            )
        )
        assert (alpha[[0, 2]] == before[[0, 2]]).all()
        for j in range(lanes):
            y = 1.0 if yes >> j & 1 else -1.0
            if not on >> j & 1:
                assert (found >> j & 1, found >> (16 + j) & 1, out[0, j], alpha[1, j]) == (0, 0, 0, before[1, j])
                assert (bounds[2, j], bounds[3, j]) == (-np.inf, np.inf)
                continue
            stays, new, projected = _step_by_hand(
                y, margin[0, j], before[1, j], cost[1, j], 0.8, list(bounds[:2, j]), hinge
            )
            assert bool(found >> j & 1) == stays
            assert alpha[1, j] == pytest.approx(new, rel=1e-5, abs=1e-6)
            assert out[0, j] == pytest.approx(y * (new - before[1, j]), rel=1e-4, abs=1e-6)
            assert bool(found >> (16 + j) & 1) == (alpha[1, j] != before[1, j])
            if projected is None:
                left_out += 1
                assert (bounds[2, j], bounds[3, j]) == (-np.inf, np.inf)
            else:
                assert bounds[2, j] == bounds[3, j] == pytest.approx(projected, rel=1e-5, abs=1e-6)
            moved_any += found >> (16 + j) & 1
        assert found >> (16 + lanes) == 0
    assert left_out > 2
    assert moved_any > 50


@pytest.mark.parametrize("loss", ["l2svc_dual", "l1svc_dual"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_nodes_beside_it_do_not_change_a_node(monkeypatch: pytest.MonkeyPatch, loss: str, precision: str) -> None:
    """Whatever the number of lanes, though nodes have positives outside of their cluster."""
    p = problem(docs=300)
    params = SolverParams(solver=loss, precision=precision, Cp=2, seed=3, threshold=0)
    found = []
    for lanes in ((16, 8, 4), (8,), (4,)):
        monkeypatch.setattr(solver, "_LANES", lanes)
        for threads in (1, 3):
            got = solve_level(p.both, p.Y, p.M, p.child_ptr, params, threads=threads)
            found.append((got.sparse_rows().toarray().tobytes(), *(x.tobytes() for x in got.dense_rows())))
    monkeypatch.setattr(solver, "_LANES", (16,))
    apart = [solve_level(p.both, p.Y, p.M, p.child_ptr, params, nodes=(i, i + 1)) for i in range(12)]
    dense = np.concatenate([x.dense_rows()[0] for x in apart])
    assert dense.tobytes() == found[0][1]
    assert all(f == found[0] for f in found[1:])


def test_float32_reaches_the_optimum_as_far_as_it_tells() -> None:
    p = problem(docs=400)
    params = SolverParams(eps=1e-3, max_iter=5000, threshold=0, precision="float32")
    got = solve_level(p.both, p.Y, p.M, p.child_ptr, params)
    W = np.hstack([got.sparse_rows().toarray(), got.dense_rows()[0]])
    for node in (0, 2, 5, 11):
        best = reference(p, node, 1, 1, 1)
        low = objective(p, node, best[:-1], best[-1], 1, 1, 1)
        assert objective(p, node, W[node], got.dense_rows()[1][node], 1, 1, 1) <= low * (1 + 1e-5)
        np.testing.assert_allclose(W[node], best[:-1], atol=2e-3)
