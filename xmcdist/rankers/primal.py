"""Compiled solver of one node: L2-loss support vector machine by truncated Newton steps on the primal.

    min_w  1/2 ||w||^2 + sum over i of c_i max(0, 1 - y_i (w . x_i + b * bias))^2

A step solves ``H s = -g`` roughly by conjugate gradients and goes to the lowest point along s.
H, the identity and twice the sum of ``c_i x_i x_i'`` over the documents inside the margin, is
never formed: a product with it reads those documents once, so that the many which are
classified well cost nothing but the search along s.

Source: Lin, Weng, Keerthi, "Trust region Newton method for large-scale logistic regression",
JMLR 9 (2008); Galli, Lin, "A study on truncated Newton methods for linear classification",
IEEE TNNLS 33 (2022): line search instead of a trust region, conjugate gradients until the
quadratic model gains little.  Their diagonal preconditioner (Hsia, Chiang, Lin, ACML 2018) was
tried: for documents of unit length it costs steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit
from xmcdist.rankers.kernels import SUMS, dot

__all__ = ["ROOMS", "solve_primal"]

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

ROOMS = 6  # rows of scratch
_GAIN = 0.5  # conjugate gradients end when a step gains less than this share of the mean so far
_CG = 100  # most conjugate gradient steps


@njit(cache=True, nogil=True, fastmath=SUMS)
def _inner(a: F64, b: F64) -> float:
    """Inner product of two vectors."""
    total = 0.0
    for j in range(a.size):
        total += a[j] * b[j]
    return total


# Three loops over documents follow.  A gathered sum is slower by vector units, so they are without
# SUMS; and a call for each document, however short, takes longer than a short document.


@njit(cache=True, nogil=True)
def _products(indptr: U64, cols: U32, vals: F32, dense: F32, bias: float, documents: U32, v: F64, out: F64) -> None:
    """``out[i]``: inner product of document i and ``v [F+d+1]``: sparse, dense and bias parts."""
    last, width = v.size - 1, dense.shape[1]
    for i in documents:
        total = v[last] * bias
        for k in range(indptr[i], indptr[i + np.uint32(1)]):
            total += v[cols[k]] * vals[k]
        if width:
            total += dot(v[last - width : last], dense[i])
        out[i] = total


@njit(cache=True, nogil=True)
def _gradient(
    indptr: U64,
    cols: U32,
    vals: F32,
    dense: F32,
    bias: float,
    y: F64,
    cost: F64,
    order: U32,
    margins: F64,
    inside: U32,
    u: F64,
    g: F64,
) -> int:
    """Fill g and the documents inside the margin; how many those are."""
    g[:] = u
    count, last, width = 0, g.size - 1, dense.shape[1]
    for i in order:
        slack = 1.0 - y[i] * margins[i]
        if slack > 0.0:
            inside[count] = i
            count += 1
            step = -2.0 * cost[i] * y[i] * slack
            for k in range(indptr[i], indptr[i + np.uint32(1)]):
                g[cols[k]] += step * vals[k]
            for j in range(width):
                g[last - width + j] += step * dense[i, j]
            g[last] += step * bias
    return count


@njit(cache=True, nogil=True)
def _curve(indptr: U64, cols: U32, vals: F32, dense: F32, bias: float, cost: F64, inside: U32, p: F64, Hp: F64) -> None:
    """``Hp`` is H times p."""
    last, width = p.size - 1, dense.shape[1]
    Hp[:] = p
    for i in inside:
        begin, end = indptr[i], indptr[i + np.uint32(1)]
        t = p[last] * bias
        for k in range(begin, end):
            t += p[cols[k]] * vals[k]
        if width:
            t += dot(p[last - width : last], dense[i])
        t *= 2.0 * cost[i]
        for k in range(begin, end):
            Hp[cols[k]] += t * vals[k]
        for j in range(width):
            Hp[last - width + j] += t * dense[i, j]
        Hp[last] += t * bias


@njit(cache=True, nogil=True)
def _direction(
    indptr: U64,
    cols: U32,
    vals: F32,
    dense: F32,
    bias: float,
    cost: F64,
    inside: U32,
    g: F64,
    s: F64,
    r: F64,
    p: F64,
    Hp: F64,
) -> None:
    """Solve ``H s = -g`` roughly: conjugate gradients from 0."""
    for j in range(g.size):
        s[j] = 0.0
        r[j] = p[j] = -g[j]
    rr, fall = _inner(r, r), 0.0
    for step in range(1, _CG + 1):
        _curve(indptr, cols, vals, dense, bias, cost, inside, p, Hp)
        a = rr / _inner(p, Hp)
        for j in range(g.size):
            s[j] += a * p[j]
            r[j] -= a * Hp[j]
        gain = 0.5 * a * rr  # by which the quadratic model falls
        fall += gain
        last, rr = rr, _inner(r, r)
        if step * gain <= _GAIN * fall or rr == 0.0:
            break
        for j in range(g.size):
            p[j] = r[j] + rr / last * p[j]


@njit(cache=True, nogil=True)
def _search(y: F64, cost: F64, order: U32, margins: F64, along: F64, us: float, ss: float) -> float:
    """The t of the lowest point ``u + t s``; 0 where none is lower than u.

    The derivative by t rises in straight pieces: Newton steps within a bracket.
    """
    t, low, high, first = 0.0, 0.0, np.inf, 0.0
    for trial in range(40):
        slope, bend = us + t * ss, ss
        for i in order:
            slack = 1.0 - y[i] * (margins[i] + t * along[i])
            if slack > 0.0:
                slope -= 2.0 * cost[i] * slack * y[i] * along[i]
                bend += 2.0 * cost[i] * along[i] * along[i]
        if trial == 0:
            first = slope
            if not first < 0.0:
                return 0.0
        if abs(slope) <= -1e-3 * first:
            break
        if slope < 0.0:
            low = t
        else:
            high = t
        t -= slope / bend
        if not low < t < high:
            t = 0.5 * (low + high)
    return t


@njit(cache=True, nogil=True)
def solve_primal(
    indptr: U64,
    cols: U32,
    vals: F32,
    dense: F32,
    bias: float,
    y: F64,
    cost: F64,
    order: U32,
    eps: float,
    max_iter: int,
    w: F64,
    wd: F64,
    room: F64,
) -> float:
    """Solve one node over the documents in ``order``; fills w and wd, gives the bias weight.

    Args:
        indptr: with ``cols`` and ``vals`` the sparse features ``[n, F]``.
        cols: see ``indptr``.
        vals: see ``indptr``.
        dense: ``[n, d]`` further features.
        bias: value of the bias feature; 0: none.
        y: ``[n]`` 1 or -1.
        cost: ``[n]`` above 0 for the documents in ``order``.
        order: ids of the documents to train on.
        eps: stop when the gradient is ``eps / 10 * rare / n`` times as long as at w = 0, where
            rare counts the documents of the rarer sign, or is 1: liblinear's rule, whose
            primal solvers have by default a tenth of the dual ones' tolerance.
        max_iter: most Newton steps; a handful do.
        w: ``[F]`` for the answer.
        wd: ``[d]`` likewise.
        room: ``[ROOMS, F + d + 1]`` scratch.

    Cost: a Newton step reads all documents once, those inside the margin once more, and twice
    for each of about four conjugate gradients.
    """
    n, features, size = indptr.size - 1, w.size, room.shape[1]
    u, g, s, r, p, Hp = room[0], room[1], room[2], room[3], room[4], room[5]
    margins, along, inside = np.zeros(n), np.empty(n), np.empty(n, np.uint32)
    u[:] = 0.0
    positives, limit = 0, 0.0
    for i in order:
        positives += y[i] > 0.0
    rare = max(min(positives, order.size - positives), 1)
    for step in range(max_iter):
        count = _gradient(indptr, cols, vals, dense, bias, y, cost, order, margins, inside, u, g)
        length = np.sqrt(_inner(g, g))
        if step == 0:
            limit = 0.1 * eps * rare / max(order.size, 1) * length
        if length <= limit:
            break
        _direction(indptr, cols, vals, dense, bias, cost, inside[:count], g, s, r, p, Hp)
        _products(indptr, cols, vals, dense, bias, order, s, along)
        t = _search(y, cost, order, margins, along, _inner(u, s), _inner(s, s))
        if t == 0.0:
            break
        for j in range(size):
            u[j] += t * s[j]
        for i in order:
            margins[i] += t * along[i]
    w[:] = u[:features]
    wd[:] = u[features : size - 1]
    return float(u[size - 1])
