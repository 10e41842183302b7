"""Support vector machines by dual coordinate descent, a cluster's nodes side by side.

Documents are visited in a new random order in every pass; for each one the coordinate of every
node (a lane, see `xmcdist.rankers.lanes`) is minimised exactly.  A node leaves out documents
far from its margin for a while.  They keep their place in the order all the same: liblinear
takes them out of it, so that one decided by rounding changes the order of all others, and the
result by a tenth.  A document that no node wants costs nothing.

Letters: n documents of one cluster, F features they have, d dense width, m nodes.

Source: Hsieh et al., ICML 2008 (dual coordinate descent with shrinking); Fan et al.,
LIBLINEAR, JMLR 2008.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit
from xmcdist.rankers.kernels import next_random, shuffle
from xmcdist.rankers.lanes import (
    add_dense,
    add_sparse,
    dense_products,
    dual_step,
    prefetch,
    prefetch_rows,
    sparse_products,
)

__all__ = ["solve_dual"]

U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Lanes = NDArray[Any]  # rows of one number a lane, float32 or float64

_16, _8, _4 = (0,) * 16, (0,) * 8, (0,) * 4
_FAR, _NEAR = np.int64(4), np.int64(2)  # how many documents ahead data and weights are asked for


class _State(NamedTuple):
    """A group of up to as many nodes as there are lanes."""

    member: U16  # [n] lanes that train on each document
    positive: U16  # [n] lanes it is one for
    cost: Lanes  # [n, lanes] see `dual_step`
    alpha: Lanes  # [n, lanes]
    weights: Lanes  # [F, lanes]
    dense: Lanes  # [d, lanes]
    bias: Lanes  # [1, lanes]


@njit(cache=True, nogil=True)
def _room(n: int, features: int, d: int, lanes: int, like: Lanes) -> _State:
    """Memory for a group of nodes; costs are ones, so that no lane reckons with what it finds there."""
    kind = like.dtype
    return _State(
        np.empty(n, np.uint16),
        np.empty(n, np.uint16),
        np.ones((n, lanes), kind),
        np.empty((n, lanes), kind),
        np.empty((features, lanes), kind),
        np.empty((d, lanes), kind),
        np.empty((1, lanes), kind),
    )


@njit(cache=True, nogil=True)
def _fill(
    state: _State, a: int, b: int, shared: U32, negative: F64, pos_ptr: I64, pos: U32, pos_cost: F64, hinge: bool
) -> None:
    """Put the nodes ``[a, b)`` into the lanes; everything starts from zero."""
    member, positive, cost, alpha, weights, dense, bias = state
    for start in (alpha, weights, dense, bias):
        start.fill(0.0)
    member.fill(0)
    positive.fill(0)
    everyone = np.uint16((1 << (b - a)) - 1)
    for i in shared:
        member[i] = everyone
        cost[i] = negative[i] if hinge else 0.5 / negative[i]
    for node in range(a, b):
        lane = np.uint16(1 << (node - a))
        for k in range(pos_ptr[node], pos_ptr[node + 1]):
            i = pos[k]
            member[i] |= lane
            positive[i] |= lane
            cost[i, np.uint64(node - a)] = pos_cost[k] if hinge else 0.5 / pos_cost[k]


@njit(cache=True, nogil=True)
def _wanted(order: U32, extra: U32, ids: I64, active: U16, live: np.uint16, key: np.uint64, visit: U32) -> int:
    """Write the documents that a live lane trains on, in the order of this pass, into ``visit``; how many.

    Documents outside the cluster, positives of some node, each go before one of the cluster's
    or behind the last; before which depends on nothing else than the document and the pass,
    so that the order of a node's documents does not depend on other nodes' positives.
    """
    first = np.zeros(order.size + 2 if extra.size else 1, np.int64)  # where extra documents of each place start
    places, sorted_extra = np.empty(extra.size, np.int64), np.empty(extra.size, np.uint32)
    for e in range(extra.size):
        document = np.uint64(ids[extra[e]] if ids.size else extra[e])
        bits = next_random(key ^ next_random(document)[1])[1] >> np.uint64(32)
        places[e] = np.int64((bits * np.uint64(order.size + 1)) >> np.uint64(32))
        first[places[e] + 1] += 1
    for q in range(first.size - 1):
        first[q + 1] += first[q]
    for e in range(extra.size):  # leaves in first[q] where those of place q end
        sorted_extra[first[places[e]]] = extra[e]
        first[places[e]] += 1
    count, at = 0, 0
    for q in range(order.size + 1):
        while at < extra.size and at < first[q]:
            i = sorted_extra[at]
            if active[i] & live:
                visit[count] = i
                count += 1
            at += 1
        if q < order.size:
            i = order[q]
            if active[i] & live:
                visit[count] = i
                count += 1
    return count


@njit(cache=True, nogil=True)
def _pass(
    width: tuple[int, ...],
    indptr: U64,
    cols: U32,
    vals: F32,
    dense: F32,
    norms: F64,
    value: float,
    state: _State,
    visit: U32,
    count: int,
    active: U16,
    live: np.uint16,
    bounds: Lanes,
    hinge: bool,
) -> np.uint16:
    """Visit ``visit[:count]`` once; gives the lanes that left some out."""
    _, positive, cost, alpha, weights, dense_weights, bias = state
    lanes, one = len(width), np.uint32(1)
    margin, step = np.empty((1, lanes), alpha.dtype), np.empty((1, lanes), alpha.dtype)
    left = np.uint16(0)
    for q in range(count):
        i = visit[q]
        if q + _FAR < count:
            far, near = visit[q + _FAR], visit[q + _NEAR]
            prefetch(cols, indptr[far], indptr[far + one])
            prefetch(vals, indptr[far], indptr[far + one])
            place = np.uint64(far) * np.uint64(lanes)
            prefetch(alpha, place, place + np.uint64(lanes))
            prefetch(cost, place, place + np.uint64(lanes))
            prefetch_rows(width, cols, indptr[near], indptr[near + one], weights)
        begin, end = indptr[i], indptr[i + one]
        for j in range(lanes):
            margin[0, j] = bias[0, j] * value
        sparse_products(width, cols, vals, begin, end, weights, margin)
        if dense_weights.size:
            dense_products(width, dense[i], dense_weights, margin)
        on = np.uint16(active[i] & live)
        done = dual_step(width, on, positive[i], margin, np.uint64(i), alpha, cost, norms[i], bounds, hinge, step)
        gone = np.uint16(on & ~np.uint16(done & np.uint32(0xFFFF)))
        if gone:
            active[i] = np.uint16(active[i] & ~gone)
            left = np.uint16(left | gone)
        if done >> np.uint32(16):
            add_sparse(width, cols, vals, begin, end, weights, step)
            if dense_weights.size:
                add_dense(width, dense[i], dense_weights, step)
            for j in range(lanes):
                bias[0, j] += step[0, j] * value
    return left


@njit(cache=True, nogil=True)
def _descend(
    indptr: U64,
    cols: U32,
    vals: F32,
    dense: F32,
    norms: F64,
    ids: I64,
    value: float,
    state: _State,
    shared: U32,
    extra: U32,
    key: np.uint64,
    hinge: bool,
    eps: float,
    max_iter: int,
) -> None:
    """Solve the nodes in the lanes; each stops by itself."""
    member, lanes = state.member, state.alpha.shape[1]
    active, order, visit = member.copy(), shared.copy(), np.empty(member.size, np.uint32)
    bounds = np.empty((4, lanes), state.alpha.dtype)
    live, left = np.uint16(0), np.uint16(0)
    for i in range(member.size):
        live = np.uint16(live | member[i])
    for j in range(lanes):
        bounds[0, j], bounds[1, j] = np.inf, -np.inf
    for _ in range(max_iter):
        key = shuffle(order, order.size, key)
        count = _wanted(order, extra, ids, active, live, key, visit)
        for j in range(lanes):
            bounds[2, j], bounds[3, j] = -np.inf, np.inf
        matrix = (indptr, cols, vals, dense, norms, value, state, visit, count, active, live, bounds, hinge)
        if lanes == 16:
            gone = _pass(_16, *matrix)
        elif lanes == 8:
            gone = _pass(_8, *matrix)
        else:
            gone = _pass(_4, *matrix)
        left = np.uint16(left | gone)
        back = np.uint16(0)
        for j in range(lanes):
            lane, high, low = np.uint16(1 << j), bounds[2, j], bounds[3, j]
            bounds[0, j] = high if high > 0.0 else np.inf
            bounds[1, j] = low if low < 0.0 else -np.inf
            if live & lane and high - low <= eps:
                if left & lane:  # check the documents that were left out
                    back = np.uint16(back | lane)
                    bounds[0, j], bounds[1, j] = np.inf, -np.inf
                else:
                    live = np.uint16(live & ~lane)
        if back:
            left = np.uint16(left & ~back)
            for i in range(member.size):
                active[i] = np.uint16(active[i] | (member[i] & back))
        if not live:
            break


@njit(cache=True, nogil=True)
def _keep(
    weights: Lanes, by_feature: I64, m: int, threshold: float, counts: I64, ranks: U32, values: F32, used: int
) -> tuple[U32, F32]:
    """Append the weights of the first m lanes that are worth keeping, node by node and in feature order.

    Gives the lists, which are new ones if the old were too short; counts becomes those of the m nodes.
    """
    for r in range(by_feature.size):
        for j in range(m):
            size = abs(np.float32(weights[r, j]))
            counts[j] += size != 0.0 and size >= threshold
    at, end = np.empty(m, np.int64), used
    for j in range(m):
        at[j] = end
        end += counts[j]
    if end > ranks.size:
        more_ranks, more_values = np.empty(2 * end, np.uint32), np.empty(2 * end, np.float32)
        for k in range(used):
            more_ranks[k], more_values[k] = ranks[k], values[k]
        ranks, values = more_ranks, more_values
    for r in range(by_feature.size):
        f = by_feature[r]
        for j in range(m):
            kept = np.float32(weights[f, j])
            if kept != 0.0 and abs(kept) >= threshold:
                ranks[at[j]], values[at[j]] = r, kept
                at[j] += 1
    return ranks, values


@njit(cache=True, nogil=True)
def solve_dual(
    lanes: int,
    like: Lanes,
    indptr: U64,
    cols: U32,
    vals: F32,
    dense: F32,
    norms: F64,
    ids: I64,
    by_feature: I64,
    shared: U32,
    extra: U32,
    negative: F64,
    pos_ptr: I64,
    pos: U32,
    pos_cost: F64,
    cluster: int,
    seed: np.uint64,
    hinge: bool,
    eps: float,
    max_iter: int,
    value: float,
    threshold: float,
) -> tuple[I64, U32, F32, F32, F32]:
    """Solve m nodes of one cluster, ``lanes`` (16, 8 or 4) at a time.

    Documents ``[n, F]`` come from `compact_rows`, or are all there are (then ``ids`` is empty);
    ``by_feature [F]`` lists local columns by global id.  Every node trains on the documents
    ``shared``, at the cost ``negative [n]`` of each, and on its positives
    ``pos[pos_ptr[j]:pos_ptr[j+1]]``; ``extra`` are those that are not shared.  ``like`` is an array
    of the type to reckon in; ``hinge``: the loss is not squared; ``value``: of the bias feature.

    A node's answer depends on its documents, ``seed`` and ``cluster`` only.  Memory: 4 (2n + F + d) bytes a
    lane in float32.

    Returns:
        kept weights per node, their feature ranks and values, dense weights ``[m, d]``, bias terms ``[m]``.
    """
    n, features, m, d = norms.size, by_feature.size, pos_ptr.size - 1, dense.shape[1]
    key = next_random(seed ^ next_random(np.uint64(cluster))[1])[0]
    state = _room(n, features, d, lanes, like)
    counts, bias_out, dense_out = np.zeros(m, np.int64), np.zeros(m, np.float32), np.zeros((m, d), np.float32)
    ranks, values = np.empty(features, np.uint32), np.empty(features, np.float32)
    used = np.int64(0)
    for a in range(0, m, lanes):
        b = min(a + lanes, m)
        if b - a <= lanes // 2 and lanes > 4:  # what is left over needs fewer
            state = _room(n, features, d, 4 if b - a <= 4 else 8, like)
        _fill(state, a, b, shared, negative, pos_ptr, pos, pos_cost, hinge)
        _descend(indptr, cols, vals, dense, norms, ids, value, state, shared, extra, key, hinge, eps, max_iter)
        ranks, values = _keep(state.weights, by_feature, b - a, threshold, counts[a:b], ranks, values, used)
        for j in range(b - a):
            used += counts[a + j]
            bias_out[a + j] = state.bias[0, j] * value
            for f in range(d):
                dense_out[a + j, f] = state.dense[f, j]
    return counts, ranks[:used].copy(), values[:used].copy(), dense_out, bias_out
