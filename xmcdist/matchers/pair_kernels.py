"""Compiled CPU loops over scored (document, row) pairs.

Letters: b documents, n rows, d width, p pairs.  Each answer is added up in storage order
of the pairs, so it does not depend on threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit

__all__ = ["dot_pairs", "spread_to_docs", "spread_to_rows", "top_of_rows"]

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
Real = NDArray[Any]  # float32 or float64

# A dot product's sum may be reordered (so it uses vector units); NaN and infinity keep their meaning.
_SUMS = {"reassoc", "contract", "nsz"}


@njit(cache=True, nogil=True, fastmath=_SUMS)
def dot_pairs(E: Real, W: Real, doc: I64, row: I64, out: Real) -> None:
    """``out[k] = E[doc[k]] . W[row[k]]``."""
    for k in range(doc.size):
        e, w = E[doc[k]], W[row[k]]
        total = e[0] * w[0]
        for j in range(1, e.size):
            total += e[j] * w[j]
        out[k] = total


@njit(cache=True, nogil=True)
def spread_to_docs(grad: Real, W: Real, doc: I64, row: I64, out: Real) -> None:
    """``out[doc[k]] += grad[k] * W[row[k]]``, ``[b, d]``."""
    for k in range(doc.size):
        g = grad[k]
        if g != 0:  # a hinge that holds its margin: most pairs, late in training
            w, o = W[row[k]], out[doc[k]]
            for j in range(w.size):
                o[j] += g * w[j]


@njit(cache=True, nogil=True)
def spread_to_rows(grad: Real, E: Real, doc: I64, row: I64, out: Real) -> None:
    """``out[row[k]] += grad[k] * E[doc[k]]``, ``[n, d]``."""
    for k in range(doc.size):
        g = grad[k]
        if g != 0:
            e, o = E[doc[k]], out[row[k]]
            for j in range(e.size):
                o[j] += g * e[j]


@njit(cache=True, nogil=True)
def top_of_rows(doc_ptr: I64, node: I64, score: F32, out_score: F32, out_node: I64) -> None:
    """Best entries of each ragged row, best first, ties to the smaller node.

    Args:
        doc_ptr: ``[b + 1]``.
        node: ``[p]``, ascending in a row.
        score: ``[p]``.
        out_score: ``[b, k]``, filled with -inf.
        out_node: ``[b, k]``, filled with -1.
    """
    k = out_score.shape[1]
    for i in range(doc_ptr.size - 1):
        have = 0
        for at in range(doc_ptr[i], doc_ptr[i + 1]):
            s = score[at]
            if have == k and not s > out_score[i, k - 1]:
                continue
            place = have if have < k else k - 1
            while place > 0 and s > out_score[i, place - 1]:
                out_score[i, place], out_node[i, place] = out_score[i, place - 1], out_node[i, place - 1]
                place -= 1
            out_score[i, place], out_node[i, place] = s, node[at]
            have = min(have + 1, k)
