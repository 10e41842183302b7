from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from xmcdist.sparse import csr
from xmcdist.sparse.csr import as_csr, binarize, l1_rows, row_ids, row_slice, unit_rows


def _messy() -> sp.coo_matrix:
    """Duplicates at (0, 2), a stored zero at (2, 0), columns out of order, an empty row 1."""
    return sp.coo_matrix(([1.0, 2.0, 3.0, 0.0], ([0, 0, 0, 2], [2, 2, 1, 0])), shape=(3, 4))


@pytest.mark.parametrize("form", ["coo", "csr", "csc", "lil", "dok"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.uint8])
def test_every_format_becomes_canonical(form: str, dtype: type) -> None:
    A = as_csr(_messy().astype(dtype).asformat(form), "X")
    assert isinstance(A, sp.csr_matrix)
    assert A.dtype == np.float32
    assert A.has_canonical_format
    assert A.nnz == 2
    np.testing.assert_array_equal(A.toarray(), [[0, 3, 3, 0], [0] * 4, [0] * 4])


def test_duplicates_in_a_csr_are_summed() -> None:
    A = sp.csr_matrix((np.float32([1, 2, 4]), [1, 0, 1], [0, 3]), shape=(1, 2))
    assert as_csr(A, "X").toarray().tolist() == [[2, 5]]
    assert as_csr(A, "X").nnz == 2


def test_sparse_array_bool_and_dense() -> None:
    dense = np.array([[True, False], [True, True]])
    for A in (sp.csr_array(dense), sp.csc_array(dense), dense):
        np.testing.assert_array_equal(as_csr(A, "Y").toarray(), [[1, 0], [1, 1]])
        assert isinstance(as_csr(A, "Y"), sp.csr_matrix)


def test_the_input_is_left_as_it_was() -> None:
    A = sp.csr_matrix((np.float32([1, 2, 0]), [3, 1, 0], [0, 2, 3]), shape=(2, 4))
    as_csr(A, "X")
    np.testing.assert_array_equal(A.indices, [3, 1, 0])
    assert A.nnz == 3


def test_a_canonical_matrix_is_not_copied() -> None:
    A = sp.csr_matrix(np.eye(3, dtype=np.float32))
    assert np.shares_memory(as_csr(A, "X").data, A.data)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_a_value_that_is_not_finite_names_matrix_and_row(bad: float) -> None:
    A = sp.csr_matrix(np.array([[1, 0], [0, 0], [0, bad]]))
    with pytest.raises(ValueError, match=r"X\.trn\.npz: row 2, column 1 holds"):
        as_csr(A, "X.trn.npz")


@pytest.mark.parametrize("bad", [[[1.0]], np.ones(3), np.ones((2, 2), dtype=complex), np.array([["a"]])])
def test_what_is_no_matrix_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"^features "):
        as_csr(bad, "features")


@pytest.fixture(params=[1 << 22, 7])
def random(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> sp.csr_matrix:
    monkeypatch.setattr(csr, "_CHUNK", request.param)
    rng = np.random.default_rng(0)
    A = rng.normal(size=(30, 9)) * (rng.random((30, 9)) < 0.3)
    A[4] = A[29] = 0
    return as_csr(A, "A")


def test_scaled_rows_against_dense(random: sp.csr_matrix) -> None:
    A = random.toarray()
    for got, norm in ((unit_rows(random), np.linalg.norm(A, axis=1)), (l1_rows(random), np.abs(A).sum(1))):
        np.testing.assert_allclose(got.toarray(), A / np.where(norm > 0, norm, 1)[:, None], rtol=1e-6)
        assert got.dtype == np.float32


def test_binarize_row_ids_and_slices(random: sp.csr_matrix) -> None:
    A = random.toarray()
    np.testing.assert_array_equal(binarize(random).toarray(), A != 0)
    np.testing.assert_array_equal(row_ids(random), np.nonzero(A)[0])
    for start, stop in ((0, 30), (3, 11), (4, 5), (7, 7)):
        part = row_slice(random, start, stop)
        np.testing.assert_array_equal(part.toarray(), A[start:stop])
        assert part.nnz == 0 or np.shares_memory(part.data, random.data)
    with pytest.raises(ValueError, match=r"rows 3\.\.31 of a matrix with 30"):
        row_slice(random, 3, 31)


def test_binarize_does_not_count_a_stored_zero() -> None:
    assert binarize(sp.csr_matrix((np.float32([0, 5]), [0, 1], [0, 2]), shape=(1, 2))).toarray().tolist() == [[0, 1]]
