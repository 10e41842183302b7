"""Every solver against scikit-learn's liblinear, plain scipy and the duality gap, which share no code with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import brentq, lsq_linear, minimize, minimize_scalar
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from tests.rankers.tiny import csr
from xmcdist.config.compose import compose_run
from xmcdist.rankers.kernels import squared_norms
from xmcdist.rankers.logistic import descend_logistic
from xmcdist.rankers.primal import _search
from xmcdist.rankers.solver import SOLVERS, SolverParams, solve_level
from xmcdist.sparse.features import Features

NONE, ONE, ALL, EMPTY = 1, 2, 3, 7  # nodes: no positives, one, every document, not a single document
NODES, PTR = 8, np.array([0, 5, 7, 8])
TIGHT = {"l2svc_dual": 1e-9, "l1svc_dual": 1e-9, "logistic_dual": 1e-9, "l2svc_primal": 1e-8}
LOSS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l2svc_dual": lambda z: np.maximum(0, 1 - z) ** 2,
    "l1svc_dual": lambda z: np.maximum(0, 1 - z),
    "logistic_dual": lambda z: np.logaddexp(0, -z),
    "l2svc_primal": lambda z: np.maximum(0, 1 - z) ** 2,
}
every_solver = pytest.mark.parametrize("solver", SOLVERS)


@dataclass
class Case:
    """One level: features, labels, what every node trains on and at which costs."""

    features: Features
    A: np.ndarray  # [N, D+d] float64
    Y: sp.csr_matrix
    M: sp.csr_matrix
    R: sp.csr_matrix | None
    params: dict[str, float]

    @property
    def bias(self) -> float:
        return self.params["bias"]

    def node(self, node: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features with the bias column, signs and costs of the documents a node trains on."""
        parent = int(np.searchsorted(PTR, node, side="right")) - 1
        yes, M = self.Y.toarray()[:, node] > 0, self.M.toarray()[:, parent]
        positive = self.params["Cp"] * (np.ones(len(yes)) if self.R is None else self.R.toarray()[:, node])
        negative = self.params["Cn"] * (M if self.params["weighted_negatives"] else (M > 0))
        cost = np.where(yes, positive, negative).astype(np.float64)
        train = cost > 0
        A = np.hstack([self.A, np.full((len(yes), 1), self.bias)])
        return A[train], np.where(yes, 1.0, -1.0)[train], cost[train]

    def solve(self, solver: str, eps: float, **more: object) -> np.ndarray:
        """``[nodes, D+d+1]``: weights, and the weight of the bias feature."""
        params = SolverParams(solver=solver, eps=eps, max_iter=100_000, threshold=0, **self.params)
        w = solve_level(self.features, self.Y, self.M, PTR, params, self.R, **more)
        dense, bias = w.dense_rows()
        b = bias[:, None] / self.bias if self.bias else bias[:, None]
        return np.hstack([w.sparse_rows().toarray(), dense, b]).astype(np.float64)


def case(part: str = "both", bias: float = 1.0, *, weighted: bool = False, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    X = rng.random((60, 20)) * (rng.random((60, 20)) < 0.25)
    X[5] = 0  # without words
    E = rng.normal(size=(60, 3)).astype(np.float32) / 2
    Y = rng.random((60, NODES)) < 0.15
    Y[:, [NONE, ONE, EMPTY]], Y[:, ALL] = False, True
    Y[11, ONE] = True
    M = (rng.random((60, 3)) < 0.6) * (rng.choice([0.25, 1.0, 2.0], (60, 3)) if weighted else 1.0)
    M[5, 0], M[:, 2] = 1.0, 0.0
    features = Features(None if part == "dense" else csr(X), None if part == "sparse" else E)
    A = {"both": np.hstack([csr(X).toarray(), E]), "sparse": csr(X).toarray(), "dense": E}[part]
    R = csr(Y * rng.choice([0.5, 1.0, 3.0], Y.shape)) if weighted else None
    costs = {"Cp": 2.0, "Cn": 0.5} if weighted else {"Cp": 1.0, "Cn": 1.0}
    return Case(
        features, A.astype(np.float64), csr(Y), csr(M), R, costs | {"bias": bias, "weighted_negatives": weighted}
    )


def primal(solver: str, w: np.ndarray, A: np.ndarray, y: np.ndarray, c: np.ndarray) -> float:
    return float(0.5 * w @ w + c @ LOSS[solver](y * (A @ w)))


def dual(solver: str, alpha: np.ndarray, A: np.ndarray, y: np.ndarray, c: np.ndarray) -> float:
    u = A.T @ (alpha * y)
    if solver == "logistic_dual":
        entropy = c * np.log(c) - sum(np.where(x > 0, x * np.log(np.maximum(x, 1e-300)), 0) for x in (alpha, c - alpha))
        return float(entropy.sum() - 0.5 * u @ u)
    square = 0 if solver == "l1svc_dual" else alpha**2 / (4 * c)
    return float((alpha - square).sum() - 0.5 * u @ u)


def duals(solver: str, w: np.ndarray, A: np.ndarray, y: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Feasible alphas that stand for w if w is optimal: c times how fast the loss falls there."""
    z = y * (A @ w)
    if solver == "logistic_dual":
        return c * expit(-z)
    if solver != "l1svc_dual":
        return 2 * c * np.maximum(0, 1 - z)
    alpha, on = np.where(z < 1, c, 0.0), np.abs(z - 1) < 1e-4  # at the kink anything between is possible
    if on.any():
        left = w - A[~on].T @ (alpha * y)[~on]
        fit = lsq_linear((A[on] * y[on, None]).T, left, (np.zeros(on.sum()), c[on]), tol=1e-14)
        alpha[on] = fit.x
    return alpha


def by_liblinear(solver: str, bias: float, A: np.ndarray, y: np.ndarray, c: np.ndarray) -> np.ndarray:
    """scikit-learn's answer; the last weight is the bias feature's."""
    common = {"C": 1.0, "fit_intercept": bias > 0, "intercept_scaling": bias or 1.0}
    if solver == "logistic_dual":
        model = LogisticRegression(solver="liblinear", tol=1e-12, max_iter=10**5, **common)
    else:
        loss = "hinge" if solver == "l1svc_dual" else "squared_hinge"
        model = LinearSVC(loss=loss, dual=True, tol=1e-10, max_iter=10**6, **common)
    model.fit(A[:, :-1], y, sample_weight=c)
    return np.append(model.coef_[0], model.intercept_[0] / bias if bias else 0)


def by_scipy(solver: str, A: np.ndarray, y: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Minimum of the dual within its bounds (hinge), or of the primal."""
    if solver == "l1svc_dual":
        G = (A * y[:, None]) @ (A * y[:, None]).T
        bounds = [(0, x) for x in c]
        tight = {"ftol": 1e-16, "gtol": 1e-12, "maxiter": 10**5, "maxfun": 10**6}
        found = minimize(
            lambda a: (0.5 * a @ G @ a - a.sum(), G @ a - 1),
            c / 2,
            jac=True,
            bounds=bounds,
            method="L-BFGS-B",
            options=tight,
        )
        return A.T @ (found.x * y)

    def value(w: np.ndarray) -> tuple[float, np.ndarray]:
        return primal(solver, w, A, y, c), w - A.T @ (duals(solver, w, A, y, c) * y)

    return minimize(value, np.zeros(A.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-9}).x


@every_solver
def test_every_solver_can_be_chosen(solver: str) -> None:
    assert compose_run([f"ranker.solver={solver}"]).ranker.solver == solver


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("part", ["both", "sparse", "dense"])
@pytest.mark.parametrize("bias", [0.0, 1.0, 0.7])
@every_solver
def test_weights_are_the_references(solver: str, bias: float, part: str, weighted: bool) -> None:
    p = case(part, bias, weighted=weighted)
    got = p.solve(solver, TIGHT[solver])
    for node in range(NODES - 1):
        A, y, c = p.node(node)
        alone = node in (NONE, ALL)  # scikit-learn wants two classes
        want = by_scipy(solver, A, y, c) if alone else by_liblinear(solver, bias, A, y, c)
        np.testing.assert_allclose(got[node], want, atol=2e-5, err_msg=f"node {node}")
    assert not got[EMPTY].any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("part", ["both", "sparse", "dense"])
@pytest.mark.parametrize("bias", [0.0, 1.0])
@every_solver
def test_duality_gap_closes(solver: str, bias: float, part: str, weighted: bool) -> None:
    p = case(part, bias, weighted=weighted, seed=1)
    for eps, most in ((TIGHT[solver], 1e-6), (0.1, 0.05)):
        got = p.solve(solver, eps)
        for node in range(NODES - 1):
            A, y, c = p.node(node)
            best = p.solve(solver, TIGHT[solver])[node]
            lowest = dual(solver, duals(solver, best, A, y, c), A, y, c)  # a bound below every primal value
            gap = (primal(solver, got[node], A, y, c) - lowest) / primal(solver, 0 * best, A, y, c)
            assert -1e-6 < gap < most, f"node {node}"


@every_solver
def test_bias_is_learned(solver: str) -> None:
    """Documents without any feature, few of them positive: the bias weight alone, in one dimension."""
    Y = csr(np.arange(40)[:, None] < 3)
    for bias, Cp in ((1.0, 1.0), (0.5, 4.0)):
        params = SolverParams(solver=solver, eps=TIGHT[solver], max_iter=100_000, bias=bias, Cp=Cp)
        w = solve_level(Features(csr(np.zeros((40, 2))), None), Y, csr(np.ones((40, 1))), np.array([0, 1]), params)
        A, y, c = np.full((40, 1), bias), np.where(np.arange(40) < 3, 1.0, -1.0), np.where(np.arange(40) < 3, Cp, 1.0)
        best = minimize_scalar(
            lambda b, *of: primal(solver, np.array([b]), *of), (-20, 20), args=(A, y, c), options={"xtol": 1e-12}
        )
        assert w.dense_rows()[1][0] == pytest.approx(best.x * bias, abs=1e-5)
        assert w.dense_rows()[1][0] < -0.4


@every_solver
def test_ranges_and_threads_change_nothing(solver: str) -> None:
    p = case(weighted=True)
    whole = p.solve(solver, 0.1, threads=1)
    for a, b, threads in ((0, NODES, 3), (1, 4, 1), (4, 6, 2)):
        part = SolverParams(solver=solver, eps=0.1, max_iter=100_000, threshold=0, **p.params)
        w = solve_level(p.features, p.Y, p.M, PTR, part, p.R, nodes=(a, b), threads=threads)
        dense, bias = w.dense_rows()
        assert np.hstack([dense, bias[:, None]]).tobytes() == whole[a:b, 20:].astype(np.float32).tobytes()


@every_solver
def test_few_passes_are_kept_to(solver: str) -> None:
    p = case()
    A, y, c = p.node(0)
    values = []
    for passes in (1, 2, 100):
        params = SolverParams(solver=solver, eps=1e-6, max_iter=passes, threshold=0, **p.params)
        w = solve_level(p.features, p.Y, p.M, PTR, params)
        row = np.concatenate([w.sparse_rows().toarray()[0], w.dense_rows()[0][0], w.dense_rows()[1][:1]])
        values.append(primal(solver, row.astype(np.float64), A, y, c))
    assert values[0] > values[2] * (1 + 1e-4)
    assert values[1] > values[2] * (1 + 1e-7)


def test_a_logistic_step_on_one_document_is_exact() -> None:
    for x, bias, Cp in ((0.5, 0.0, 1.0), (3.0, 0.5, 2.0), (40.0, 1.0, 1e3), (1e-3, 0.0, 1e-3)):
        params = SolverParams(solver="logistic_dual", Cp=Cp, bias=bias, eps=1e-10, max_iter=1, threshold=0)
        one = np.array([0, 1])
        w = solve_level(Features(csr([[x]]), None), csr([[1]]), csr([[1]]), one, params)
        square = float(np.float32(x)) ** 2 + bias**2
        alpha = brentq(lambda a, s=square, c=Cp: s * a + np.log(a / (c - a)), 1e-300, Cp * (1 - 1e-16), xtol=1e-18)
        assert w.sparse_rows().toarray()[0, 0] == pytest.approx(alpha * x, rel=1e-6)
        assert w.dense_rows()[1][0] == pytest.approx(alpha * bias**2, rel=1e-6)


def _logistic(
    X: np.ndarray, y: np.ndarray, c: np.ndarray, eps: float, passes: int = 10_000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights with the bias feature's, alphas, and the order it ended with, straight from the compiled solver."""
    S, n = csr(X), len(y)
    S.sort_indices()
    indptr, dense = S.indptr.astype(np.uint64), np.zeros((n, 0), np.float32)
    w, alpha, order = np.zeros(X.shape[1]), np.zeros(n), np.arange(n, dtype=np.uint32)
    norms = squared_norms(indptr, S.data, dense, 1.0)
    b = descend_logistic(
        indptr, S.indices.astype(np.uint32), S.data, dense, norms, 1.0, y, c,
        order, eps, passes, np.uint64(3), w, np.zeros(0), alpha,
    )  # fmt: skip
    return np.append(w, b), np.where(alpha < 0, c + alpha, alpha), order


@pytest.mark.parametrize("scale", [0.2, 3.0])
@pytest.mark.parametrize("cost", [1e-3, 1.0, 50.0])
def test_logistic_alphas_stand_for_the_weights(cost: float, scale: float) -> None:
    """From costs that push every alpha to its upper end to ones that leave most of them at nothing."""
    rng = np.random.default_rng(0)
    X = csr(scale * rng.normal(size=(50, 4)) * (rng.random((50, 4)) < 0.6)).toarray()
    y, c = rng.choice([1.0, -1.0], 50, p=[0.2, 0.8]), cost * rng.choice([0.5, 2.0], 50)
    w, alpha, _ = _logistic(X, y, c, 1e-8)
    A = np.hstack([X, np.ones((50, 1))]).astype(np.float64)
    assert ((alpha >= 0) & (alpha <= c)).all()
    np.testing.assert_allclose(A.T @ (alpha * y), w, rtol=1e-9, atol=1e-9 * np.abs(w).max())
    top = primal("logistic_dual", w, A, y, c)
    assert abs(top - dual("logistic_dual", alpha, A, y, c)) < 1e-9 * primal("logistic_dual", 0 * w, A, y, c)
    np.testing.assert_allclose(alpha, c * expit(-y * (A @ w)), rtol=1e-4, atol=1e-12 * cost)


def test_logistic_bears_odds_beyond_floats() -> None:
    """Long documents, with both labels or one, at costs far apart: exp(-z) would overflow or vanish."""
    X = np.array([[2e3], [2e3], [1e3], [0.0]])
    A = np.hstack([X, np.ones((4, 1))])
    for signs in ([1.0, -1, 1, -1], [-1.0, -1, -1, -1], [1.0, 1, 1, -1]):
        for costs in ([1.0, 1, 1, 1], [1e6, 1, 1e-6, 1], [1e-3, 1e3, 1e-3, 1e3]):
            y, c = np.array(signs), np.array(costs)
            w, alpha, _ = _logistic(X, y, c, 1e-6)
            assert ((alpha >= 0) & (alpha <= c)).all()
            np.testing.assert_allclose(A.T @ (alpha * y), w, rtol=1e-6, atol=1e-6)
            assert dual("logistic_dual", alpha, A, y, c) >= dual("logistic_dual", np.full(4, 1e-300), A, y, c)
            if y[0] == y[1]:  # no contradiction, so that there are weights that please
                bottom, zero = dual("logistic_dual", alpha, A, y, c), primal("logistic_dual", 0 * w, A, y, c)
                assert primal("logistic_dual", w, A, y, c) - bottom < 1e-6 * zero


def test_logistic_stops_though_one_document_is_beyond_doubt() -> None:
    """A document so long that its alpha would be smaller than any float."""
    X, y, c = np.array([[1.0], [1e5], [0.5], [0.1], [0.2], [0.3]]), np.ones(6), np.ones(6)
    w, alpha, order = _logistic(X, y, c, 1e-9)
    assert order.tolist() == _logistic(X, y, c, 1e-9, passes=200)[2].tolist()  # shuffled in every pass
    assert order.tolist() != _logistic(X, y, c, 1e-9, passes=3)[2].tolist()
    A = np.hstack([X, np.ones((6, 1))])
    top, bottom = primal("logistic_dual", w, A, y, c), dual("logistic_dual", alpha, A, y, c)
    assert abs(top - bottom) < 1e-12


@pytest.mark.parametrize("far", [0.01, 1.0, 30.0])
def test_line_search_finds_the_lowest_point(far: float) -> None:
    rng = np.random.default_rng(0)
    A, y, c = rng.normal(size=(30, 5)), rng.choice([1.0, -1.0], 30), rng.choice([0.01, 0.2], 30)
    u = rng.normal(size=5)
    s = -far * (u - A.T @ (duals("l2svc_primal", u, A, y, c) * y))
    t = _search(y, c, np.arange(30, dtype=np.uint32), A @ u, A @ s, u @ s, s @ s)
    best = minimize_scalar(lambda t: primal("l2svc_primal", u + t * s, A, y, c), options={"xtol": 1e-10})
    assert t == pytest.approx(best.x, rel=2e-3)
    assert _search(y, c, np.arange(30, dtype=np.uint32), A @ u, -A @ s, -u @ s, s @ s) == 0.0
