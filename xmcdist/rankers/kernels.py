"""Compiled inner loops of the linear rankers: gather one cluster's documents, solve its nodes.

Letters: n documents of one cluster, F features those documents have, d dense width,
m nodes solved in one call.  Indices are unsigned, which spares the compiled loops the
branch for negative indices.  Nothing here knows of threads: a node's answer depends on
its documents and on ``(seed, node)`` only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["compact_rows", "feature_major", "local_positives", "select_columns", "solve_nodes", "squared_norms"]

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# Sums may be reordered (so dot products use vector units); NaN and infinity keep their meaning.
_SUMS = {"reassoc", "contract", "nsz"}


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
        where: ``[D]`` zeros; scratch.

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
    return out_ptr, out_idx, out_val, columns[:found].copy()


@njit(cache=True, nogil=True, fastmath=_SUMS)
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
def local_positives(docs: I64, rows: I64) -> U32:
    """Positions of the document ids ``rows`` in the sorted array ``docs``; every one is there."""
    out = np.empty(rows.size, np.uint32)
    for k in range(rows.size):
        out[k] = np.searchsorted(docs, rows[k])
    return out


@njit(cache=True, nogil=True)
def _next(state: np.uint64) -> tuple[np.uint64, np.uint64]:
    """One step of splitmix64: (new state, 64 random bits)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state, z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True)
def _shuffle(order: U32, count: int, state: np.uint64) -> np.uint64:
    """Permute ``order[:count]`` in place."""
    for i in range(count - 1):
        state, bits = _next(state)
        left = np.uint64(count - i)
        j = np.uint64(i) + (((bits >> np.uint64(32)) * left) >> np.uint64(32))
        kept = order[np.uint64(i)]
        order[np.uint64(i)] = order[j]
        order[j] = kept
    return state


@njit(cache=True, nogil=True, fastmath=_SUMS)
def _dot(wd: F64, x: F32) -> float:
    """Inner product of two dense vectors."""
    total = 0.0
    for j in range(x.size):
        total += wd[j] * x[j]
    return total


@njit(cache=True, nogil=True)
def _descend(
    indptr: U64,
    cols: U32,
    vals: F32,
    dense: F32,
    norms: F64,
    bias: float,
    y: F64,
    diag: F64,
    order: U32,
    eps: float,
    max_iter: int,
    state: np.uint64,
    w: F64,
    wd: F64,
    alpha: F64,
    shrunk: NDArray[np.bool_],
) -> float:
    """Dual coordinate descent over the documents in ``order``; fills w and wd, gives the bias weight.

    Documents far from the margin are left out for a while (``shrunk``, all False before and
    after).  They keep their place in the order all the same: liblinear takes them out of it, so
    that one decided by rounding changes the order of all others, and the result by a tenth.
    """
    wb, width = 0.0, dense.shape[1]
    left_out, shrink_above = 0, np.inf
    for _ in range(max_iter):
        highest, lowest = -np.inf, np.inf
        state = _shuffle(order, order.size, state)
        for i in order:
            if shrunk[i]:
                continue
            a = alpha[i]
            begin, end = indptr[i], indptr[i + np.uint32(1)]
            margin = wb * bias
            for k in range(begin, end):
                margin += w[cols[k]] * vals[k]
            if width:
                margin += _dot(wd, dense[i])
            grad = y[i] * margin - 1.0 + a * diag[i]
            if a == 0.0 and grad > shrink_above:
                shrunk[i] = True
                left_out += 1
                continue
            projected = min(grad, 0.0) if a == 0.0 else grad
            highest, lowest = max(highest, projected), min(lowest, projected)
            if abs(projected) > 1e-12:
                alpha[i] = max(a - grad / (norms[i] + diag[i]), 0.0)
                step = (alpha[i] - a) * y[i]
                for k in range(begin, end):
                    w[cols[k]] += step * vals[k]
                for j in range(dense.shape[1]):
                    wd[j] += step * dense[i, j]
                wb += step * bias
        shrink_above = highest if highest > 0.0 else np.inf
        if highest - lowest <= eps:
            if left_out == 0:
                break
            shrunk[order] = False  # check the documents that were left out
            left_out, shrink_above = 0, np.inf
    shrunk[order] = False
    return wb


@njit(cache=True, nogil=True)
def _keep(w: F64, by_feature: I64, threshold: float, limit: int, ranks: U32, values: F32) -> int:
    """Write the weights worth keeping, in feature order, into ranks and values; how many."""
    kept = 0
    for r in range(by_feature.size):
        value = np.float32(w[by_feature[r]])
        if value != 0.0 and abs(value) >= threshold:
            ranks[kept], values[kept] = r, value
            kept += 1
    if kept <= limit:
        return kept
    largest = np.argsort(-np.abs(values[:kept]), kind="mergesort")[:limit]  # stable: ties to the smaller feature
    largest.sort()
    for k in range(limit):
        ranks[k], values[k] = ranks[largest[k]], values[largest[k]]
    return limit


@njit(cache=True, nogil=True)
def solve_nodes(
    indptr: U64,
    cols: U32,
    vals: F32,
    dense: F32,
    norms: F64,
    by_feature: I64,
    shared: U32,
    pos_ptr: I64,
    pos: U32,
    pos_cost: F64,
    first_node: int,
    seed: np.uint64,
    negative: F64,
    eps: float,
    max_iter: int,
    bias: float,
    threshold: float,
    limit: int,
) -> tuple[I64, U32, F32, F32, F32]:
    """Solve the m nodes of one cluster.

    Documents ``[n, F]`` come from `compact_rows`, or are all there are; ``by_feature [F]`` lists
    local columns by global id.  Every node trains on the documents ``shared``, at the cost
    ``negative [n]`` of each, and on its positives, ``pos[pos_ptr[j]:pos_ptr[j+1]]``.
    Gives kept weights per node, their feature ranks and values, dense weights and bias terms.
    """
    n, features, m = norms.size, by_feature.size, pos_ptr.size - 1
    w, wd, alpha = np.zeros(features), np.zeros(dense.shape[1]), np.zeros(n)
    y, diag = np.full(n, -1.0), np.full(n, np.inf)
    for i in shared:
        diag[i] = 0.5 / negative[i]
    is_shared = np.zeros(n, np.bool_)
    is_shared[shared] = True
    order, shrunk = np.empty(n, np.uint32), np.zeros(n, np.bool_)
    counts, bias_out = np.zeros(m, np.int64), np.zeros(m, np.float32)
    dense_out = np.zeros((m, dense.shape[1]), np.float32)
    ranks, values = np.empty(features * 2, np.uint32), np.empty(features * 2, np.float32)
    used = 0
    for node in range(m):
        w[:], wd[:], alpha[:] = 0.0, 0.0, 0.0
        order[: shared.size] = shared
        count = shared.size
        for k in range(pos_ptr[node], pos_ptr[node + 1]):
            i = pos[k]
            y[i], diag[i] = 1.0, 0.5 / pos_cost[k]
            if not is_shared[i]:
                order[count] = i
                count += 1
        state, _ = _next(seed ^ _next(np.uint64(first_node + node))[1])
        documents = order[:count]
        wb = _descend(
            indptr, cols, vals, dense, norms, bias, y, diag, documents, eps, max_iter, state, w, wd, alpha, shrunk
        )
        for k in range(pos_ptr[node], pos_ptr[node + 1]):
            i = pos[k]
            y[i], diag[i] = -1.0, 0.5 / negative[i] if is_shared[i] else np.inf
        if used + features > ranks.size:
            ranks = np.append(ranks, np.empty(ranks.size, np.uint32))
            values = np.append(values, np.empty(values.size, np.float32))
        counts[node] = _keep(w, by_feature, threshold, limit, ranks[used:], values[used:])
        used += counts[node]
        dense_out[node, :] = wd
        bias_out[node] = wb * bias
    return counts, ranks[:used].copy(), values[:used].copy(), dense_out, bias_out


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
