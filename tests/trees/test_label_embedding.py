from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp

from xmcdist.sparse.csr import as_csr
from xmcdist.sparse.features import Features
from xmcdist.trees import label_embedding as module
from xmcdist.trees.label_embedding import label_embedding, pifa


def _data(seed: int = 0) -> tuple[sp.csr_matrix, np.ndarray, sp.csr_matrix]:
    """40 documents, 12 + 5 features, 9 labels; label 3 has no document, documents 7 and 8 no label."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(40, 12)) * (rng.random((40, 12)) < 0.3)
    E = rng.normal(size=(40, 5)).astype(np.float32)
    Y = rng.random((40, 9)) < 0.3
    Y[:, 3] = Y[7:9] = False
    return as_csr(X, "X"), E, as_csr(Y, "Y")


def _dense_pifa(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    Z = np.zeros((Y.shape[1], X.shape[1]))
    for i, label in zip(*np.nonzero(Y), strict=True):
        Z[label] += Y[i, label] / np.sqrt((Y[i] ** 2).sum()) * X[i]
    norm = np.sqrt((Z**2).sum(axis=1, keepdims=True))
    return np.where(norm > 0, Z / np.where(norm > 0, norm, 1), 0)


def test_pifa_by_hand() -> None:
    """Instance 0 has one label, instance 1 has two, so it weighs 1/sqrt(2) in each."""
    X = sp.csr_matrix(np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32))
    Y = sp.csr_matrix(np.array([[1, 0, 0], [1, 1, 0]], dtype=np.float32))
    w = 1 / np.sqrt(2)
    want = np.array([[1, w] / np.hypot(1, w), [0, 1], [0, 0]])
    np.testing.assert_allclose(pifa(X, Y).toarray(), want, rtol=1e-6)


def test_pifa_against_dense_loops() -> None:
    X, _, Y = _data()
    got = pifa(X, Y)
    np.testing.assert_allclose(got.toarray(), _dense_pifa(X.toarray(), Y.toarray()), atol=1e-6)
    assert got.has_canonical_format
    assert got.dtype == np.float32
    assert got[3].nnz == 0


@pytest.mark.parametrize("width", [63, 64, 65, 4096, 20_000])
def test_columns_come_out_sorted_however_many_there_are(width: int) -> None:
    rng = np.random.default_rng(width)
    X = sp.random_array((60, width), density=min(1.0, 40 / width), rng=rng, format="csr", dtype=np.float32)
    X = sp.csr_matrix(sp.vstack([X, sp.csr_matrix(([1.0, 1.0], ([0, 0], [0, width - 1])), shape=(1, width))]))
    Y = sp.csr_matrix(rng.random((61, 7)) < 0.4, dtype=np.float32)
    got = pifa(as_csr(X, "X"), Y)
    np.testing.assert_allclose(got.toarray(), _dense_pifa(X.toarray(), Y.toarray()), atol=1e-6)
    got.has_canonical_format = False
    assert all(np.all(np.diff(got.indices[a:b]) > 0) for a, b in pairwise(got.indptr))


def test_label_weights_count() -> None:
    X, _, Y = _data()
    Y.data[:] = np.random.default_rng(1).integers(1, 4, Y.nnz)
    np.testing.assert_allclose(pifa(X, Y).toarray(), _dense_pifa(X.toarray(), Y.toarray()), atol=1e-6)


@pytest.mark.parametrize("parts", ["both", "dense"])
def test_sparse_and_dense_parts_share_one_length(parts: str) -> None:
    X, E, Y = _data()
    features = Features(X if parts == "both" else None, E)
    got = label_embedding(features, Y)
    assert got.dense is not None
    want = _dense_pifa(np.hstack([X.toarray(), E]) if parts == "both" else E, Y.toarray())
    np.testing.assert_allclose(got.dense, want[:, -5:], atol=1e-6)
    if got.sparse is not None:
        np.testing.assert_allclose(got.sparse.toarray(), want[:, :12], atol=1e-6)
    assert (got.sparse is None) == (parts == "dense")


@pytest.mark.parametrize("work", [1 << 20, 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_range_is_bit_identical_to_the_whole(monkeypatch: pytest.MonkeyPatch, threads: int, work: int) -> None:
    X, E, Y = _data()
    whole = label_embedding(Features(X, E), Y)
    assert whole.sparse is not None
    assert whole.dense is not None
    monkeypatch.setattr(module, "_WORK", work)
    for start, stop in ((0, 9), (0, 4), (2, 3), (4, 9), (5, 5)):
        part = label_embedding(Features(X, E), Y, start, stop, threads=threads)
        assert part.sparse is not None
        assert part.dense is not None
        want = whole.sparse[start:stop]
        np.testing.assert_array_equal(part.sparse.indptr, want.indptr)
        np.testing.assert_array_equal(part.sparse.indices, want.indices)
        np.testing.assert_array_equal(part.sparse.data, want.data)
        np.testing.assert_array_equal(part.dense, whole.dense[start:stop])
    np.testing.assert_array_equal(pifa(X, Y, range(2, 5)).toarray(), pifa(X, Y).toarray()[2:5])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="features of 2 documents for labels of 3"):
        pifa(as_csr(np.zeros((2, 4)), "X"), as_csr(np.zeros((3, 5)), "Y"))
    X, _, Y = _data()
    with pytest.raises(ValueError, match=r"labels 4\.\.10 are not among the 9 labels"):
        pifa(X, Y, range(4, 10))
