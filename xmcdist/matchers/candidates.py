"""The clusters that compete for a document at one level, as ragged rows, never padded.

Candidates of document i are the children of its active parents and its positives.  They
are worked out for a whole global batch on every rank (ids only, no scores), then each rank
keeps those that it owns; how many there were in all is what the loss divides by.

Letters: b documents, K nodes of the level, p (document, node) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from xmcdist.observability.compiling import njit

__all__ = ["CandidateSource", "Candidates", "children_of"]

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
U64 = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Ragged rows of candidates.

    Attributes:
        doc_ptr: int64 ``[b + 1]``; document i has pairs ``doc_ptr[i] : doc_ptr[i + 1]``.
        node: int64 ``[p]``, ascending within a document; counted from the first owned node
            after `restrict`.
        value: float32 ``[p]``, the label count of a positive, 0 for a negative.
        weight: float32 ``[p]``, of the pair in the loss: 1 for a positive.
        counts: int64 ``[b]``, candidates over all ranks.
    """

    doc_ptr: I64
    node: I64
    value: F32
    weight: F32
    counts: I64

    @property
    def num_docs(self) -> int:
        return len(self.counts)

    def doc(self) -> I64:
        """Place of each pair's document in the batch, int64 ``[p]``."""
        return np.repeat(np.arange(self.num_docs, dtype=np.int64), np.diff(self.doc_ptr))

    def restrict(self, start: int, stop: int) -> Candidates:
        """Only nodes of ``[start, stop)``, counted from ``start``; ``counts`` stay those of all."""
        mine = (self.node >= start) & (self.node < stop)
        before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(mine, dtype=np.int64)])
        return Candidates(
            before[self.doc_ptr], self.node[mine] - start, self.value[mine], self.weight[mine], self.counts
        )

    def take(self, places: ArrayLike) -> Candidates:
        """Some documents of the batch, in the order of their places in it."""
        at = np.asarray(places, dtype=np.int64)
        lengths = np.diff(self.doc_ptr)[at]
        ptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        pairs = np.arange(ptr[-1]) + np.repeat(self.doc_ptr[at] - ptr[:-1], lengths)
        return Candidates(ptr, self.node[pairs], self.value[pairs], self.weight[pairs], self.counts[at])


class CandidateSource:
    """Candidates of any documents of a level at any step.

    Args:
        M: active parents ``[N, K_above]``, indices ascending.
        Y: labels lifted to this level ``[N, K]``, counts, indices ascending.
        child_ptr: int64 ``[K_above + 1]``: children of node p are ``child_ptr[p] : child_ptr[p + 1]``.
        max_active: most candidates a document.  Positives are always kept, even when there
            are more; negatives are drawn from without replacement, all equally likely.
        seed: with ``level``, the step and the document id, what negatives are drawn by.
        level: number of the level.
        weighted: a negative weighs what M stores for its parent; otherwise M's values are not
            looked at and all weigh 1.  Which are drawn does not depend on weights.

    Raises:
        ValueError: the shapes do not fit together, or ``max_active`` is below 1.
    """

    def __init__(
        self,
        M: sp.csr_matrix,
        Y: sp.csr_matrix,
        child_ptr: I64,
        *,
        max_active: int,
        seed: int,
        level: int,
        weighted: bool = False,
    ) -> None:
        if M.shape != (Y.shape[0], len(child_ptr) - 1) or Y.shape[1] != int(child_ptr[-1]):
            raise ValueError(
                f"active parents {M.shape} and labels {Y.shape} do not fit a level of "
                f"{int(child_ptr[-1])} nodes below {len(child_ptr) - 1}"
            )
        if max_active < 1:
            raise ValueError(f"negatives.max_active={max_active} must be at least 1")
        self.num_docs, self.num_nodes = int(Y.shape[0]), int(Y.shape[1])
        self._M, self._Y = M, Y
        self._child_ptr = np.ascontiguousarray(child_ptr, dtype=np.int64)
        self._max_active, self._weighted = max_active, weighted
        self._key = int(np.random.SeedSequence((seed, level)).generate_state(1, np.uint64)[0])

    def of(self, ids: ArrayLike, step: int) -> Candidates:
        """Candidates of documents ``ids`` ``[b]`` at a step; a pure function of its arguments.

        Cost: O(children of active parents + positives) of these documents.
        """
        docs = np.asarray(ids, dtype=np.int64)
        M_ptr, parents, stored = _rows(self._M, docs)
        Y_ptr, positives, values = _rows(self._Y, docs)
        room = _room(M_ptr, parents, Y_ptr, self._child_ptr)
        doc_ptr, node, value, weight = _union(
            docs,
            (M_ptr, parents, stored if self._weighted else np.ones_like(stored)),
            (Y_ptr, positives, values),
            self._child_ptr,
            self._max_active,
            np.uint64(self._key),
            np.uint64(step),
            np.empty(room, np.int64),
            np.empty(room, np.float32),
            np.empty(room, np.float32),
        )
        return Candidates(doc_ptr, node, value, weight, np.diff(doc_ptr))


def children_of(parents: sp.csr_matrix, child_ptr: I64, start: int, stop: int) -> tuple[I64, I64, F32]:
    """Children within ``[start, stop)`` of every stored entry of some rows.

    Args:
        parents: ``[b, K_above]``, indices ascending.
        child_ptr: int64 ``[K_above + 1]``.
        start: first node wanted.
        stop: the node after the last.

    Returns:
        ``doc_ptr`` int64 ``[b + 1]``; ``node`` int64 ``[p]``, counted from ``start``, ascending
        in a row; ``value`` float32 ``[p]``, what is stored for the parent.
    """
    first = np.clip(child_ptr[parents.indices], start, stop)
    sizes = np.clip(child_ptr[np.asarray(parents.indices, np.int64) + 1], start, stop) - first
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    node = np.arange(ends[-1]) + np.repeat(first - start - ends[:-1], sizes)
    return ends[parents.indptr], node, np.repeat(parents.data.astype(np.float32, copy=False), sizes)


def _rows(A: sp.csr_matrix, rows: I64) -> tuple[I64, I64, F32]:
    """Ragged rows of a matrix that may be memory-mapped: only what is asked for is read."""
    starts = A.indptr[rows].astype(np.int64)
    lengths = A.indptr[rows + 1].astype(np.int64) - starts
    ptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    at = np.arange(ptr[-1]) + np.repeat(starts - ptr[:-1], lengths)
    return ptr, A.indices[at].astype(np.int64), A.data[at].astype(np.float32)


@njit(cache=True)
def _room(M_ptr: I64, parents: I64, Y_ptr: I64, child_ptr: I64) -> int:
    """Most pairs there can be."""
    total = Y_ptr[-1]
    for k in range(M_ptr[-1]):
        total += child_ptr[parents[k] + 1] - child_ptr[parents[k]]
    return total  # type: ignore[no-any-return]


@njit(cache=True)
def _mix(x: np.uint64) -> np.uint64:
    """Splitmix64's finalizer (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True)
def _union(
    docs: I64,
    M: tuple[I64, I64, F32],
    Y: tuple[I64, I64, F32],
    child_ptr: I64,
    max_active: int,
    key: np.uint64,
    step: np.uint64,
    node: I64,
    value: F32,
    weight: F32,
) -> tuple[I64, I64, F32, F32]:
    """Merge children and positives of each document, then thin the negatives out."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    ptr = np.zeros(docs.size + 1, np.int64)
    end = 0
    for i in range(docs.size):
        begin = end
        at, last = Y[0][i], Y[0][i + 1]
        for k in range(M[0][i], M[0][i + 1]):
            for child in range(child_ptr[M[1][k]], child_ptr[M[1][k] + 1]):
                while at < last and Y[1][at] < child:  # positives outside the active parents
                    node[end], value[end], weight[end] = Y[1][at], Y[2][at], 1.0
                    at, end = at + 1, end + 1
                node[end], value[end], weight[end] = child, 0.0, M[2][k]
                if at < last and Y[1][at] == child:
                    value[end], weight[end] = Y[2][at], 1.0
                    at += 1
                end += 1
        while at < last:
            node[end], value[end], weight[end] = Y[1][at], Y[2][at], 1.0
            at, end = at + 1, end + 1
        if end - begin > max_active:
            negatives = end - begin - (Y[0][i + 1] - Y[0][i])
            wanted = max(max_active - (Y[0][i + 1] - Y[0][i]), 0)
            state = _mix(key + _mix(step * gamma + _mix(np.uint64(docs[i]) + gamma)))
            kept = begin
            for k in range(begin, end):
                keep = value[k] > 0.0
                if not keep:  # each of those left has the same chance: Knuth's selection sampling
                    state += gamma
                    keep = _mix(state) % np.uint64(negatives) < np.uint64(wanted)
                    negatives -= 1
                    if keep:
                        wanted -= 1
                if keep:
                    node[kept], value[kept], weight[kept] = node[k], value[k], weight[k]
                    kept += 1
            end = kept
        ptr[i + 1] = end
    return ptr, node[:end].copy(), value[:end].copy(), weight[:end].copy()
