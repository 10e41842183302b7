"""One-dimensional ``.npy`` files written piece by piece, and loaded without running code."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from xmcdist.data.errors import DataError
from xmcdist.sparse.store import StoreError, open_array

__all__ = ["ArrayWriter", "load_array"]


class ArrayWriter:
    """Append to a 1-d ``.npy`` of any final length; memory is what one `append` gets.

    numpy pads the header so that the length can be filled in at the end.
    """

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._start = self._write_header()

    def append(self, values: ArrayLike) -> None:
        """Add values at the end."""
        array = np.ascontiguousarray(values, dtype=self.dtype)
        self._file.write(array.data if array.size else b"")
        self.length += array.size

    def close(self) -> None:
        """Fill in the length; the file is whole only after this."""
        if not self._file.closed:
            self._file.seek(0)
            start = self._write_header()
            assert start == self._start, "the header grew over the data"
            self._file.close()

    def _write_header(self) -> int:
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        )
        return self._file.tell()

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def load_array(path: Path, dtype: str) -> NDArray[Any]:
    """Memory-map a 1-d ``.npy`` file.

    Raises:
        DataError: missing, cut off, of another dtype or number of dimensions, or pickled.
    """
    try:
        return open_array(path, dtype)
    except StoreError as error:
        raise DataError(f"{error}: delete {path.parent} to have it made again") from None
