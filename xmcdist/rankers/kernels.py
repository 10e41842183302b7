"""Compiled inner loops of the linear rankers that all solvers share: gather a cluster's documents, keep weights.

Letters: n documents of one cluster, F features those documents have, d dense width,
m nodes solved in one call.  Indices are unsigned, which spares the compiled loops the
branch for negative indices.  Nothing here knows of threads: a node's answer depends on
its documents and on ``(seed, node)`` only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit

__all__ = [
    "SUMS",
    "compact_rows",
    "dot",
    "feature_major",
    "gather",
    "join_documents",
    "next_random",
    "select_columns",
    "shuffle",
    "squared_norms",
]

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# Sums may be reordered (so dot products use vector units); NaN and infinity keep their meaning.
SUMS = {"reassoc", "contract", "nsz"}


@njit(cache=True, nogil=True)
def select_columns(indptr: I64, indices: NDArray[Any], data: F32, start: int, stop: int) -> tuple[I64, U32, F32]:
    """Columns ``[start, stop)`` of a CSR matrix by column: pointers, rows (ascending in a column), values.

    Reads the matrix twice, in order, and takes no memory but the result's: it may be mapped.
    """
    ptr = np.zeros(stop - start + 1, np.int64)
    for k in range(indptr[-1]):
        j = indices[k]
        if start <= j < stop:
            ptr[j - start + 1] += 1
    ptr = np.cumsum(ptr)
    at = ptr[:-1].copy()
    rows, values = np.empty(ptr[-1], np.uint32), np.empty(ptr[-1], np.float32)
    for i in range(indptr.size - 1):
        for k in range(indptr[i], indptr[i + 1]):
            j = indices[k]
            if start <= j < stop:
                rows[at[j - start]], values[at[j - start]] = i, data[k]
                at[j - start] += 1
    return ptr, rows, values


@njit(cache=True, nogil=True)
def compact_rows(indptr: I64, indices: U32, data: F32, docs: I64, where: U32) -> tuple[U64, U32, F32, I64]:
    """Rows ``docs`` of a CSR matrix with columns renumbered in order of first appearance.

    Frequent features appear early, so the hot part of a weight vector is one short stretch.

    Args:
        indptr: with ``indices`` and ``data`` the ``[N, D]`` matrix.
        indices: see ``indptr``.
        data: see ``indptr``.
        docs: ``[n]`` row ids.
        where: ``[D]`` zeros; scratch, zeros again afterwards.

    Returns:
        indptr ``[n+1]``, local indices, data, and the global id of every local column ``[F]``.
    """
    n = docs.size
    out_ptr = np.zeros(n + 1, np.uint64)
    for i in range(n):
        out_ptr[i + 1] = out_ptr[i] + np.uint64(indptr[docs[i] + 1] - indptr[docs[i]])
    total = out_ptr[n]
    out_idx = np.empty(total, np.uint32)
    out_val = np.empty(total, np.float32)
    columns = np.empty(np.minimum(np.int64(total), where.size), np.int64)
    found = 0
    for i in range(n):
        at = out_ptr[i]
        for k in range(indptr[docs[i]], indptr[docs[i] + 1]):
            f = indices[k]
            if where[f] == 0:
                columns[found] = f
                found += 1
                where[f] = found
            out_idx[at] = where[f] - np.uint32(1)
            out_val[at] = data[k]
            at += np.uint64(1)
    for j in range(found):
        where[columns[j]] = 0
    return out_ptr, out_idx, out_val, columns[:found].copy()


@njit(cache=True, nogil=True, fastmath=SUMS)
def squared_norms(indptr: U64, data: F32, dense: F32, bias: float) -> F64:
    """``||x||^2`` of every document, sparse, dense and bias parts together, ``[n]``."""
    n = indptr.size - 1
    out = np.full(n, bias * bias)
    for i in range(n):
        total = 0.0
        for k in range(indptr[i], indptr[i + 1]):
            total += np.float64(data[k]) * data[k]
        for j in range(dense.shape[1]):
            total += np.float64(dense[i, j]) * dense[i, j]
        out[i] += total
    return out


@njit(cache=True, nogil=True)
def join_documents(own: U32, positives: U32) -> tuple[I64, U32, U32, U32]:
    """The documents of a cluster and those that are positives of its nodes, as one ascending list.

    Args:
        own: ascending ids.
        positives: ids, node after node, so that an id may come again.

    Returns:
        ids; then positions among them of the cluster's own documents, of the others, and of
        every one of ``positives``.
    """
    outside, count = np.empty(positives.size, np.uint32), 0
    for i in positives:
        at = np.searchsorted(own, i)
        if at == own.size or own[at] != i:
            outside[count] = i
            count += 1
    others = np.sort(outside[:count])
    docs = np.empty(own.size + count, np.int64)
    shared, extra = np.empty(own.size, np.uint32), np.empty(count, np.uint32)
    found, a, more = 0, 0, 0
    for b in range(count + 1):
        while a < own.size and (b == count or own[a] < others[b]):
            docs[found], shared[a] = own[a], found
            found += 1
            a += 1
        if b < count and (b == 0 or others[b] != others[b - 1]):
            docs[found], extra[more] = others[b], found
            found += 1
            more += 1
    places = np.empty(positives.size, np.uint32)
    for k in range(positives.size):
        places[k] = np.searchsorted(docs[:found], positives[k])
    return docs[:found], shared, extra[:more], places


@njit(cache=True, nogil=True)
def gather(
    own: U32, positives: U32, indptr: I64, indices: U32, data: F32, dense: F32, where: U32
) -> tuple[I64, U32, U32, U32, U64, U32, F32, F32, I64, I64]:
    """A cluster's documents together: `join_documents`, and `compact_rows` of them.

    One call, since threads that solve small clusters would wait for each other between several.

    Returns:
        what `join_documents` gives; local indptr, indices, data and dense rows; local columns
        in the order of their global ids, and those ids, ascending.
    """
    docs, shared, extra, places = join_documents(own, positives)
    ptr, cols, vals, columns = compact_rows(indptr, indices, data, docs, where)
    rows = np.empty((docs.size, dense.shape[1]), np.float32)
    for i in range(docs.size):
        for j in range(dense.shape[1]):
            rows[i, j] = dense[docs[i], j]
    by_feature = np.argsort(columns)
    ids = np.empty(columns.size, np.int64)
    for r in range(columns.size):
        ids[r] = columns[by_feature[r]]
    return docs, shared, extra, places, ptr, cols, vals, rows, by_feature, ids


@njit(cache=True, nogil=True)
def next_random(state: np.uint64) -> tuple[np.uint64, np.uint64]:
    """One step of splitmix64: (new state, 64 random bits)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state, z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True)
def shuffle(order: U32, count: int, state: np.uint64) -> np.uint64:
    """Permute ``order[:count]`` in place."""
    for i in range(count - 1):
        state, bits = next_random(state)
        left = np.uint64(count - i)
        j = np.uint64(i) + (((bits >> np.uint64(32)) * left) >> np.uint64(32))
        kept = order[np.uint64(i)]
        order[np.uint64(i)] = order[j]
        order[j] = kept
    return state


@njit(cache=True, nogil=True, fastmath=SUMS)
def dot(wd: F64, x: F32) -> float:
    """Inner product of two dense vectors."""
    total = 0.0
    for j in range(x.size):
        total += wd[j] * x[j]
    return total


@njit(cache=True, nogil=True)
def feature_major(counts: I64, ranks: U32, values: F32, features: int) -> tuple[U32, I64, U32, F32]:
    """Turn node-after-node weights into feature-after-feature ones.

    Args:
        counts: ``[m]`` weights per node.
        ranks: feature of every weight, in ``[0, features)``.
        values: the weights.
        features: F.

    Returns:
        the features that occur, how many weights each has, and node and value of
        every weight, ordered by feature and then node.
    """
    start = np.zeros(features + 1, np.int64)
    for r in ranks:
        start[r + 1] += 1
    present = np.nonzero(start[1:])[0]
    per_feature = start[1:][present]
    start = np.cumsum(start)
    child = np.empty(ranks.size, np.uint32)
    value = np.empty(ranks.size, np.float32)
    k = 0
    for node in range(counts.size):
        for _ in range(counts[node]):
            at = start[ranks[k]]
            child[at], value[at] = node, values[k]
            start[ranks[k]] += 1
            k += 1
    return present.astype(np.uint32), per_feature, child, value
