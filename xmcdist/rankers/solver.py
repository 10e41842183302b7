"""Linear one-vs-all rankers of one tree level.

For node l of the level, with parent p(l):

    min_w  1/2 ||w||^2 + sum over i in A(l) of c_i loss(y_i (w . x_i + b * bias))

with one of the losses ``max(0, 1 - z)^2`` (``l2svc_dual``, ``l2svc_primal``), ``max(0, 1 - z)``
(``l1svc_dual``) and ``log(1 + exp(-z))`` (``logistic_dual``).

A(l) is every document with ``M[i, p(l)]`` stored, and every positive of l; y_i is +1 for
positives, -1 otherwise; c_i is Cp (times the relevance) for positives, Cn otherwise, with
weighted negatives Cn times ``M[i, p(l)]``.  The bias weight b is part of w.  A node without
positives is solved like any other and learns to say no.

Source: Hsieh et al., ICML 2008 (dual coordinate descent with shrinking); Fan et al.,
LIBLINEAR, JMLR 2008; Yu et al., PECOS, arXiv:2010.05878 (the tree).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import scipy.sparse as sp
from numba import get_num_threads
from numpy.typing import NDArray

from xmcdist.rankers import kernels
from xmcdist.rankers.columns import frozen, member_columns, positive_columns
from xmcdist.rankers.dual import solve_dual
from xmcdist.rankers.nodes import solve_nodes
from xmcdist.rankers.part import Chunk, WeightPart
from xmcdist.rankers.partition import level_costs
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.features import Features

__all__ = ["SOLVERS", "SolverParams", "solve_level"]

SOLVERS = ("l2svc_dual", "l1svc_dual", "logistic_dual", "l2svc_primal")

T = TypeVar("T")
Weights = tuple[NDArray[Any], ...]  # what the compiled solvers return
Submit = Callable[..., Callable[[], Any]]  # starts a call, gives what to call for its result

# Share of all documents beyond which a cluster's are used where they are.  Copied together and
# with features renumbered a pass is faster unless they are nearly all: 1.5 to 1.9 times at 40 %.
_MOST = 0.5
_LANES = (16, 8, 4)  # nodes side by side: as many as there are, and fewer where threads would go without
_SIDE_BY_SIDE = ("l2svc_dual", "l1svc_dual")
_NO_IDS = np.zeros(0, np.int64)
_FINE = 1e-3  # a tolerance below this is beyond what sums in float32 tell


@dataclass(frozen=True, slots=True)
class SolverParams:
    """What one level's rankers are solved with."""

    Cp: float = 1.0  # cost of positives
    Cn: float = 1.0  # cost of negatives
    eps: float = 0.1  # stop when the projected gradients lie within it
    max_iter: int = 100  # most passes over a node's documents
    bias: float = 1.0  # value of the bias feature; 0 turns it off
    threshold: float = 0.1  # smaller sparse weights are dropped; dense ones never
    max_nonzeros_per_label: int | None = None  # most sparse weights a node: those of largest size
    seed: int = 0
    weighted_negatives: bool = False  # values of M are the weights of negatives; 0: none
    solver: str = "l2svc_dual"  # one of `SOLVERS`
    precision: str = "auto"  # of the support vector machines: float32 | float64 | auto: float64 where eps asks for it

    def __post_init__(self) -> None:
        for name, known in (("solver", SOLVERS), ("precision", ("auto", "float32", "float64"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(known)}")
        for name in ("Cp", "Cn", "eps", "max_iter"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0")
        for name in ("bias", "threshold"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative")
        if self.max_nonzeros_per_label is not None and self.max_nonzeros_per_label < 1:
            raise ValueError(f"max_nonzeros_per_label ({self.max_nonzeros_per_label}) must be at least 1")


def solve_level(
    features: Features,
    Y_t: sp.csr_matrix,
    M: sp.csr_matrix,
    child_ptr: NDArray[np.int64],
    params: SolverParams,
    relevance: sp.csr_matrix | NDArray[np.float64] | None = None,
    clusters: tuple[int, int] | None = None,
    *,
    nodes: tuple[int, int] | None = None,
    threads: int | None = None,
) -> LevelWeights:
    """Solve the nodes of one level, or a contiguous range of them.

    A node's weights are the same bit for bit whatever the range and the number of threads.

    Args:
        features: of the N documents.
        Y_t: ``[N, K_t]``; positives are entries above 0.
        M: ``[N, K_{t-1}]``; the stored entries of a column, whatever their value, are the
            documents its children train on.  With ``params.weighted_negatives`` their values,
            0 or more, multiply Cn, and a document of value 0 is left out.
        child_ptr: ``[K_{t-1}+1]``; the children of cluster p are ``child_ptr[p]:child_ptr[p+1]``.
        params: costs, tolerance, thresholds.
        relevance: ``[N, K_t]``, above 0 for every positive; multiplies Cp.  Or ``[N]``: factors by
            which the values of Y_t become relevances, such as `l1_scales`.
        clusters: half-open range of clusters whose children are solved; default all.
        nodes: the same as a range of nodes, which may cut a cluster.
        threads: default numba's.

    Raises:
        ValueError: shapes disagree, or a positive has no relevance.

    Cost: per pass, children times stored values of their cluster's documents.  Memory: the
    documents of one cluster for each thread, the own columns of Y_t and M, and the result.
    Features, Y_t and M may be memory-mapped; of a cluster with many of all documents the
    features are used where they are.
    """
    start, stop = _node_range(features, Y_t, M, child_ptr, clusters, nodes)
    problem = _Problem(features, Y_t, M, child_ptr, params, relevance, (start, stop))
    workers = max(threads or get_num_threads(), 1)
    chunks: dict[int, Chunk] = {}
    with _executor(workers) as submit:
        wide, narrow = problem.schedule(workers)
        started: list[tuple[int, Callable[[], Chunk]]] = []
        for p in wide:  # too large for one thread: its nodes are spread over all of them
            chunks.update((q, result()) for q, result in started[:-1])  # documents of two at a time
            started = [*started[-1:], (p, problem.solve_wide(p, submit, workers))]
        started += [(p, submit(problem.solve_cluster, p)) for p in narrow]
        chunks.update((p, result()) for p, result in started)
    return problem.assemble([chunks.pop(p) for p in sorted(chunks)])


def _largest(counts: NDArray[Any], ranks: NDArray[Any], values: NDArray[Any], limit: int) -> Weights:
    """At most ``limit`` weights a node, those of largest size; ties to the smaller feature."""
    node = np.repeat(np.arange(counts.size), counts)
    order = np.lexsort((ranks, -np.abs(values), node))
    place = np.empty(order.size, np.int64)
    place[order] = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = place < limit
    return np.minimum(counts, limit), ranks[kept], values[kept]


class _Documents(NamedTuple):
    """The documents one cluster's nodes train on, with features renumbered; or all documents as they are."""

    ids: NDArray[np.int64]  # [n] ascending; empty: all
    indptr: NDArray[np.uint64]
    cols: NDArray[np.uint32]
    vals: NDArray[np.float32]
    dense: NDArray[np.float32]  # [n, d]
    norms: NDArray[np.float64]  # [n]
    by_feature: NDArray[np.int64]  # [F] local columns in the order of their global ids
    shared: NDArray[np.uint32]  # documents that train every node
    extra: NDArray[np.uint32]  # the rest, positives of some
    positives: NDArray[np.uint32]  # of all nodes, one after the other
    negative: NDArray[np.float64]  # [n] costs of the shared ones as negatives
    columns: NDArray[np.int64]  # [F] global ids, ascending


class _Problem:
    """One level's matrices by column, and how one cluster of it is solved."""

    def __init__(
        self,
        features: Features,
        Y_t: sp.csr_matrix,
        M: sp.csr_matrix,
        child_ptr: NDArray[np.int64],
        params: SolverParams,
        relevance: sp.csr_matrix | NDArray[np.float64] | None,
        nodes: tuple[int, int],
    ) -> None:
        self.params, self.nodes = params, nodes
        self.first = int(np.searchsorted(child_ptr, nodes[0], side="right")) - 1 if nodes[0] < nodes[1] else 0
        self.last = int(np.searchsorted(child_ptr, nodes[1], side="left")) if nodes[0] < nodes[1] else 0
        # Where the children of each of our clusters start, cut to the nodes we solve; [C+1].
        self.bounds = np.clip(child_ptr[self.first : self.last + 1], *nodes).astype(np.int64)
        self.members = member_columns(M, (self.first, self.last), weighted=params.weighted_negatives)
        self.positives = positive_columns(Y_t, relevance, nodes)
        self.num_docs = features.num_rows
        self.num_sparse, self.num_dense = features.num_sparse, features.num_dense
        X = features.sparse
        if X is None:
            X = sp.csr_matrix(np.zeros((self.num_docs, 0), np.float32))
        self.indptr = X.indptr.astype(np.int64)
        self.indices = frozen(X.indices.view(np.uint32) if X.indices.dtype == np.int32 else X.indices.astype(np.uint32))
        self.data = frozen(X.data.astype(np.float32, copy=False))
        dense = np.zeros((self.num_docs, 0), np.float32) if features.dense is None else features.dense
        self.dense = frozen(dense)
        self.out_dense = np.zeros((nodes[1] - nodes[0], self.num_dense), np.float32)  # filled cluster by cluster
        self.out_bias = np.zeros(nodes[1] - nodes[0], np.float32)
        fine = params.eps < _FINE if params.precision == "auto" else params.precision == "float64"
        self.scratch = threading.local()
        self.like = np.zeros((0, 0), np.float64 if fine else np.float32)  # what to reckon in
        self.costs = level_costs(self._sizes(), self.num_dense, self.bounds)

    def _sizes(self) -> NDArray[np.int64]:
        """Documents of each of our clusters, and their stored sparse values."""
        values = np.concatenate([[0], np.cumsum(np.diff(self.indptr)[self.members.rows])])[self.members.ptr]
        return np.stack([np.diff(self.members.ptr), np.diff(values)], axis=1).astype(np.int64)

    def schedule(self, workers: int) -> tuple[list[int], list[int]]:
        """Clusters to spread over all threads, and clusters for one thread each, costliest first."""
        order = [int(c) for c in np.argsort(-self.costs, kind="stable")]
        large = self.costs.sum() / (4 * workers)
        is_wide = (self.costs > large) & (np.diff(self.bounds) > 1) & (workers > 1)
        return [c for c in order if is_wide[c]], [c for c in order if not is_wide[c]]

    def _gather(self, c: int) -> _Documents:
        """The documents of one cluster."""
        span = self.members.column(c)
        own, weights = self.members.rows[span], self.members.values[span]
        start, stop = self.bounds[c : c + 2] - self.nodes[0]
        positives = self.positives.rows[self.positives.ptr[start] : self.positives.ptr[stop]]
        if own.size + positives.size > _MOST * self.num_docs:
            docs, _, extra, _ = kernels.join_documents(own, positives)
            if docs.size > _MOST * self.num_docs:
                return self._all_documents(own, docs[extra].astype(np.uint32), positives, weights)
        if not hasattr(self.scratch, "where"):
            self.scratch.where = np.zeros(self.num_sparse, np.uint32)
        docs, shared, extra, places, *matrix, by_feature, columns = kernels.gather(
            own, positives, self.indptr, self.indices, self.data, self.dense, self.scratch.where
        )
        return self._documents(docs, matrix, by_feature, columns, shared, extra, places, weights)

    def _all_documents(
        self,
        own: NDArray[np.uint32],
        others: NDArray[np.uint32],
        positives: NDArray[np.uint32],
        weights: NDArray[np.float32],
    ) -> _Documents:
        """Every document where it is, for a cluster with so many that a copy would be one of nearly all.

        The solver meets the same documents in the same order, and each one's values in the
        same order, so the weights are those of renumbered features bit for bit.
        """
        features = np.arange(self.num_sparse)
        matrix = (self.indptr.view(np.uint64), self.indices, self.data, self.dense)
        return self._documents(_NO_IDS, matrix, features, features, own, others, positives, weights)

    def _documents(
        self,
        ids: NDArray[np.int64],
        matrix: Sequence[NDArray[Any]],
        by_feature: NDArray[np.int64],
        columns: NDArray[np.int64],
        shared: NDArray[np.uint32],
        extra: NDArray[np.uint32],
        positives: NDArray[np.uint32],
        weights: NDArray[np.float32],
    ) -> _Documents:
        indptr, cols, vals, dense = matrix[0], frozen(matrix[1]), frozen(matrix[2]), frozen(matrix[3])
        norms = kernels.squared_norms(indptr, vals, dense, float(self.params.bias))
        negative = np.zeros(norms.size)
        negative[shared] = self.params.Cn * weights.astype(np.float64)
        return _Documents(
            ids, indptr, cols, vals, dense, norms, by_feature, shared, extra, positives, negative, columns
        )

    def _solve(self, local: _Documents, start: int, stop: int, lanes: int = _LANES[0]) -> Weights:
        """Solve the nodes ``[start, stop)`` of one cluster, at most ``lanes`` side by side."""
        params, Y = self.params, self.positives
        a, b = start - self.nodes[0], stop - self.nodes[0]
        span = slice(Y.ptr[a], Y.ptr[b])
        c = int(np.searchsorted(self.bounds, start, side="right")) - 1
        origin = Y.ptr[self.bounds[c] - self.nodes[0]]
        positives = local.positives[span.start - origin : span.stop - origin]
        pointers = Y.ptr[a : b + 1] - Y.ptr[a]
        cost = params.Cp * Y.values[span].astype(np.float64)
        matrix = (local.indptr, local.cols, local.vals, local.dense, local.norms)
        settings = (float(params.eps), int(params.max_iter), float(params.bias), float(params.threshold))
        seed = np.uint64(params.seed)
        if params.solver in _SIDE_BY_SIDE:
            side_by_side: Weights = solve_dual(
                lanes, self.like, *matrix, local.ids, local.by_feature, local.shared, local.extra, local.negative,
                pointers, positives, cost, self.first + c, seed, params.solver == "l1svc_dual", *settings,
            )  # fmt: skip
            return side_by_side
        solved: Weights = solve_nodes(
            *matrix, local.by_feature, local.shared, local.negative, pointers, positives, cost,
            int(start), seed, params.solver == "l2svc_primal", *settings,
        )  # fmt: skip
        return solved

    def solve_cluster(self, c: int) -> Chunk:
        """One cluster on the calling thread: its chunk of the level's weights."""
        local = self._gather(c)
        start, stop = self.bounds[c : c + 2]
        return self._chunk([self._solve(local, start, stop)], local.columns, start, stop)

    def solve_wide(self, c: int, submit: Submit, workers: int) -> Callable[[], Chunk]:
        """Start one cluster with its nodes spread over all threads; gives what to call for its chunk."""
        local = self._gather(c)
        start, stop = (int(x) for x in self.bounds[c : c + 2])
        lanes = next((n for n in _LANES if (stop - start) // n >= workers), _LANES[-1])
        edges = [*range(start, stop, lanes), stop]
        results = [submit(self._solve, local, a, b, lanes) for a, b in pairwise(edges)]
        return lambda: self._chunk([result() for result in results], local.columns, start, stop)

    def _chunk(self, solved: Sequence[Weights], columns: NDArray[np.int64], start: int, stop: int) -> Chunk:
        """Keep the dense weights of one cluster's nodes, and give (feature, weights per feature, child, value)."""
        counts, ranks, values, dense, bias = (np.concatenate(x) for x in zip(*solved, strict=True))
        limit = self.params.max_nonzeros_per_label
        if limit is not None and counts.size and counts.max() > limit:
            counts, ranks, values = _largest(counts, ranks, values, limit)
        nodes = slice(start - self.nodes[0], stop - self.nodes[0])
        self.out_dense[nodes], self.out_bias[nodes] = dense, bias
        present, per_feature, child, value = kernels.feature_major(counts, ranks, values, columns.size)
        return columns[present].astype(np.uint32), per_feature, child, value

    def assemble(self, chunks: list[Chunk]) -> LevelWeights:
        """All chunks, in cluster order, as one level; the list is emptied."""
        part = WeightPart.from_chunks(chunks, self.bounds, self.out_dense, self.out_bias, self.first, self.num_sparse)
        return LevelWeights((part,))


def _node_range(
    features: Features,
    Y_t: sp.csr_matrix,
    M: sp.csr_matrix,
    child_ptr: NDArray[np.int64],
    clusters: tuple[int, int] | None,
    nodes: tuple[int, int] | None,
) -> tuple[int, int]:
    """The nodes to solve, after checking that everything fits together."""
    n, parents, children = features.num_rows, child_ptr.size - 1, int(child_ptr[-1])
    if Y_t.shape != (n, children):
        raise ValueError(f"Y_t is {Y_t.shape}, must be ({n}, {children}): documents x children")
    if M.shape != (n, parents):
        raise ValueError(f"M is {M.shape}, must be ({n}, {parents}): documents x clusters")
    if clusters is not None and nodes is not None:
        raise ValueError(f"give clusters ({clusters}) or nodes ({nodes}), not both")
    lo, hi = (0, parents) if clusters is None else clusters
    if not 0 <= lo <= hi <= parents:
        raise ValueError(f"clusters ({lo}, {hi}) must be a range within (0, {parents})")
    start, stop = (int(child_ptr[lo]), int(child_ptr[hi])) if nodes is None else nodes
    if not 0 <= start <= stop <= children:
        raise ValueError(f"nodes ({start}, {stop}) must be a range within (0, {children})")
    return start, stop


def _same(answer: T) -> T:
    return answer


@contextmanager
def _executor(workers: int) -> Iterator[Submit]:
    """A function that starts a call and returns what to call for its result."""
    if workers == 1:
        yield lambda fn, *args: partial(_same, fn(*args))
        return
    with ThreadPoolExecutor(workers) as pool:
        yield lambda fn, *args: pool.submit(fn, *args).result
