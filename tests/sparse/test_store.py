from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from xmcdist.sparse import store
from xmcdist.sparse.csr import as_csr, row_slice
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import CsrWriter, StoreError, open_csr, save_csr


def _random(rows: int = 20, cols: int = 7, seed: int = 0) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    return as_csr(rng.normal(size=(rows, cols)) * (rng.random((rows, cols)) < 0.4), "A")


def _mapped(array: np.ndarray) -> bool:
    base: object = array
    while base is not None:
        if isinstance(base, np.memmap):
            return True
        base = getattr(base, "base", None)
    return False


@pytest.mark.parametrize("chunk", [1 << 22, 5])
def test_round_trip_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(store, "_CHUNK", chunk)
    A = _random()
    save_csr(tmp_path / "A", A)
    B = open_csr(tmp_path / "A")
    np.testing.assert_array_equal(B.toarray(), A.toarray())
    assert _mapped(B.data)
    assert _mapped(B.indices)
    assert B.indices.dtype == np.int32
    assert not B.data.flags.writeable


def test_blocks_make_one_matrix(tmp_path: Path) -> None:
    A = _random()
    with CsrWriter(tmp_path, 7) as writer:
        for start, stop in ((0, 0), (0, 6), (6, 7), (7, 20)):
            writer.append(row_slice(A, start, stop))
    np.testing.assert_array_equal(open_csr(tmp_path).toarray(), A.toarray())
    assert np.load(tmp_path / "indptr.npy").dtype == np.int64
    assert json.loads((tmp_path / "shape.json").read_text()) == [20, 7]


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (5, 5)])
def test_empty_matrices(tmp_path: Path, shape: tuple[int, int]) -> None:
    save_csr(tmp_path, sp.csr_matrix(shape, dtype=np.float32))
    assert open_csr(tmp_path).shape == shape


def test_writing_over_a_matrix_that_is_open_leaves_it_alone(tmp_path: Path) -> None:
    A, B = _random(), _random(4, 7, seed=1)
    save_csr(tmp_path, A)
    before = open_csr(tmp_path)
    save_csr(tmp_path, B)
    np.testing.assert_array_equal(before.toarray(), A.toarray())
    np.testing.assert_array_equal(open_csr(tmp_path).toarray(), B.toarray())


def test_an_interrupted_write_is_not_a_matrix(tmp_path: Path) -> None:
    save_csr(tmp_path, _random())
    with contextlib.suppress(KeyboardInterrupt), CsrWriter(tmp_path, 7) as writer:
        writer.append(_random(3))
        raise KeyboardInterrupt
    with pytest.raises(StoreError, match=r"shape\.json is missing"):
        open_csr(tmp_path)


def test_a_block_of_another_width_is_refused(tmp_path: Path) -> None:
    with CsrWriter(tmp_path, 7) as writer, pytest.raises(ValueError, match="a block of 6 columns for a matrix of 7"):
        writer.append(_random(3, 6))


@pytest.mark.parametrize("name", ["indptr.npy", "indices.npy", "data.npy", "shape.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "short"])
def test_damage_names_the_file(tmp_path: Path, name: str, damage: str) -> None:
    save_csr(tmp_path, _random())
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "garbage":
        path.write_bytes(b"\x80\x04]q." * 20)
    elif name == "shape.json":
        path.write_text("[20]")
    else:
        np.save(path, np.load(path)[:-1])
    with pytest.raises(StoreError, match=name.replace(".", r"\.")):
        open_csr(tmp_path)


def test_row_pointers_must_rise(tmp_path: Path) -> None:
    save_csr(tmp_path, _random())
    indptr = np.load(tmp_path / "indptr.npy")
    indptr[3] = indptr[-1] + 1
    np.save(tmp_path / "indptr.npy", indptr)
    with pytest.raises(StoreError, match=r"indptr\.npy is damaged: row pointers"):
        open_csr(tmp_path)


def test_an_array_of_objects_is_not_loaded(tmp_path: Path) -> None:
    save_csr(tmp_path, _random())
    np.save(tmp_path / "data.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(StoreError, match=r"data\.npy"):
        open_csr(tmp_path)


def test_features_rows_and_take() -> None:
    X, E = _random(), np.arange(40, dtype=np.float32).reshape(20, 2)
    both = Features(X, E)
    assert (both.num_rows, both.num_sparse, both.num_dense) == (20, 7, 2)
    assert (Features(X).num_dense, Features(dense=E).num_sparse, Features(dense=E).num_rows) == (0, 0, 20)
    ids = np.array([3, 1, 3])
    for part, want in ((both.rows(2, 5), slice(2, 5)), (both.take(ids), ids)):
        assert part.sparse is not None
        assert part.dense is not None
        np.testing.assert_array_equal(part.sparse.toarray(), X.toarray()[want])
        np.testing.assert_array_equal(part.dense, E[want])


def test_features_that_do_not_fit_are_refused() -> None:
    X, E = _random(), np.zeros((20, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="a sparse or a dense part"):
        Features()
    with pytest.raises(ValueError, match="20 rows of sparse and 19 of dense"):
        Features(X, E[:19])
    with pytest.raises(ValueError, match="float64"):
        Features(dense=E.astype(np.float64))
    with pytest.raises(ValueError, match="float64"):
        Features(X.astype(np.float64))
