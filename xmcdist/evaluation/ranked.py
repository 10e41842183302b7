"""Arithmetic on ranked predictions, all documents at once.

Shapes: n documents, k ranks, L labels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from xmcdist.sparse.csr import row_ids

__all__ = ["discounts", "inverse_propensity", "mark_hits", "oracle_weights", "positives"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def inverse_propensity(frequency: I64, num_train: int, a: float, b: float) -> F64:
    """``1 / p_l = 1 + C (n_l + B)^-A`` with ``C = (ln N - 1)(B + 1)^A``, ``[L]``.

    Args:
        frequency: training documents n_l of each label ``[L]``.
        num_train: training documents N.  C is 0 rather than negative for N below 3.
        a: constant A of the data set.
        b: constant B.

    Source: Jain et al., Extreme multi-label loss functions, KDD 2016.
    """
    c = max(np.log(num_train) - 1.0, 0.0) * (b + 1.0) ** a
    return np.asarray(1.0 + c * (frequency + b) ** -a, dtype=np.float64)


def discounts(k: int) -> F64:
    """``1 / log2(j + 1)`` for ranks j = 1 .. k."""
    return np.asarray(1.0 / np.log2(np.arange(2, k + 2)), dtype=np.float64)


def positives(Y: sp.csr_matrix) -> tuple[I64, I64]:
    """Document and label of every stored value that is not zero, each pair once, in order.

    Y is only read; it may be unsorted, hold duplicates, or be memory-mapped.
    """
    keys: I64 = row_ids(Y) * np.int64(Y.shape[1]) + Y.indices
    kept = np.asarray(Y.data) != 0
    if not kept.all():
        keys = keys[kept]
    if keys.size > 1 and not (np.diff(keys) > 0).all():
        keys = np.unique(keys)
    rows, columns = np.divmod(keys, np.int64(Y.shape[1]))
    return rows, columns


def mark_hits(labels: I64, rows: I64, columns: I64, num_labels: int) -> npt.NDArray[np.bool_]:
    """Which predictions are true, ``[n, k]``.

    Args:
        labels: predicted label ids ``[n, k]``, -1 in empty slots.
        rows: documents of the positives, as `positives` gives them.
        columns: their labels.
        num_labels: L.

    Cost: O(n k log P) for P positives.
    """
    if not rows.size:
        return np.zeros(labels.shape, dtype=np.bool_)
    truth = rows * num_labels + columns
    asked = np.arange(labels.shape[0])[:, None] * num_labels + labels
    at = np.minimum(np.searchsorted(truth, asked), truth.size - 1)
    return np.asarray((truth[at] == asked) & (labels >= 0))


def oracle_weights(rows: I64, weights: F64, n: int, k: int) -> F64:
    """Weights of every document's positives from the largest down, the first k, 0-padded ``[n, k]``."""
    order = np.lexsort((-weights, rows))
    starts = np.searchsorted(rows, np.arange(n))
    place = np.arange(rows.size) - starts[rows]  # rows is sorted, so rows[order] == rows
    kept = place < k
    out = np.zeros((n, k))
    out[rows[kept], place[kept]] = weights[order[kept]]
    return out
