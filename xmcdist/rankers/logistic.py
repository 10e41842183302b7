"""Compiled solver of one node: L2-regularised logistic regression by dual coordinate descent.

    min_w  1/2 ||w||^2 + sum over i of c_i log(1 + exp(-y_i (w . x_i + b * bias)))

and its dual over 0 < alpha_i < c_i, where w is the sum of ``alpha_i y_i x_i``:

    min_a  1/2 ||w||^2 + sum over i of alpha_i log alpha_i + (c_i - alpha_i) log(c_i - alpha_i)

One variable at a time has no closed form: its derivative vanishes where
``log(alpha / (c - alpha)) = -y (w . x)``, and is found by Newton steps.

Source: Yu, Huang, Lin, "Dual coordinate descent methods for logistic regression and maximum
entropy models", Machine Learning 85 (2011), algorithm 5: of the two variables alpha and
c - alpha the one is solved for whose root lies in the lower half, where the derivative is
concave, so that Newton steps from below rise to the root and never pass it.  Here a document
begins at alpha = 0, which spares the pass that makes w from small beginnings, and its first
step begins at a bound below the root.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit
from xmcdist.rankers.kernels import dot, shuffle

__all__ = ["descend_logistic"]

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_NEWTON = 50  # most steps for one variable; a few do
_LEAST = 1e-30  # share of c below which a variable counts as 0: a log odds of 69


@njit(cache=True, nogil=True)
def _root(a: float, b: float, c: float, old: float, value: float, tolerance: float) -> float:
    """The z in (0, c/2] where ``f(z) = a (z - old) + b + log(z / (c - z)) = 0``; the caller knows that it is there.

    ``value`` is f(old); infinite where old is 0 or c.
    """
    least, half = _LEAST * c, 0.5 * c
    z = old
    if not least < z <= half:  # a z <= a * high, so that the root is not below this
        shift = b - a * old
        high = min(c / (1.0 + math.exp(min(shift, 700.0))), half)
        z = min(max(c / (1.0 + math.exp(min(shift + a * high, 700.0))), least), half)
        value = a * (z - old) + b + math.log(z / (c - z))
    for _ in range(_NEWTON):
        if abs(value) <= tolerance:
            break
        room = z * (c - z)
        to = max(z - value * room / (a * room + c), 0.1 * z)  # from above the root a step may lead below 0
        if to <= least:
            return least
        if to == z:
            break
        z = min(to, half)
        value = a * (z - old) + b + math.log(z / (c - z))
    return z


@njit(cache=True, nogil=True)
def descend_logistic(
    indptr: U64,
    cols: U32,
    vals: F32,
    dense: F32,
    norms: F64,
    bias: float,
    y: F64,
    cost: F64,
    order: U32,
    eps: float,
    max_iter: int,
    state: np.uint64,
    w: F64,
    wd: F64,
    alpha: F64,
) -> float:
    """Solve one node over the documents in ``order``; fills w and wd, gives the bias weight.

    Args:
        indptr: with ``cols`` and ``vals`` the sparse features ``[n, F]``.
        cols: see ``indptr``.
        vals: see ``indptr``.
        dense: ``[n, d]`` further features.
        norms: ``[n]`` squared length of every document, its bias feature included.
        bias: value of the bias feature; 0: none.
        y: ``[n]`` 1 or -1.
        cost: ``[n]`` above 0 for the documents in ``order``.
        order: ids of the documents to train on; left shuffled.
        eps: stop when, in a whole pass, no document's log odds were further than this from
            what its alpha stands for.
        max_iter: most passes.
        state: of the shuffles.
        w: ``[F]`` zeros, or the sum that ``alpha`` stands for.
        wd: ``[d]`` likewise.
        alpha: ``[n]`` zeros; afterwards every alpha_i, or alpha_i - c_i where that is nearer to 0:
            both ends need their full precision.

    Cost: a pass reads every document once, and again to add it where its alpha has moved.
    """
    wb, width = 0.0, dense.shape[1]
    tolerance = 0.5 * eps  # below it a document is left as it is; a tenth of eps takes 1.3 to 2 times as long
    for _ in range(max_iter):
        worst = 0.0
        state = shuffle(order, order.size, state)
        for i in order:
            begin, end = indptr[i], indptr[i + np.uint32(1)]
            margin = wb * bias
            for k in range(begin, end):  # vector units gather more slowly: not SUMS
                margin += w[cols[k]] * vals[k]
            if width:
                margin += dot(wd, dense[i])
            a, c, b, kept = norms[i], cost[i], y[i] * margin, alpha[i]
            below = kept >= 0.0
            low, high = (kept, c - kept) if below else (c + kept, -kept)  # alpha and c - alpha
            sign = 1.0 if 0.5 * a * (high - low) + b >= 0.0 else -1.0
            old, other = (low, high) if sign > 0.0 else (high, low)
            gap = sign * b + math.log(old / other) if old > 0.0 and other > 0.0 else np.inf
            if gap > 0.0 and 0.0 < old <= _LEAST * c:
                continue  # as good as 0, where it would go
            worst = max(worst, abs(gap))
            if abs(gap) <= tolerance:
                continue
            z = _root(a, sign * b, c, old, gap, tolerance)
            alpha[i] = z * sign
            step = sign * (z - old) * y[i]
            for k in range(begin, end):
                w[cols[k]] += step * vals[k]
            for j in range(width):
                wd[j] += step * dense[i, j]
            wb += step * bias
        if worst <= eps:
            break
    return wb
