"""Lines of plain and gzipped files, one at a time, with the line named when it is no UTF-8."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from xmcdist.data.errors import DataError

__all__ = ["byte_lines", "decode", "open_bytes"]

_BOM = b"\xef\xbb\xbf"


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open for reading, unpacking ``.gz`` as it is read; damage to the gzip is a `DataError`."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
            yield cast(BinaryIO, f)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off gzip file ({error}): copy or download it again") from error


def byte_lines(path: Path, *, keep_ends: bool = False) -> Iterator[tuple[int, bytes]]:
    r"""Numbered lines (from 1), parted at ``\n`` only: a document may hold ``\x0b`` or U+2028.

    A trailing ``\r`` belongs to a Windows line end and goes with it, as does a byte order
    mark at the start of the file.  A last line without line end is a line.
    """
    with open_bytes(path) as f:
        for number, raw in enumerate(f, 1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if not keep_ends:
                line = line.removesuffix(b"\n").removesuffix(b"\r")
            yield number, line


def decode(line: bytes, path: Path, number: int) -> str:
    """The line as text.

    Raises:
        DataError: it is no UTF-8; names file, line and the first bad byte.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: byte 0x{line[error.start]:02x} at position {error.start} of the line is not "
            "UTF-8: convert the file, for example with iconv -f latin1 -t utf-8"
        ) from None
