"""Label embeddings from documents and texts together, against plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from xmcdist.sparse.csr import as_csr
from xmcdist.sparse.features import Features
from xmcdist.trees import combine as module
from xmcdist.trees.combine import combine
from xmcdist.trees.errors import TreeError
from xmcdist.trees.files import read_text_weight

N = 11
NO_DOCUMENTS, NO_TEXT, NEITHER = 2, 5, 7


def _parts(kind: str, widths: tuple[int, int], empty: set[int], seed: int) -> Features:
    """Rows of unit length over both parts together, some of them empty."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(N, widths[0])) * (rng.random((N, widths[0])) < 0.6)
    A[:, 0] = 1.0
    B = rng.normal(size=(N, widths[1]))
    both = np.hstack([A if kind != "dense" else A * 0, B if kind != "sparse" else B * 0])
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    both[sorted(empty)] = 0
    sparse, dense = both[:, : widths[0]], both[:, widths[0] :].astype(np.float32)
    return Features(as_csr(sparse, "A") if kind != "dense" else None, dense if kind != "sparse" else None)


def _array(x: Features) -> np.ndarray:
    parts = [x.sparse.toarray()] if x.sparse is not None else []
    return np.hstack([*parts, x.dense] if x.dense is not None else parts).astype(np.float64)


def _unit(v: np.ndarray) -> np.ndarray:
    length = np.sqrt((v**2).sum())
    return v / length if length > 0 else v


def _pair(documents: str, texts: str) -> tuple[Features, Features]:
    p = _parts(documents, (6, 4), {NO_DOCUMENTS, NEITHER}, 0)
    return p, _parts(texts, (6, 4), {NO_TEXT, NEITHER}, 1)


@pytest.mark.parametrize("documents", ["sparse", "dense", "both"])
@pytest.mark.parametrize("texts", ["sparse", "dense"])
def test_side_by_side(documents: str, texts: str) -> None:
    p, t = _pair(documents, texts)
    got = combine(p, t)
    assert (got.num_sparse, got.num_dense) == (p.num_sparse + t.num_sparse, p.num_dense + t.num_dense)
    assert got.sparse is None or got.sparse.dtype == np.float32
    zeros = np.zeros((N, 0))

    def part(x: Features, name: str) -> np.ndarray:
        value = getattr(x, name)
        return zeros if value is None else value.toarray() if sp.issparse(value) else value

    sides = [np.hstack([part(x, name) for x in (p, t)]) for name in ("sparse", "dense")]
    want = np.stack([_unit(row) for row in np.hstack(sides)])
    np.testing.assert_allclose(_array(got), want, atol=1e-6)
    lengths = np.linalg.norm(_array(got), axis=1)
    np.testing.assert_allclose(lengths, np.arange(N) != NEITHER, atol=1e-6)
    # Both sources count the same where there are both; one alone is whole.
    own = np.linalg.norm(
        np.hstack([part(got, "sparse")[:, : p.num_sparse], part(got, "dense")[:, : p.num_dense]]), axis=1
    )
    assert own[0] == pytest.approx(np.sqrt(0.5))
    assert (own[NO_TEXT], own[NO_DOCUMENTS]) == pytest.approx((1, 0))


@pytest.mark.parametrize("kind", ["sparse", "dense", "both"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, "each"])
def test_a_weighted_sum(kind: str, share: float | str) -> None:
    p, t = _pair(kind, kind)
    weight = np.random.default_rng(2).random(N) if share == "each" else np.full(N, share)
    got = combine(p, t, weight)
    P, T = _array(p), _array(t)
    want = np.zeros_like(P)
    for label in range(N):
        w = weight[label]
        if label == NO_DOCUMENTS:
            w = 1.0
        if label == NO_TEXT:
            w = 0.0
        want[label] = _unit((1 - w) * P[label] + w * T[label])
    np.testing.assert_allclose(_array(got), want, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(_array(got), axis=1), np.arange(N) != NEITHER, atol=1e-6)
    assert (got.num_sparse, got.num_dense) == (p.num_sparse, p.num_dense)
    if got.sparse is not None:
        assert np.all(got.sparse.data != 0)


def test_opposite_vectors_leave_an_empty_row() -> None:
    p, t = Features(dense=np.eye(2, dtype=np.float32)), Features(dense=-np.eye(2, dtype=np.float32))
    np.testing.assert_array_equal(combine(p, t, np.full(2, 0.5)).dense, np.zeros((2, 2)))


@pytest.mark.parametrize("weight", [None, np.linspace(0, 1, N)])
def test_a_range_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch, weight: np.ndarray | None) -> None:
    p, t = _pair("both", "both")
    whole = combine(p, t, weight)
    monkeypatch.setattr(module, "_BLOCK", 3)
    for start, stop in ((0, N), (0, 4), (4, 9), (8, N), (5, 5)):
        part = combine(p.rows(start, stop), t.rows(start, stop), None if weight is None else weight[start:stop])
        assert _array(part).tobytes() == _array(whole)[start:stop].tobytes()


def test_vectors_of_two_spaces_are_not_added() -> None:
    p, t = _pair("sparse", "dense")
    with pytest.raises(TreeError, match=r"PIFA has 6 sparse columns and label texts have 4 dense columns: take tree\."):
        combine(p, t, np.full(N, 0.5))
    with pytest.raises(TreeError, match="of 11 labels by documents and of 3 by texts"):
        combine(p, t.rows(0, 3))


def test_weights_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.linspace(0, 1, N, dtype=np.float32))
    np.testing.assert_allclose(read_text_weight(str(tmp_path / "w.npy"), N), np.linspace(0, 1, N), atol=1e-7)
    np.testing.assert_array_equal(read_text_weight(0.25, 2), [0.25, 0.25])
    np.save(tmp_path / "nan.npy", np.array([0.5, np.nan]))
    np.save(tmp_path / "large.npy", np.array([0.5, 1.5]))
    np.save(tmp_path / "objects.npy", np.array([object()] * 2), allow_pickle=True)
    for name, message in (
        ("w.npy", r"w\.npy\) is float32 of shape \[11\]; the data set has 2 labels"),
        ("nan.npy", r"nan\.npy\): nan for label 1"),
        ("large.npy", r"large\.npy\): 1\.5 for label 1; a share of the text must be in \[0, 1\]"),
        ("objects.npy", r"objects\.npy\) is no array"),
        ("gone.npy", r"gone\.npy\) does not exist"),
    ):
        with pytest.raises(TreeError, match=message):
            read_text_weight(str(tmp_path / name), 2)
