"""Named arrays in one file: opened memory-mapped in microseconds, checked against checksums when asked.

The layout is that of safetensors (8 bytes length, a JSON header, the arrays), so other
programs can read it.  In the header's ``__metadata__`` are ``scalars``, whole numbers of the
writer, and the CRC-32 of every array.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_arrays", "write_arrays"]

_NAMES = {"float32": "F32", "float16": "F16", "int64": "I64", "uint32": "U32", "uint16": "U16", "uint8": "U8"}
_DTYPES = {name: np.dtype(dtype).newbyteorder("<") for dtype, name in _NAMES.items()}
_PIECE = 1 << 24  # bytes summed or written in one go
_AGAIN = "copy it again, or train this level again"


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]], scalars: dict[str, int]) -> None:
    """Write 1-d arrays and whole numbers; the file appears whole or not at all.

    Args:
        arrays: float32, float16, int64, uint32, uint16 or uint8.  The wider types come first
            in the file, so that every array is aligned.
    """
    ordered = dict(sorted(arrays.items(), key=lambda a: -a[1].dtype.itemsize))
    sums = {name: _crc32(array) for name, array in ordered.items()}
    header: dict[str, Any] = {"__metadata__": {"scalars": json.dumps(scalars), "crc32": json.dumps(sums)}}
    place = 0
    for name, array in ordered.items():
        offsets = [place, place + array.nbytes]
        header[name] = {"dtype": _NAMES[array.dtype.name], "shape": [int(array.size)], "data_offsets": offsets}
        place += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in ordered.values():
            for piece in _pieces(array):
                file.write(piece)
    os.replace(beside, path)


def read_arrays(
    path: Path, names: tuple[str, ...], *, verify: bool = False
) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    """The arrays as read-only views of the mapped file, and the numbers.

    Args:
        names: arrays that must be there.
        verify: read everything and compare with the checksums.

    Raises:
        ValueError: the file is missing or damaged; the message names it.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be opened ({error}); {_AGAIN}") from error
    try:
        length = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + length])
        about = header["__metadata__"]
        scalars = {str(k): int(v) for k, v in json.loads(about["scalars"]).items()}
        sums = json.loads(about["crc32"])
        end = 8 + length + max(header[name]["data_offsets"][1] for name in names)
        if end != len(mapped):
            raise ValueError(f"{len(mapped)} bytes, must be {end}")
        arrays = {}
        for name in names:
            dtype, (size,), (start, stop) = (header[name][k] for k in ("dtype", "shape", "data_offsets"))
            if stop - start != size * _DTYPES[dtype].itemsize:
                raise ValueError(f"{name}: {stop - start} bytes for {size} values")
            arrays[name] = np.frombuffer(mapped, _DTYPES[dtype], size, 8 + length + start)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: damaged ({error}); {_AGAIN}") from error
    for name in names if verify else ():
        if _crc32(arrays[name]) != sums.get(name):
            raise ValueError(f"{path}: damaged ({name} is not what was written); {_AGAIN}")
    return arrays, scalars


def _crc32(array: NDArray[Any]) -> int:
    """CRC-32 of an array's bytes."""
    crc = 0
    for piece in _pieces(array):
        crc = zlib.crc32(piece, crc)
    return crc


def _pieces(array: NDArray[Any]) -> list[memoryview]:
    flat = np.ascontiguousarray(array).view(np.uint8)
    return [flat[a : a + _PIECE].data for a in range(0, flat.size, _PIECE)]
