"""Sparse matrices that people bring: scipy ``.npz`` files, read without trust."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from xmcdist.data.errors import DataError

__all__ = ["Given", "npz_shape", "read_labels", "read_matrix"]

_LARGEST = np.finfo(np.float32).max


@dataclass(frozen=True, slots=True)
class Given:
    """A matrix as read: canonical float32 CSR, and how many entries were given twice."""

    matrix: sp.csr_matrix
    duplicates: int


def read_matrix(path: Path, *, labels: bool = False) -> Given:
    """A matrix ``[N, columns]`` from any of scipy's ``.npz`` forms and any real dtype.

    Entries given twice are summed, as scipy does; stored zeros go.

    Args:
        labels: it says which labels a document has, so no weight may be negative.

    Raises:
        DataError: damaged, pickled, not two-dimensional, not real, or with NaN, inf or
            (labels) negative values; names the row.

    Cost: a few passes over the entries, all of which are held in memory.
    """
    A = _load(path)
    if A.ndim != 2:
        raise DataError(f"{path}: holds an array of shape {A.shape}, not a matrix: save [documents, columns]")
    if A.dtype.kind not in "biuf":
        raise DataError(f"{path}: values of type {A.dtype} are not real numbers: save them as float32")
    if A.format not in ("csr", "csc", "coo"):
        A = A.tocsr()
    _refuse(A, path, "is not a finite float32", _not_finite, "remove or replace it")
    if labels:
        _refuse(A, path, "is negative", lambda v: v < 0, "a label has a positive weight, usually 1")
    given = A.nnz
    csr = sp.csr_matrix(A.astype(np.float32))  # before entries are summed: int8 and bool sums would overflow
    csr.sum_duplicates()
    duplicates = given - csr.nnz
    _refuse(csr, path, "is not a finite float32", _not_finite, "remove or replace it")
    csr.eliminate_zeros()
    return Given(csr, duplicates)


def read_labels(path: Path) -> Given:
    """A label matrix ``[N, L]``: `read_matrix`, and no weight may be negative."""
    return read_matrix(path, labels=True)


def npz_shape(path: Path) -> tuple[int, int]:
    """Rows and columns, without reading the entries."""
    with _damage_is_clear(path), np.load(path, allow_pickle=False) as archive:
        rows, columns = (int(n) for n in archive["shape"])
        return rows, columns


def _load(path: Path) -> Any:
    with _damage_is_clear(path):
        A: Any = sp.load_npz(path)  # scipy passes allow_pickle=False
        if A.format in ("csr", "csc", "bsr"):
            A.check_format(full_check=True)  # indices out of range would crash compiled code
        return A


class _damage_is_clear:
    """Whatever a damaged archive makes numpy, scipy, zipfile or zlib raise, as one `DataError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            if "Object arrays" in str(error):
                raise DataError(
                    f"{self.path}: holds pickled Python objects, which are never loaded because that would run "
                    "their code: save it with scipy.sparse.save_npz"
                ) from None
            # numpy takes whatever is no archive for a pickle.
            what = "no archive" if "pickle" in str(error) else f"{type(error).__name__}: {error}"
            raise DataError(
                f"{self.path}: not a whole scipy sparse .npz file ({what}): "
                "copy it again, or save it with scipy.sparse.save_npz"
            ) from error


def _not_finite(values: np.ndarray[Any, Any]) -> Any:
    return ~(np.abs(values) <= _LARGEST)  # NaN compares false


def _refuse(A: Any, path: Path, what: str, bad: Any, remedy: str) -> None:
    if not bad(A.data).any():
        return
    entries = A.tocoo()
    at = int(np.flatnonzero(bad(entries.data))[0])
    raise DataError(
        f"{path}: row {entries.row[at]}, column {entries.col[at]}: value {entries.data[at]} {what}: {remedy}"
    )
