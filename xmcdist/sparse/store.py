"""CSR matrices on disk: a folder of plain arrays that is written streaming and opened memory-mapped.

``indptr.npy`` int64 ``[N + 1]``, ``indices.npy`` int32 ``[nnz]``, ``data.npy`` float32
``[nnz]`` and, written last, ``shape.json`` ``[N, D]``: a folder without it is unfinished.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import scipy.sparse as sp

from xmcdist.config.errors import UserError

__all__ = ["CsrWriter", "StoreError", "open_array", "open_csr", "save_csr"]

_CHUNK = 1 << 22  # stored values written in one go


class StoreError(UserError):
    """A stored matrix is missing or damaged; the message names the file."""


class CsrWriter:
    """Write a CSR matrix by blocks of rows; memory is bounded by the block.

    A context manager: left by an exception it leaves the folder unfinished, and `open_csr`
    says so.

    Args:
        folder: made when missing; an older matrix in it is replaced.
        num_cols: D of every block.
    """

    def __init__(self, folder: Path | str, num_cols: int) -> None:
        self.folder = Path(folder)
        self.num_cols = int(num_cols)
        self.num_rows = 0
        self.nnz = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "shape.json").unlink(missing_ok=True)
        self._indptr = _Column(self.folder / "indptr.npy", "<i8")
        self._indices = _Column(self.folder / "indices.npy", "<i4")
        self._data = _Column(self.folder / "data.npy", "<f4")
        self._indptr.write(np.zeros(1))

    def append(self, rows: sp.csr_matrix) -> None:
        """Add rows ``[n, D]`` below those written so far.

        Raises:
            ValueError: the block has another number of columns.
        """
        if rows.shape[1] != self.num_cols:
            raise ValueError(f"{self.folder}: a block of {rows.shape[1]} columns for a matrix of {self.num_cols}")
        first = int(rows.indptr[0])
        for start in range(0, rows.nnz, _CHUNK):
            stop = min(start + _CHUNK, rows.nnz)
            self._indices.write(rows.indices[first + start : first + stop])
            self._data.write(rows.data[first + start : first + stop])
        self._indptr.write(rows.indptr[1:].astype(np.int64) - first + self.nnz)
        self.num_rows += rows.shape[0]
        self.nnz += rows.nnz

    def close(self) -> None:
        """Write the final lengths; from here on the folder can be opened."""
        for column in (self._indptr, self._indices, self._data):
            column.close()
        (self.folder / "shape.json").write_text(json.dumps([self.num_rows, self.num_cols]))

    def __enter__(self) -> CsrWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            for column in (self._indptr, self._indices, self._data):
                column.abandon()


class _Column:
    """One growing 1-D ``.npy``: the header keeps room for its length, which is set at the end."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._length = 0
        path.unlink(missing_ok=True)  # someone may have the older file mapped: write a new one, not into it
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 -- closed by close() and abandon()
        self._header()
        self._start = self._file.tell()

    def write(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).view(np.uint8).data)
        self._length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        assert self._file.tell() == self._start, "numpy no longer leaves room in the header"
        self._file.close()

    def abandon(self) -> None:
        self._file.close()

    def _header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def save_csr(folder: Path | str, A: sp.csr_matrix) -> None:
    """Write A ``[N, D]`` so that `open_csr` finds it; streams, so A may be memory-mapped itself."""
    with CsrWriter(folder, A.shape[1]) as writer:
        writer.append(A)


def open_csr(folder: Path | str) -> sp.csr_matrix:
    """A stored matrix ``[N, D]`` float32, its values left on disk and mapped read-only.

    Cost: reads the row pointers.  Below 2**31 stored values nothing else is read or copied;
    beyond, scipy needs wider column indices and copies them.

    Raises:
        StoreError: a file is missing, truncated, of the wrong type, or its length does not
            fit the others.
    """
    folder = Path(folder)
    num_rows, num_cols = _read_shape(folder)
    indptr = open_array(folder / "indptr.npy", "int64")
    indices = open_array(folder / "indices.npy", "int32")
    data = open_array(folder / "data.npy", "float32")
    if len(indptr) != num_rows + 1:
        raise StoreError(f"{folder / 'indptr.npy'} is damaged: {len(indptr)} row pointers for {num_rows} rows")
    indptr = np.array(indptr)
    if indptr[0] != 0 or np.any(np.diff(indptr) < 0):
        raise StoreError(f"{folder / 'indptr.npy'} is damaged: row pointers do not rise from 0")
    for name, values in (("indices.npy", indices), ("data.npy", data)):
        if len(values) != indptr[-1]:
            raise StoreError(f"{folder / name} is damaged: {len(values)} values where indptr.npy counts {indptr[-1]}")
    return sp.csr_matrix((data, indices, indptr), shape=(num_rows, num_cols), copy=False)


def open_array(path: Path, dtype: str, ndim: int = 1) -> np.ndarray:
    """One ``.npy`` file mapped read-only, its dtype and number of dimensions checked.

    Raises:
        StoreError: the file is missing, truncated or of another kind.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except (ValueError, OSError, EOFError) as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype != np.dtype(dtype) or array.ndim != ndim:
        found = f"{array.ndim}-D {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise StoreError(f"{path} is damaged: {found} where {ndim}-D {dtype} belongs")
    return array


def _read_shape(folder: Path) -> tuple[int, int]:
    path = folder / "shape.json"
    try:
        shape = json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path} is missing: {folder} holds no finished matrix") from None
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n >= 0 for n in shape)):
        raise StoreError(f"{path} is damaged: {shape!r} is no pair of sizes")
    return shape[0], shape[1]
