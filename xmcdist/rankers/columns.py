"""The columns of a level's matrices that one rank needs, out of matrices that may be memory-mapped."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.rankers import kernels

__all__ = ["Columns", "frozen", "member_columns", "positive_columns"]


class Columns(NamedTuple):
    """Some columns of a matrix, one after the other."""

    ptr: NDArray[np.int64]  # [columns + 1]
    rows: NDArray[np.uint32]  # ascending in a column
    values: NDArray[np.float32]

    @classmethod
    def of(cls, A: sp.csr_matrix, start: int, stop: int) -> Columns:
        """Columns ``[start, stop)`` of A ``[N, any]``; takes the memory of these columns only."""
        indices = A.indices if A.indices.dtype in (np.int32, np.int64) else A.indices.astype(np.int64)
        data = A.data.astype(np.float32, copy=False)
        return cls(*kernels.select_columns(A.indptr.astype(np.int64), frozen(indices), frozen(data), start, stop))

    def where(self, kept: NDArray[np.bool_]) -> Columns:
        """The entries that are kept."""
        if kept.all():
            return self
        return Columns(np.concatenate([[0], np.cumsum(kept)])[self.ptr], self.rows[kept], self.values[kept])

    def column(self, j: int) -> slice:
        """Where column j is."""
        return slice(self.ptr[j], self.ptr[j + 1])


def member_columns(M: sp.csr_matrix, clusters: tuple[int, int], *, weighted: bool) -> Columns:
    """Documents of each cluster of a range, with their weights as negatives.

    Args:
        M: ``[N, K]``.
        weighted: by M's values, a value of 0 leaving the document out; else all stored weigh 1.

    Raises:
        ValueError: a negative weight.
    """
    members = Columns.of(M, *clusters)
    if not weighted:
        return members._replace(values=np.ones(members.rows.size, np.float32))
    if members.values.size and not members.values.min() >= 0:
        raise ValueError(f"M: weights of negatives must be 0 or more, not {members.values.min()}")
    return members.where(members.values > 0)


def positive_columns(
    Y_t: sp.csr_matrix, relevance: sp.csr_matrix | NDArray[np.float64] | None, nodes: tuple[int, int]
) -> Columns:
    """Positives of the nodes of a range, with the relevance of each, 1 when none is given.

    Args:
        Y_t: ``[N, K_t]``; entries above 0 are positives.
        relevance: ``[N, K_t]``; or ``[N]``, by which the values of each row of Y_t are multiplied.

    Raises:
        ValueError: relevance of another shape, or a positive without.
    """
    Y = Columns.of(Y_t, *nodes)
    Y = Y.where(Y.values > 0)
    if relevance is None:
        return Y._replace(values=np.ones(Y.rows.size, np.float32))
    if isinstance(relevance, np.ndarray):
        if relevance.shape != (Y_t.shape[0],):
            raise ValueError(f"relevance is {relevance.shape}, must be ({Y_t.shape[0]},): one factor a document")
        found = (Y.values * relevance[Y.rows]).astype(np.float32)
        there = found.size == Y.rows.size
    else:
        if relevance.shape != Y_t.shape:
            raise ValueError(f"relevance is {relevance.shape}, must be {Y_t.shape} like Y_t")
        R = Columns.of(relevance, *nodes)
        both = np.isin(_keys(R), _keys(Y))
        found, there = R.values[both], np.count_nonzero(both) == Y.rows.size
    if not there or (found.size and found.min() <= 0):
        raise ValueError("relevance: every positive of Y_t needs a value above 0; lift Y and relevance the same way")
    return Y._replace(values=found)


def frozen(a: NDArray[Any]) -> NDArray[Any]:
    """A read-only view: arrays from memory and from files then compile to one kernel."""
    out = np.ascontiguousarray(a).view(np.ndarray)
    out.flags.writeable = False
    return out


def _keys(A: Columns) -> NDArray[np.int64]:
    """One number for every place of a matrix, ascending."""
    column = np.repeat(np.arange(A.ptr.size - 1, dtype=np.int64), np.diff(A.ptr))
    return (column << 32) | A.rows.astype(np.int64)
