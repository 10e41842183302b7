"""One array or CSR matrix written by many ranks, each its own rows.

Every rank writes a part file; rank 0 strings them together, streaming.  Part files and
not one file written at offsets: on a network folder two nodes that write neighbouring
bytes of one page can lose each other's.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from xmcdist.checkpoint.atomic import no_space_is_clear
from xmcdist.parallel.collectives import broadcast_object, gather_objects
from xmcdist.parallel.errors import errors_together
from xmcdist.parallel.launch import World
from xmcdist.parallel.visible import wait_for

__all__ = ["write_csr", "write_rows"]

_CHUNK = 1 << 22  # elements copied at a time


def write_rows(path: Path, part: np.ndarray, world: World) -> None:
    """Write this rank's rows of an array ``[sum of n_r, ...]``; collective.  On return every node sees them.

    Args:
        path: the ``.npy`` file that shall hold all rows, in rank order.
        part: this rank's rows; other dimensions and dtype equal on every rank.

    Raises:
        UserError: on every rank: one has no space left, or does not see another's file.
    """
    mine = _part_path(path, world.rank)
    with errors_together(), no_space_is_clear(path):
        np.save(mine, np.ascontiguousarray(part))
    parts = gather_objects((part.shape[0], mine.stat().st_size))
    size = 0
    with errors_together(), no_space_is_clear(path):
        if world.is_main:
            for rank, (_, bytes_) in enumerate(parts):
                wait_for(_part_path(path, rank), size=bytes_)
            size = _join(path, (sum(n for n, _ in parts), *part.shape[1:]), part.dtype, world.world_size)
    _wait_until_seen(path, size, world)


def write_csr(folder: Path, part: sp.csr_matrix, world: World) -> None:
    """Write this rank's rows of a CSR matrix, in the layout `xmcdist.sparse.store` opens; collective.

    Args:
        folder: made when missing.
        part: this rank's rows ``[n_r, D]``, float32.

    Raises:
        UserError: as of `write_rows`.
    """
    with errors_together(), no_space_is_clear(folder):
        folder.mkdir(parents=True, exist_ok=True)
    counts = gather_objects((int(part.shape[0]), int(part.nnz)))
    before = sum(nnz for _, nnz in counts[: world.rank])
    first = 0 if world.is_main else 1  # row pointers of neighbouring parts share one entry
    write_rows(folder / "indptr.npy", part.indptr.astype(np.int64)[first:] + before, world)
    write_rows(folder / "indices.npy", part.indices.astype(np.int32, copy=False), world)
    write_rows(folder / "data.npy", part.data.astype(np.float32, copy=False), world)
    shape = json.dumps([sum(n for n, _ in counts), int(part.shape[1])])
    with errors_together(), no_space_is_clear(folder):
        if world.is_main:
            (folder / "shape.json").write_text(shape)
    _wait_until_seen(folder / "shape.json", len(shape), world)


def _wait_until_seen(path: Path, size: int, world: World) -> None:
    """Until every node sees a file that rank 0 wrote; collective."""
    size = broadcast_object(size)
    with errors_together():
        if world.local_rank == 0:
            wait_for(path, size=size)


def _part_path(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.part-{rank:05d}.npy")


def _join(path: Path, shape: tuple[int, ...], dtype: np.dtype, parts: int) -> int:
    """String the parts together; returns the bytes written."""
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as out:
        np.lib.format.write_array_header_1_0(
            out, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        )
        for rank in range(parts):
            part = np.load(_part_path(path, rank), mmap_mode="r", allow_pickle=False).reshape(-1)
            for start in range(0, part.size, _CHUNK):
                out.write(part[start : start + _CHUNK].tobytes())
        size = out.tell()
    beside.replace(path)
    for rank in range(parts):
        _part_path(path, rank).unlink()
    return size
