"""Sparse matrices in one form: float32 CSR, indices sorted, no duplicates, no stored zeros.

Everything behind the readers may rely on it; `as_csr` is the one gate.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

__all__ = ["as_csr", "binarize", "l1_rows", "l1_scales", "row_ids", "row_slice", "unit_rows", "without"]

_CHUNK = 1 << 22  # stored values looked at in one go: bounds temporary memory


def as_csr(A: Any, what: str) -> sp.csr_matrix:
    """Any sparse or dense matrix as canonical CSR; the input is left as it was.

    Args:
        A: ``[N, D]``, any scipy format or a 2-D array, any real dtype, indices in any
            order; duplicates are summed, stored zeros dropped.
        what: how messages call the matrix, best with its file.

    Returns:
        ``[N, D]`` float32.  Shares memory with A where A is in that form already.

    Raises:
        ValueError: not two-dimensional, not real numbers, or a value that is not finite
            as float32.
    """
    if not sp.issparse(A) and (not isinstance(A, np.ndarray) or A.ndim != 2):
        raise ValueError(f"{what} is no matrix but {type(A).__name__}; give a scipy sparse or 2-D numpy matrix")
    given: Any = A
    if given.ndim != 2:
        raise ValueError(f"{what} has {given.ndim} dimensions, not 2")
    if given.dtype.kind not in "buif":
        raise ValueError(f"{what} holds {given.dtype} values; give real numbers")
    if given.dtype.kind == "b":
        given = given.astype(np.float32)  # before anything is summed: True + True would stay True
    with np.errstate(over="ignore"):
        B = sp.csr_matrix(given, copy=False)
        if not B.has_canonical_format:
            B = B.copy()
            B.sum_duplicates()
        B = B.astype(np.float32, copy=False)
    return _finite_nonzero(B, what)


def _finite_nonzero(B: sp.csr_matrix, what: str) -> sp.csr_matrix:
    zeros = False
    for start in range(0, B.nnz, _CHUNK):
        part = B.data[start : start + _CHUNK]
        finite = np.isfinite(part)
        if not finite.all():
            at = start + int(np.argmin(finite))
            row = int(np.searchsorted(B.indptr, at, side="right")) - 1
            raise ValueError(f"{what}: row {row}, column {B.indices[at]} holds {B.data[at]}; give finite numbers")
        zeros = zeros or not part.all()
    if zeros:
        B = B.copy()
        B.eliminate_zeros()
    return B


def row_ids(A: sp.csr_matrix) -> np.ndarray:
    """Row of every stored value, int64 ``[nnz]``."""
    return np.repeat(np.arange(A.shape[0], dtype=np.int64), np.diff(A.indptr))


def row_slice(A: sp.csr_matrix, start: int, stop: int) -> sp.csr_matrix:
    """Rows ``[start, stop)`` as views of A's arrays: nothing is read or copied but row pointers."""
    if not 0 <= start <= stop <= A.shape[0]:
        raise ValueError(f"rows {start}..{stop} of a matrix with {A.shape[0]} rows")
    first, last = int(A.indptr[start]), int(A.indptr[stop])
    return _like(A, A.data[first:last], A.indices[first:last], A.indptr[start : stop + 1] - first)


def unit_rows(A: sp.csr_matrix) -> sp.csr_matrix:
    """Rows scaled to l2 length 1; an empty row stays empty.  Shares A's index arrays."""
    return _divide_rows(A, np.sqrt(_row_sums(A, power=2)))


def without(A: sp.csr_matrix, B: sp.csr_matrix) -> sp.csr_matrix:
    """A less its entries where B ``[N, D]``, of the same shape, stores one; stored zeros of A stay."""
    columns = np.int64(A.shape[1])
    mine = row_ids(A).astype(np.int64) * columns + A.indices
    stays = ~np.isin(mine, row_ids(B).astype(np.int64) * columns + B.indices)
    indptr = np.concatenate([[0], np.cumsum(stays)])[A.indptr]
    return sp.csr_matrix((A.data[stays], A.indices[stays], indptr), shape=A.shape)


def l1_rows(A: sp.csr_matrix) -> sp.csr_matrix:
    """Rows scaled so that absolute values sum to 1; an empty row stays empty.  Shares A's index arrays."""
    return _divide_rows(A, _row_sums(A, power=1))


def l1_scales(A: sp.csr_matrix) -> np.ndarray:
    """What `l1_rows` multiplies each row by, float64 ``[N]``; 0 for an empty row."""
    return _inverse(_row_sums(A, power=1))


def binarize(A: sp.csr_matrix) -> sp.csr_matrix:
    """Ones where A is not zero, float32 ``[N, D]``.  Shares A's index arrays where A stores no zero."""
    if A.nnz and not np.all(A.data):
        A = A.copy()
        A.eliminate_zeros()
    return _like(A, np.ones(A.nnz, dtype=np.float32), A.indices, A.indptr)


def _row_sums(A: sp.csr_matrix, power: int) -> np.ndarray:
    """Sum of ``|a| ** power`` by row in float64, in storage order, ``[N]``."""
    sums = np.zeros(A.shape[0])
    for start, stop in _row_blocks(A):
        first, last = int(A.indptr[start]), int(A.indptr[stop])
        part = A.data[first:last].astype(np.float64)
        rows = np.repeat(np.arange(stop - start), np.diff(A.indptr[start : stop + 1]))
        sums[start:stop] = np.bincount(rows, np.abs(part) if power == 1 else part * part, minlength=stop - start)
    return sums


def _divide_rows(A: sp.csr_matrix, by: np.ndarray) -> sp.csr_matrix:
    data = np.empty(A.nnz, dtype=np.float32)
    inverse = _inverse(by)
    for start, stop in _row_blocks(A):
        first, last = int(A.indptr[start]), int(A.indptr[stop])
        data[first:last] = A.data[first:last] * np.repeat(inverse[start:stop], np.diff(A.indptr[start : stop + 1]))
    return _like(A, data, A.indices, A.indptr)


def _inverse(by: np.ndarray) -> np.ndarray:
    inverse: np.ndarray = np.divide(1.0, by, out=np.zeros_like(by), where=by > 0)
    return inverse


def _row_blocks(A: sp.csr_matrix) -> list[tuple[int, int]]:
    """Row ranges of about `_CHUNK` stored values each, at least one row."""
    cuts = np.searchsorted(A.indptr, np.arange(_CHUNK, max(A.nnz, _CHUNK), _CHUNK))
    edges = np.unique(np.concatenate([[0], cuts, [A.shape[0]]])).astype(int).tolist()
    return list(pairwise(edges))


def _like(A: sp.csr_matrix, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray) -> sp.csr_matrix:
    """A matrix over the given arrays; set one by one because scipy's constructor copies small views."""
    shape: Any = (len(indptr) - 1, A.shape[1])  # scipy's stubs know no matrix from its shape
    out = sp.csr_matrix(shape, dtype=np.float32)
    out.data, out.indices = data, indices
    out.indptr = indptr.astype(indices.dtype, copy=False)  # scipy's routines want one index type
    if A.has_sorted_indices:
        out.has_sorted_indices = True
    return out
