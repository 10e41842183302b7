"""Texts on disk: their UTF-8 bytes one after the other, and where each begins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from xmcdist.data.arrays import ArrayWriter, load_array
from xmcdist.data.errors import DataError

__all__ = ["TextStore", "TextWriter"]

_FLUSH = 4096  # offsets held before they are written
_READ_DOCS = 1024  # texts read at once by iterate


class TextWriter:
    """Write ``name.bin`` and ``name.offsets.npy``; memory does not grow with the texts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.count = 0
        self.empty = 0  # texts of white space only
        self._bytes = open(folder / f"{name}.bin", "wb")  # noqa: SIM115 - closed by close()
        self._offsets = ArrayWriter(folder / f"{name}.offsets.npy", np.int64)
        self._pending = [0]
        self._end = 0

    def append(self, text: str) -> None:
        """Add one text.

        Raises:
            UnicodeEncodeError: it holds half a surrogate pair, which UTF-8 cannot say.
        """
        raw = text.encode("utf-8")
        self._bytes.write(raw)
        self._end += len(raw)
        self._pending.append(self._end)
        self.count += 1
        self.empty += not text or text.isspace()
        if len(self._pending) >= _FLUSH:
            self._flush()

    def close(self) -> None:
        """Finish both files."""
        self._flush()
        self._offsets.close()
        self._bytes.close()

    def _flush(self) -> None:
        self._offsets.append(self._pending)
        self._pending.clear()

    def __enter__(self) -> TextWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._bytes.close()


class TextStore:
    """The texts of one split, or of the labels, memory-mapped: any one in O(its length).

    Pickling passes the place, not the bytes, so worker processes may be given a store.

    Raises:
        DataError: a file is missing or cut off.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._place = (folder, name)
        self._path = folder / f"{name}.bin"
        self._offsets = load_array(folder / f"{name}.offsets.npy", "int64")
        size = self._path.stat().st_size if self._path.exists() else -1
        if not len(self._offsets) or size != int(self._offsets[-1]):
            raise DataError(f"{self._path}: {size} bytes do not fit its offsets: delete {folder} to have it made again")
        # An empty file cannot be mapped.
        self._bytes = np.memmap(self._path, np.uint8, "r") if size else np.zeros(0, np.uint8)

    @classmethod
    def open(cls, folder: Path | str, name: str) -> TextStore:
        """The texts ``name.bin`` and ``name.offsets.npy`` of a folder."""
        return cls(Path(folder), name)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(f"text {i} of {len(self)}")
        i %= len(self)
        return self._bytes[self._offsets[i] : self._offsets[i + 1]].tobytes().decode("utf-8")

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """Texts ``start`` to ``stop`` in order; reads the file, so resident memory does not grow as by mapping."""
        stop = len(self) if stop is None else min(stop, len(self))
        with open(self._path, "rb") as f:
            for low in range(start, stop, _READ_DOCS):
                ends = self._offsets[low : min(low + _READ_DOCS, stop) + 1].tolist()
                f.seek(ends[0])
                for begin, end in pairwise(ends):
                    yield f.read(end - begin).decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        return self.iterate()

    def __reduce__(self) -> tuple[Any, ...]:
        return (TextStore, self._place)
