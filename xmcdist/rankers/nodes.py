"""One node of a cluster after the other, for the solvers that do not take them side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit
from xmcdist.rankers.kernels import next_random
from xmcdist.rankers.logistic import descend_logistic
from xmcdist.rankers.primal import ROOMS, solve_primal

__all__ = ["solve_nodes"]

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@njit(cache=True, nogil=True)
def _keep(w: F64, by_feature: I64, threshold: float, ranks: U32, values: F32, used: int) -> int:
    """Append the weights worth keeping, in feature order, to ranks and values; how many there are now."""
    for r in range(by_feature.size):
        value = np.float32(w[by_feature[r]])
        if value != 0.0 and abs(value) >= threshold:
            ranks[used], values[used] = r, value
            used += 1
    return used


@njit(cache=True, nogil=True)
def solve_nodes(
    indptr: U64,
    cols: U32,
    vals: F32,
    dense: F32,
    norms: F64,
    by_feature: I64,
    shared: U32,
    negative: F64,
    pos_ptr: I64,
    pos: U32,
    pos_cost: F64,
    first_node: int,
    seed: np.uint64,
    primal: bool,
    eps: float,
    max_iter: int,
    value: float,
    threshold: float,
) -> tuple[I64, U32, F32, F32, F32]:
    """Solve the m nodes of one cluster by logistic regression, or (``primal``) by Newton steps.

    Documents ``[n, F]`` come from `compact_rows`, or are all there are; ``by_feature [F]`` lists
    local columns by global id.  Every node trains on the documents ``shared``, at the cost
    ``negative [n]`` of each, and on its positives, ``pos[pos_ptr[j]:pos_ptr[j+1]]``.
    Gives kept weights per node, their feature ranks and values, dense weights and bias terms.
    """
    n, features, m = norms.size, by_feature.size, pos_ptr.size - 1
    w, wd, alpha = np.zeros(features), np.zeros(dense.shape[1]), np.zeros(n)
    room = np.empty((ROOMS if primal else 0, features + dense.shape[1] + 1))
    y, cost = np.full(n, -1.0), np.zeros(n)
    is_shared = np.zeros(n, np.bool_)
    for i in shared:
        is_shared[i], cost[i] = True, negative[i]
    order = np.empty(n, np.uint32)
    counts, bias_out = np.zeros(m, np.int64), np.zeros(m, np.float32)
    dense_out = np.zeros((m, dense.shape[1]), np.float32)
    ranks, values = np.empty(features * 2, np.uint32), np.empty(features * 2, np.float32)
    used = 0
    for node in range(m):
        w.fill(0.0)
        wd.fill(0.0)
        alpha.fill(0.0)
        for count in range(shared.size):
            order[count] = shared[count]
        count = shared.size
        for k in range(pos_ptr[node], pos_ptr[node + 1]):
            i = pos[k]
            y[i], cost[i] = 1.0, pos_cost[k]
            if not is_shared[i]:
                order[count] = i
                count += 1
        mine = order[:count]
        state, _ = next_random(seed ^ next_random(np.uint64(first_node + node))[1])
        if primal:
            wb = solve_primal(indptr, cols, vals, dense, value, y, cost, mine, eps, max_iter, w, wd, room)
        else:
            wb = descend_logistic(
                indptr, cols, vals, dense, norms, value, y, cost, mine, eps, max_iter, state, w, wd, alpha
            )
        for k in range(pos_ptr[node], pos_ptr[node + 1]):
            i = pos[k]
            y[i], cost[i] = -1.0, negative[i] if is_shared[i] else 0.0
        if used + features > ranks.size:
            ranks = np.append(ranks, np.empty(ranks.size, np.uint32))
            values = np.append(values, np.empty(values.size, np.float32))
        counts[node] = _keep(w, by_feature, threshold, ranks, values, used) - used
        used += counts[node]
        for f in range(wd.size):
            dense_out[node, f] = wd[f]
        bias_out[node] = wb * value
    return counts, ranks[:used].copy(), values[:used].copy(), dense_out, bias_out
