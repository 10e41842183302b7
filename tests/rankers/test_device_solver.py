"""The batched solver against the CPU's, on the CPU device: same optimum, whatever blocks are formed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from tests.rankers.tiny import Problem, csr, problem
from xmcdist.rankers import device_plan, device_solver
from xmcdist.rankers.columns import member_columns, positive_columns
from xmcdist.rankers.device_blocks import Block, Level
from xmcdist.rankers.device_plan import MACHINES, Item, Machine, Sizes, make_plan
from xmcdist.rankers.device_solver import SolverReport, ranker_device, solve_level_on_device
from xmcdist.rankers.solver import SolverParams, solve_level
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.csr import l1_scales
from xmcdist.sparse.features import Features

EXACT = SolverParams(eps=1e-9, max_iter=100_000, threshold=0.0)
# The device solver stops at 1e-4 of the norm of a node's weights, which bounds their error but for
# rounding: that is most of it where documents far outnumber features and inner products are kept.
TOLERANCE = 4e-4


def rows(w: LevelWeights) -> np.ndarray:
    """Every node's weights and bias term, dense: ``[n, D + d + 1]``."""
    dense, bias = w.dense_rows()
    return np.hstack([w.sparse_rows().toarray(), dense, bias[:, None]])


def solve(p: Problem, params: SolverParams, features: Features | None = None, **options: Any) -> np.ndarray:
    options = {"device": "cpu"} | options
    M, relevance = options.pop("M", p.M), options.pop("relevance", None)
    return rows(solve_level_on_device(features or p.both, p.Y, M, p.child_ptr, params, relevance, **options))


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    off = np.linalg.norm(got - want, axis=1)
    assert (off <= TOLERANCE * np.maximum(np.linalg.norm(want, axis=1), 0.1)).all(), off


def parts(p: Problem) -> list[Features]:
    return [p.both, Features(p.X, None), Features(None, p.E)]


@pytest.mark.parametrize(("Cp", "Cn", "bias"), [(1.0, 1.0, 1.0), (4.0, 0.5, 1.5), (1.0, 1.0, 0.0)])
@pytest.mark.parametrize("gram", [False, True])
def test_weights_are_those_of_the_cpu_solver(
    monkeypatch: pytest.MonkeyPatch, gram: bool, Cp: float, Cn: float, bias: float
) -> None:
    _force(monkeypatch, gram=gram)
    p = problem()
    for features in parts(p):
        params = replace(EXACT, Cp=Cp, Cn=Cn, bias=bias)
        want = rows(solve_level(features, p.Y, p.M, p.child_ptr, params))
        close(solve(p, replace(params, max_iter=100), features), want)


@pytest.mark.parametrize("gram", [False, True])
def test_costs_of_a_hundred(monkeypatch: pytest.MonkeyPatch, gram: bool) -> None:
    _force(monkeypatch, gram=gram)
    p, params = problem(), replace(EXACT, Cp=100, Cn=100)
    for features in parts(p):
        want = rows(solve_level(features, p.Y, p.M, p.child_ptr, params))
        off = np.linalg.norm(solve(p, replace(params, max_iter=100), features) - want, axis=1)
        assert off.max() <= 1e-3 * np.linalg.norm(want, axis=1).max()  # conditioned a hundred times worse


def test_asking_for_more_than_float32_holds_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many documents, few features, large costs: what K does not see of beta outgrows the rest."""
    _force(monkeypatch, gram=False)
    p = problem(docs=1500)
    params = SolverParams(Cp=100, Cn=100, threshold=0.0)
    for features in (Features(p.X, None), Features(None, p.E)):
        near, report = solve(p, params, features), SolverReport()
        tight = solve(p, replace(params, eps=1e-6), features, report=report)
        assert report.on_cpu == 0
        assert np.linalg.norm(tight - near, axis=1).max() <= 0.03 * np.linalg.norm(near, axis=1).max()


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(("Cp", "Cn"), [(1.0, 1.0), (4.0, 0.5), (30.0, 30.0)])
def test_logistic_loss(monkeypatch: pytest.MonkeyPatch, Cp: float, Cn: float, gram: bool) -> None:
    _force(monkeypatch, gram=gram)
    p, params = problem(), replace(EXACT, Cp=Cp, Cn=Cn, solver="logistic_dual")
    for features in parts(p):
        want = rows(solve_level(features, p.Y, p.M, p.child_ptr, params))
        close(solve(p, replace(params, max_iter=100), features), want)


def test_a_solver_without_a_gpu_form_is_the_cpus() -> None:
    p, said = problem(), []
    params = SolverParams(solver="l1svc_dual")
    got = solve(p, params, say=said.append)
    np.testing.assert_array_equal(got, rows(solve_level(p.both, p.Y, p.M, p.child_ptr, params)))
    assert len(said) == 1
    assert "l1svc_dual" in said[0]
    primal = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, EXACT))
    close(solve(p, replace(EXACT, solver="l2svc_primal")), primal)


def test_relevance_and_weighted_negatives() -> None:
    p = problem()
    M = p.M.copy()
    M.data = np.random.default_rng(4).choice([0.0, 0.05, 0.4, 1.0, 3.0], M.nnz).astype(np.float32)
    R = csr(p.Y.toarray() / np.maximum(p.Y.toarray().sum(1, keepdims=True), 1))
    params = replace(EXACT, Cp=3, Cn=0.7, weighted_negatives=True)
    want = rows(solve_level(p.both, p.Y, M, p.child_ptr, params, R))
    for relevance in (R, l1_scales(p.Y)):
        close(solve(p, replace(params, max_iter=100), M=M, relevance=relevance), want)


def test_documents_of_one_cluster_and_positives_elsewhere() -> None:
    """True negatives as in a tree: each document in the clusters of its labels, some labels outside."""
    p = problem(docs=200, words=60, seed=3)
    true = np.array([p.Y[:, a:b].sum(1).A1 > 0 for a, b in zip(p.child_ptr, p.child_ptr[1:], strict=False)]).T
    few = true & (np.random.default_rng(0).random(true.shape) < 0.7)  # others are positive but not matched
    for M in (csr(true), csr(few)):
        want = rows(solve_level(p.both, p.Y, M, p.child_ptr, EXACT))
        close(solve(p, replace(EXACT, max_iter=100), M=M), want)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("nodes", [(0, 12), (0, 2), (2, 5), (4, 8), (5, 5), (12, 12)])
def test_a_range_that_cuts_clusters(monkeypatch: pytest.MonkeyPatch, nodes: tuple[int, int], gram: bool) -> None:
    _force(monkeypatch, gram=gram)
    p = problem()
    want = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, EXACT))[slice(*nodes)]
    close(solve(p, EXACT, nodes=nodes), want)


@pytest.mark.parametrize("gram", [False, True])
def test_a_small_budget_changes_blocks_but_not_weights(monkeypatch: pytest.MonkeyPatch, gram: bool) -> None:
    _force(monkeypatch, gram=gram, block=1e9)  # padding costs nothing: as few blocks as fit
    p = problem()
    whole, report = solve(p, EXACT, report=(one := SolverReport())), SolverReport()
    assert (one.blocks, one.sliced, one.on_cpu) == (1, 0, 0)
    sliced = solve(p, EXACT, budget_bytes=140_000 if gram else 72_000, report=report)
    assert report.sliced >= 3
    assert report.blocks > 3
    assert report.on_cpu == 0
    np.testing.assert_allclose(sliced, whole, atol=2e-4)
    np.testing.assert_array_equal(sliced != 0, whole != 0)


def test_features_that_do_not_fit_are_brought_block_by_block() -> None:
    p = problem(docs=3000, width=16, seed=2)
    keep = np.random.default_rng(0).random(3000) < 0.03  # of the others no cluster has one
    for A in (p.Y, p.M):
        A.data[~np.repeat(keep, np.diff(A.indptr))] = 0
        A.eliminate_zeros()
    for features in parts(p):
        want = rows(solve_level(features, p.Y, p.M, p.child_ptr, EXACT))
        for budget in (120_000, 10**9):
            report = SolverReport()
            close(solve(p, replace(EXACT, max_iter=100), features, budget_bytes=budget, report=report), want)
            assert report.resident == (budget == 10**9)
            assert report.on_cpu == 0


def test_what_does_not_fit_at_all_goes_to_the_cpu() -> None:
    p, said, report = problem(), [], SolverReport()
    got = solve(p, EXACT, budget_bytes=1000, say=said.append, report=report)
    assert (report.blocks, report.on_cpu) == (0, 12)
    np.testing.assert_array_equal(got, rows(solve_level(p.both, p.Y, p.M, p.child_ptr, EXACT)))
    assert len(said) == 1
    assert "12 nodes of 3 clusters are solved on the CPU" in said[0]


def test_memory_that_runs_out_halves_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    p, said, report = problem(), [], SolverReport()
    want = solve(p, EXACT)
    real = device_solver.minimise

    def minimise(block: Any, sign: torch.Tensor, *rest: Any) -> Any:
        if sign.shape[0] * sign.shape[2] > 2:
            raise torch.OutOfMemoryError("no")
        return real(block, sign, *rest)

    monkeypatch.setattr(device_solver, "minimise", minimise)
    close(solve(p, EXACT, say=said.append, report=report), want)
    assert not said
    assert report.sliced >= 4

    def never(*rest: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(device_solver, "minimise", never)
    close(solve(p, EXACT, say=said.append), want)
    assert len(said) == 1


def test_numbers_beyond_float32_go_to_the_cpu() -> None:
    p, said = problem(), []
    X = p.X.copy()
    X.data[X.indptr[7] : X.indptr[8]] *= np.float32(1e25)
    features = Features(X, p.E)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = solve(p, EXACT, features, say=said.append)
    assert np.isfinite(got).all()
    assert len(said) == 1


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_small_weights_are_dropped_and_dense_ones_never(threshold: float, limit: int | None) -> None:
    p = problem()
    W = solve(p, EXACT)
    got = solve(p, replace(EXACT, threshold=threshold, max_nonzeros_per_label=limit))
    np.testing.assert_array_equal(got[:, 40:], W[:, 40:])
    for node in range(12):
        want = np.where(np.abs(W[node, :40]) >= threshold, W[node, :40], 0)
        kept = np.argsort(-np.abs(want), kind="stable")[: limit or 40]
        np.testing.assert_array_equal(got[node, kept], want[kept])
        assert np.count_nonzero(got[node, :40]) == min(np.count_nonzero(want), limit or 40)


def test_equal_weights_keep_the_smaller_feature() -> None:
    X = csr(np.eye(6)[[0, 0, 1, 1]].repeat(1, axis=1) + np.eye(6)[[3, 3, 4, 4]])
    Y, M = csr([[1], [1], [0], [0]]), csr(np.ones((4, 1)))
    params = replace(EXACT, max_nonzeros_per_label=3)
    p = Problem(X, np.zeros((4, 0), np.float32), Y, M, np.array([0, 1]))
    got = solve(p, params, Features(X, None))[0, :6]
    want = rows(solve_level(Features(X, None), Y, M, p.child_ptr, params))[0, :6]
    assert np.flatnonzero(got).tolist() == np.flatnonzero(want).tolist() == [0, 1, 3]


def test_default_tolerance_is_as_near_the_optimum_as_the_cpus() -> None:
    p = problem()
    best = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, EXACT))
    loose = SolverParams(threshold=0)
    norm = np.linalg.norm(best, axis=1)
    here = np.linalg.norm(solve(p, loose) - best, axis=1) / norm
    there = np.linalg.norm(rows(solve_level(p.both, p.Y, p.M, p.child_ptr, loose)) - best, axis=1) / norm
    assert here.max() <= 0.03  # 0.3 * eps
    assert here.max() <= there.max() * 1.5


def test_nodes_and_clusters_without_documents() -> None:
    p = problem()
    M = p.M.tolil()
    M[:, 3] = 0
    Y = p.Y.tolil()
    Y[:, 9:] = 0
    q = replace(p, M=sp.csr_matrix(M), Y=sp.csr_matrix(Y))
    q.M.eliminate_zeros()
    q.Y.eliminate_zeros()
    got = solve(q, EXACT)
    close(got, rows(solve_level(q.both, q.Y, q.M, q.child_ptr, EXACT)))
    assert not got[9:].any()
    assert got[1, -1] < -0.5  # no positives: says no


def test_a_loss_that_is_not_smooth_and_a_missing_gpu_fall_back_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ranker_device("auto", "l2svc_dual", 0, said.append) is None
    assert ranker_device("cpu", "l2svc_dual", 0, said.append) is None
    assert not said
    assert ranker_device("cuda", "l2svc_dual", 0, said.append) is None
    assert "no CUDA device" in said.pop()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranker_device("auto", "l2svc_primal", 3, said.append) == torch.device("cuda", 1)
    assert ranker_device("auto", "l1svc_dual", 0, said.append) is None
    assert not said
    assert ranker_device("cuda", "l1svc_dual", 0, said.append) is None
    assert "l1svc_dual" in said.pop()


def test_what_does_not_fit_together_is_refused() -> None:
    p = problem()
    for bad in ({"nodes": (3, 13)}, {"M": p.M[:10]}, {"relevance": csr(np.zeros(p.Y.shape))}):
        with pytest.raises(ValueError, match=r"must be|needs a value"):
            solve(p, EXACT, **bad)


def test_products_are_of_full_precision_and_the_setting_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], device_solver.minimise

    def minimise(*args: Any) -> Any:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return real(*args)

    monkeypatch.setattr(device_solver, "minimise", minimise)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        solve(problem(), SolverParams())
        assert set(seen) == {"ieee"}
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_little_room_while_a_block_is_made_changes_nothing() -> None:
    p = problem()
    members = member_columns(p.M, (0, 4), weighted=False)
    positives = positive_columns(p.Y, None, (0, 12))
    options = {"Cp": 1.0, "Cn": 1.0, "bias": 0.5, "device": torch.device("cpu"), "resident": True}
    level = Level(p.both, members, positives, p.child_ptr, **options)
    items = [Item(0, 0, 3), Item(2, 1, 6), Item(3, 0, 3)]
    wide, narrow = (Block(level, items, gram=True, room=room) for room in (10**9, 3000))
    assert wide.K is not None
    assert narrow.K is not None
    for s, item in enumerate(items):
        docs = np.union1d(np.flatnonzero(p.M[:, item.cluster].toarray()), _positives(p, item.cluster))
        K = p.stacked[docs] @ p.stacked[docs].T + 0.25
        for block in (wide, narrow):
            np.testing.assert_allclose(block.K[s, : docs.size, : docs.size], K, atol=1e-5)
    beta = torch.randn(wide.cost.shape, generator=torch.Generator().manual_seed(0)) * (wide.cost > 0)
    for limit in (None, 4):
        for a, b in zip(wide.weights(beta, 0.1, limit), narrow.weights(beta, 0.1, limit), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert wide.weights(beta, 0.1, None).value.size > 200


def _positives(p: Problem, cluster: int) -> np.ndarray:
    return np.flatnonzero(p.Y[:, p.child_ptr[cluster] : p.child_ptr[cluster + 1]].sum(1).A1)


@pytest.mark.parametrize("budget", [2_000_000, 60_000_000, 10**12])
def test_a_plan_has_every_node_once_and_keeps_to_the_budget(budget: int) -> None:
    rng = np.random.default_rng(0)
    documents = (10 ** rng.uniform(0, 4.5, 300)).astype(np.int64)
    documents[::50] = 0
    nodes = rng.integers(0, 120, 300)
    sizes = Sizes(documents, documents * 9, nodes, 5000, 16)
    plan = make_plan(sizes, budget, MACHINES["cuda"])
    seen = [np.zeros(m, int) for m in nodes]
    for block in plan.blocks:
        n = max(documents[i.cluster] for i in block.items)
        m = max(i.stop - i.start for i in block.items)
        values = sum(int(documents[i.cluster]) * 9 for i in block.items)
        assert device_plan._bytes(sizes, len(block.items), n, values, m, gram=block.gram) <= budget
        for i in block.items:
            seen[i.cluster][i.start : i.stop] += 1
    for c in range(300):
        assert (seen[c] == int(documents[c] > 0 and c not in plan.too_large)).all()
    assert bool(plan.too_large) == (budget < 10**7)


@pytest.mark.parametrize("gram", [False, True])
def test_like_clusters_share_a_block_and_unlike_ones_do_not(monkeypatch: pytest.MonkeyPatch, gram: bool) -> None:
    _force(monkeypatch, gram=gram)
    machine = Machine(1e12, 1e12, 1e12, 1e-9)
    documents = np.array([100, 3000, 101, 99, 2900])
    sizes = Sizes(documents, documents * 1000, np.full(5, 50), 10**6, 8)
    found = {tuple(sorted(i.cluster for i in b.items)) for b in make_plan(sizes, 10**12, machine).blocks}
    assert found == {(0, 2, 3), (1, 4)}
    assert Item(0, 0, 50) in next(b.items for b in make_plan(sizes, 10**12, machine).blocks if len(b.items) == 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gram", [False, True])
def test_a_gpu_finds_the_weights_of_the_cpu(monkeypatch: pytest.MonkeyPatch, gram: bool) -> None:
    _force(monkeypatch, gram=gram)
    p = problem(docs=500, words=200, width=16)
    for features in parts(p):
        want = rows(solve_level(features, p.Y, p.M, p.child_ptr, EXACT))
        for budget in (None, 3_000_000):
            close(solve(p, EXACT, features, device="cuda", budget_bytes=budget), want)


def _force(monkeypatch: pytest.MonkeyPatch, *, gram: bool, block: float = 5e-3) -> None:
    """Plan for a machine on which one form of the products is always the faster."""
    monkeypatch.setattr(device_plan, "_prefers_gram", lambda sizes, machine: np.full(sizes.nodes.size, gram))
    for name in MACHINES:
        monkeypatch.setitem(MACHINES, name, MACHINES[name]._replace(block=block))
