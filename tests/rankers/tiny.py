"""Small random ranking problems, and a solver that shares no code with the package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.svm import LinearSVC

from xmcdist.sparse.features import Features


@dataclass
class Problem:
    X: sp.csr_matrix
    E: np.ndarray
    Y: sp.csr_matrix
    M: sp.csr_matrix
    child_ptr: np.ndarray

    @property
    def both(self) -> Features:
        return Features(self.X, self.E)

    @property
    def stacked(self) -> np.ndarray:
        return np.hstack([self.X.toarray(), self.E]).astype(np.float64)

    def parent(self, node: int) -> int:
        return next(p for p in range(len(self.child_ptr) - 1) if node < self.child_ptr[p + 1])


def csr(A: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix(np.asarray(A, np.float32))


def problem(docs: int = 120, words: int = 40, width: int = 4, seed: int = 0) -> Problem:
    """Twelve nodes in four clusters, one of them empty; the second node has no positives."""
    rng = np.random.default_rng(seed)
    X = rng.random((docs, words)) * (rng.random((docs, words)) < 0.15)
    X[5] = 0  # a document without words
    Y = rng.integers(1, 4, (docs, 12)) * (rng.random((docs, 12)) < 0.12)
    Y[:, 1] = 0
    return Problem(
        csr(X),
        rng.normal(size=(docs, width)).astype(np.float32) / 2,
        csr(Y),
        csr(rng.random((docs, 4)) < 0.4),
        np.array([0, 3, 3, 9, 12]),
    )


def reference(p: Problem, node: int, Cp: float, Cn: float, bias: float, R: np.ndarray | None = None) -> np.ndarray:
    """Weights of one node by scikit-learn's liblinear: all features, then the bias term."""
    positive = p.Y.toarray()[:, node] > 0
    active = (p.M.toarray()[:, p.parent(node)] > 0) | positive
    cost = np.where(positive, Cp if R is None else Cp * R[:, node], Cn)
    if not (positive & active).any():  # liblinear wants two classes: a positive of no weight
        return np.full(p.stacked.shape[1] + 1, np.nan)
    svc = LinearSVC(loss="squared_hinge", dual=True, C=1, tol=1e-10, intercept_scaling=bias, max_iter=10**6)
    svc.fit(p.stacked[active], np.where(positive, 1, -1)[active], sample_weight=cost[active])
    return np.append(svc.coef_[0], svc.intercept_[0])


def objective(p: Problem, node: int, w: np.ndarray, b: float, Cp: float, Cn: float, bias: float) -> float:
    """What the solver minimises; ``b`` is the bias weight times its feature."""
    total = 0.5 * (w @ w + (b / bias) ** 2)
    for i, x in enumerate(p.stacked):
        positive = p.Y[i, node] > 0
        if positive or p.M[i, p.parent(node)] > 0:
            y, c = (1, Cp) if positive else (-1, Cn)
            total += c * max(0.0, 1 - y * (w @ x + b)) ** 2
    return float(total)
