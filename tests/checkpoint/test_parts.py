from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp

from tests.helpers.ranks import on_ranks
from xmcdist.checkpoint.parts import write_csr, write_rows
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range
from xmcdist.sparse.store import open_csr


def _world(rank: int, world_size: int) -> World:
    return World(rank, world_size, rank, world_size, "cpu")


@on_ranks(1, 2, 3)
def test_rows_of_all_ranks_read_as_one(rank: int, world_size: int, tmp_path: Path) -> None:
    whole = np.arange(7 * 3, dtype=np.float32).reshape(7, 3)
    start, stop = row_range(7, rank, world_size)
    write_rows(tmp_path / "a.npy", whole[start:stop], _world(rank, world_size))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), whole)
    assert [p.name for p in tmp_path.glob("a*")] == ["a.npy"]


@on_ranks(1, 2, 3)
def test_a_csr_of_all_ranks_reads_as_one_also_with_empty_parts(rank: int, world_size: int, tmp_path: Path) -> None:
    whole = sp.csr_matrix(np.array([[0, 1, 0], [2, 0, 3]], dtype=np.float32))
    start, stop = row_range(2, rank, world_size)  # the first of three ranks has no row
    write_csr(tmp_path / "A", whole[start:stop], _world(rank, world_size))
    assert (open_csr(tmp_path / "A") != whole).nnz == 0
