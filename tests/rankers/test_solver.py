"""The dual solver against scikit-learn's liblinear, and what must not change its answer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.svm import LinearSVC

from tests.rankers.tiny import Problem, csr, objective, problem, reference
from xmcdist.rankers import solver
from xmcdist.rankers.columns import Columns
from xmcdist.rankers.solver import SolverParams, solve_level
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.csr import l1_rows, l1_scales
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import open_csr, save_csr

TIGHT = {"eps": 1e-9, "max_iter": 100_000, "threshold": 0.0}


def rows(w: LevelWeights, child_ptr: np.ndarray) -> np.ndarray:
    """Every node's weights and bias term, dense: ``[n, D + d + 1]``."""
    dense, bias = w.dense_rows()
    return np.hstack([w.sparse_rows().toarray(), dense, bias[:, None]])


def same(a: LevelWeights, b: LevelWeights, child_ptr: np.ndarray) -> bool:
    return rows(a, child_ptr).tobytes() == rows(b, child_ptr).tobytes()


@pytest.mark.parametrize(("Cp", "Cn", "bias"), [(1.0, 1.0, 1.0), (4.0, 0.5, 1.5), (100.0, 100.0, 0.7)])
def test_weights_are_those_of_liblinear(Cp: float, Cn: float, bias: float) -> None:
    p = problem()
    params = SolverParams(Cp=Cp, Cn=Cn, bias=bias, **TIGHT)
    got = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, params, threads=1), p.child_ptr)
    for node in range(12):
        if node != 1:
            np.testing.assert_allclose(got[node], reference(p, node, Cp, Cn, bias), atol=2e-5, err_msg=f"node {node}")


def test_relevance_weighs_positives() -> None:
    p = problem()
    R = p.Y.toarray() / np.maximum(p.Y.toarray().sum(1, keepdims=True), 1)
    got = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(Cp=3, **TIGHT), csr(R)), p.child_ptr)
    np.testing.assert_allclose(got[4], reference(p, 4, 3, 1, 1, R), atol=2e-5)
    plain = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(Cp=3, **TIGHT)), p.child_ptr)
    assert np.abs(got[4] - plain[4]).max() > 1e-3


def test_default_tolerance_is_near_the_optimum() -> None:
    p = problem()
    loose = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(threshold=0)), p.child_ptr)
    for node in range(12):
        best = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(**TIGHT)), p.child_ptr)[node]
        a, b = (objective(p, node, w[:-1], w[-1], 1, 1, 1) for w in (loose[node], best))
        assert b - 1e-6 <= a <= b * 1.01


def test_optimum_cannot_be_improved() -> None:
    p, rng = problem(), np.random.default_rng(3)
    got = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(Cp=2, **TIGHT)), p.child_ptr)
    for node in (0, 1, 7):  # 1 has no positives
        best = objective(p, node, got[node, :-1], got[node, -1], 2, 1, 1)
        for _ in range(20):
            other = got[node] + rng.normal(size=got.shape[1]) * 1e-2
            assert objective(p, node, other[:-1], other[-1], 2, 1, 1) > best


def test_sparse_dense_and_both_are_the_same_features() -> None:
    p = problem()
    both = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(**TIGHT)), p.child_ptr)
    for features in (Features(csr(p.stacked), None), Features(None, p.stacked.astype(np.float32))):
        one = rows(solve_level(features, p.Y, p.M, p.child_ptr, SolverParams(**TIGHT)), p.child_ptr)
        np.testing.assert_allclose(one, both, atol=2e-5)


def test_a_positive_outside_the_matched_documents_still_counts() -> None:
    X = csr(np.eye(4))
    Y, M = csr([[1], [1], [0], [0]]), csr([[1], [0], [1], [0]])
    w = rows(solve_level(Features(X, None), Y, M, np.array([0, 1]), SolverParams(**TIGHT)), np.array([0, 1]))[0]
    assert w[0] > 0.1
    assert w[1] == pytest.approx(w[0], abs=1e-6)
    assert w[2] < -0.1
    assert w[3] == 0  # neither matched nor positive


def test_stored_zeros_in_the_matching_count_as_matched() -> None:
    p = problem()
    zeros = p.M.copy()
    zeros.data[:] = 0
    a, b = (solve_level(p.both, p.Y, m, p.child_ptr, SolverParams()) for m in (p.M, zeros))
    assert same(a, b, p.child_ptr)


def test_node_without_positives_says_no() -> None:
    p = problem()
    w = rows(solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(**TIGHT)), p.child_ptr)[1]
    assert w[-1] < -0.5
    assert ((p.stacked @ w[:-1] + w[-1]) < 0).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("cuts", [[0, 4], [0, 2, 4], [0, 1, 3, 4], [0, 0, 4, 4]])
def test_ranges_and_threads_change_nothing(cuts: list[int], threads: int) -> None:
    p = problem()
    whole = solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(Cp=3, Cn=0.5, seed=7), threads=1)
    parts = [
        solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(Cp=3, Cn=0.5, seed=7), clusters=(a, b), threads=threads)
        for a, b in pairwise(cuts)
    ]
    assert same(LevelWeights.concat(parts), whole, p.child_ptr)


def test_a_cluster_may_be_cut() -> None:
    p = problem()
    whole = solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams())
    parts = [
        solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(), nodes=r) for r in ((0, 2), (2, 5), (5, 5), (5, 12))
    ]
    assert same(LevelWeights.concat(parts), whole, p.child_ptr)


def test_one_step_on_one_document_is_exact() -> None:
    x = np.array([[3.0, 0.0, 4.0]], np.float32)
    one = np.array([0, 1])
    params = SolverParams(Cp=2, bias=0.5, max_iter=1, threshold=0)
    w = rows(solve_level(Features(csr(x), None), csr([[1]]), csr([[1]]), one, params), one)[0]
    alpha = 1 / (25 + 0.25 + 0.5 / 2)
    np.testing.assert_allclose(w, [3 * alpha, 0, 4 * alpha, 0.25 * alpha], rtol=1e-6)


def test_seed_is_used() -> None:
    p = problem()
    a, b = (solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(seed=s, max_iter=2)) for s in (0, 1))
    assert not same(a, b, p.child_ptr)


def test_threshold_and_limit_drop_small_sparse_weights_only() -> None:
    p = problem()
    full = solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(threshold=0))
    W = full.sparse_rows().toarray()
    cut = solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(threshold=0.2))
    np.testing.assert_array_equal(cut.sparse_rows().toarray(), np.where(np.abs(W) < 0.2, 0, W))
    few = solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(threshold=0, max_nonzeros_per_label=5))
    for node, w in enumerate(few.sparse_rows().toarray()):
        kept = np.sort(np.argsort(-np.abs(W[node]), kind="stable")[:5])
        want = np.zeros_like(w)
        want[kept] = W[node][kept]
        np.testing.assert_array_equal(w, want)
    for other in (cut, few):
        for a, b in zip(other.dense_rows(), full.dense_rows(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_one_document_with_very_many_labels() -> None:
    rng = np.random.default_rng(0)
    Y = sp.lil_matrix((30, 500), dtype=np.float32)
    Y[3, :400] = 1
    for i in range(30):
        Y[i, rng.integers(500)] = 1
    p = Problem(
        csr(rng.random((30, 8))),
        np.zeros((30, 0), np.float32),
        Y.tocsr(),
        csr(np.ones((30, 2))),
        np.array([0, 250, 500]),
    )
    got = rows(solve_level(Features(p.X, None), p.Y, p.M, p.child_ptr, SolverParams(**TIGHT)), p.child_ptr)
    for node in (0, 251, 399):
        np.testing.assert_allclose(got[node], reference(p, node, 1, 1, 1), atol=2e-5)


def test_read_only_and_64_bit_matrices_are_taken() -> None:
    p = problem()
    want = solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams())
    X = p.X.copy()
    X.indices, X.indptr = X.indices.astype(np.int64), X.indptr.astype(np.int64)
    E = p.E.copy()
    E.flags.writeable = X.data.flags.writeable = False
    assert same(solve_level(Features(X, E), p.Y, p.M, p.child_ptr, SolverParams()), want, p.child_ptr)


def test_what_does_not_fit_is_refused() -> None:
    p = problem()
    with pytest.raises(ValueError, match=r"Y_t is .* must be"):
        solve_level(p.both, p.Y[:, :5], p.M, p.child_ptr, SolverParams())
    with pytest.raises(ValueError, match=r"M is .* must be"):
        solve_level(p.both, p.Y, p.M[:10], p.child_ptr, SolverParams())
    with pytest.raises(ValueError, match="clusters"):
        solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(), clusters=(0, 5))
    with pytest.raises(ValueError, match="nodes"):
        solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(), nodes=(3, 13))
    with pytest.raises(ValueError, match="relevance"):
        solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(), csr(np.zeros(p.Y.shape)))
    for name, value in (("Cp", 0), ("eps", 0), ("max_iter", 0), ("bias", -1), ("max_nonzeros_per_label", 0)):
        with pytest.raises(ValueError, match=name):
            SolverParams(**{name: value})


@pytest.mark.parametrize("part", ["both", "sparse", "dense"])
@pytest.mark.parametrize("weighted", [False, True])
def test_documents_used_where_they_are_give_the_bits_of_a_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str, weighted: bool
) -> None:
    p = problem()
    M = p.M.copy()
    M.data = np.random.default_rng(4).integers(0, 3, M.nnz).astype(np.float32)
    save_csr(tmp_path / "X", p.X)
    np.save(tmp_path / "E.npy", p.E)
    X, E = open_csr(tmp_path / "X"), np.load(tmp_path / "E.npy", mmap_mode="r")
    features = Features(None if part == "dense" else X, None if part == "sparse" else E)
    params = SolverParams(Cp=3, Cn=0.5, seed=7, weighted_negatives=weighted, max_nonzeros_per_label=12)
    found = []
    for share in (2.0, 0.5, 0.0):  # never, for clusters with more than half of all documents, always
        monkeypatch.setattr(solver, "_MOST", share)
        found += [solve_level(features, p.Y, M, p.child_ptr, params, threads=threads) for threads in (1, 3)]
    for other in found[1:]:
        assert same(other, found[0], p.child_ptr)


def test_negatives_weigh_what_the_matching_says() -> None:
    p = problem()
    A = p.M.toarray() * np.random.default_rng(2).choice([0.05, 0.4, 1.0, 3.0], size=p.M.shape)
    params = SolverParams(Cp=2, Cn=1.5, weighted_negatives=True, **TIGHT)
    got = rows(solve_level(p.both, p.Y, csr(A), p.child_ptr, params), p.child_ptr)
    plain = rows(solve_level(p.both, p.Y, csr(A), p.child_ptr, SolverParams(Cp=2, Cn=1.5, **TIGHT)), p.child_ptr)
    for node in (0, 4, 11):
        y = p.Y.toarray()[:, node] > 0
        weight = np.where(y, 2.0, 1.5 * A[:, p.parent(node)])
        active = y | (A[:, p.parent(node)] > 0)
        svc = LinearSVC(loss="squared_hinge", dual=True, C=1, tol=1e-10, max_iter=10**6)
        svc.fit(p.stacked[active], np.where(y, 1, -1)[active], sample_weight=weight[active])
        np.testing.assert_allclose(got[node], np.append(svc.coef_[0], svc.intercept_[0]), atol=2e-5)
        assert np.abs(got[node] - plain[node]).max() > 1e-3


def test_a_negative_of_weight_zero_is_left_out_and_ones_change_nothing() -> None:
    p = problem()
    some = p.M.copy()
    some.data = np.random.default_rng(3).integers(0, 2, some.nnz).astype(np.float32)
    without = some.copy()
    without.eliminate_zeros()
    for stored, want in ((some, without), (p.M, p.M)):
        weighted = solve_level(p.both, p.Y, stored, p.child_ptr, SolverParams(weighted_negatives=True))
        assert same(weighted, solve_level(p.both, p.Y, want, p.child_ptr, SolverParams()), p.child_ptr)
    some.data[5] = -0.5
    with pytest.raises(ValueError, match=r"0 or more, not -0\.5"):
        solve_level(p.both, p.Y, some, p.child_ptr, SolverParams(weighted_negatives=True))


def test_relevance_by_rows_is_relevance() -> None:
    p = problem()
    one = solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(Cp=3), l1_rows(p.Y))
    for nodes in ((0, 12), (2, 7)):
        got = solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(Cp=3), l1_scales(p.Y), nodes=nodes)
        assert rows(got, p.child_ptr).tobytes() == rows(one, p.child_ptr)[slice(*nodes)].tobytes()
    with pytest.raises(ValueError, match="one factor a document"):
        solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams(), np.ones(3))


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (3, 4), (2, 7), (5, 5), (9, 9)])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_columns_are_those_of_the_matrix(start: int, stop: int, index: type) -> None:
    A = np.random.default_rng(0).integers(0, 4, (50, 9)) * (np.random.default_rng(1).random((50, 9)) < 0.3)
    B = csr(A)
    B.indices, B.indptr = B.indices.astype(index), B.indptr.astype(index)
    got = Columns.of(B, start, stop)
    assert got.ptr.tolist() == np.cumsum([0, *(np.count_nonzero(A[:, j]) for j in range(start, stop))]).tolist()
    for j in range(start, stop):
        span = got.column(j - start)
        assert got.rows[span].tolist() == np.flatnonzero(A[:, j]).tolist()
        assert got.values[span].tolist() == A[A[:, j] > 0, j].tolist()


def test_rounding_of_the_features_is_not_magnified() -> None:
    """Far from the optimum, too: what other ranks have rounded otherwise must not become another model."""
    off, n, nodes = [], 2000, 64
    for d, scale in ((24, 0.1), (32, 0.05)):  # all vectors near each other, as an encoder's are; few positives
        rng = np.random.default_rng(0)
        direction = rng.normal(size=(n, d)) * np.linspace(0.05, 1, d)
        dense = (1 + scale * direction).astype(np.float32)
        rounded = (dense * (1 + 1e-6 * rng.uniform(-1, 1, dense.shape))).astype(np.float32)
        true = direction @ rng.normal(size=(d, nodes)) + 0.5 * rng.normal(size=(n, nodes)) > 8
        Y, M = sp.csr_matrix(true.astype(np.float32)), sp.csr_matrix(np.ones((n, 1), np.float32))
        params, ptr = SolverParams(Cp=100, Cn=100, threshold=0.0), np.array([0, nodes])
        a, b = (
            solve_level(Features(sparse=None, dense=x), Y, M, ptr, params).dense_rows()[0] for x in (dense, rounded)
        )
        off.append(np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1))
    assert 1e-7 < np.median(off) < 1e-4
    # A node may stop a pass earlier or later; liblinear's order of documents would give ten of these.
    assert np.sum(np.concatenate(off) > 1e-3) <= 3
