"""Active parents against plain Python sets."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from xmcdist.negatives.schemes import SCHEMES, active_parents, root_parents


def _random(seed: int) -> sp.csr_matrix:
    A = sp.random(23, 9, density=0.2, random_state=np.random.default_rng(seed), format="csr", dtype=np.float32)
    A.data *= 3
    return A


def _sets(A: sp.csr_matrix) -> list[set[int]]:
    return [set(A.indices[A.indptr[i] : A.indptr[i + 1]].tolist()) for i in range(A.shape[0])]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_sets(scheme: str) -> None:
    tfn, man = _random(0), _random(1)
    M = active_parents(scheme, tfn, man)
    want = {
        "tfn": _sets(tfn),
        "man": _sets(man),
        "tfn+man": [a | b for a, b in zip(_sets(tfn), _sets(man), strict=True)],
    }[scheme]
    assert _sets(M) == want
    assert M.dtype == np.float32
    assert np.all(M.data == 1)
    assert all(np.all(np.diff(M.indices[M.indptr[i] : M.indptr[i + 1]]) > 0) for i in range(M.shape[0]))


def test_a_retrieved_cluster_of_score_zero_is_active_and_a_label_of_count_zero_is_not() -> None:
    zero = sp.csr_matrix((np.array([0.0], np.float32), ([1], [2])), shape=(2, 3))
    assert zero.nnz == 1
    assert _sets(active_parents("man", None, zero)) == [set(), {2}]
    assert _sets(active_parents("tfn", zero, None)) == [set(), set()]


def test_inputs_stay_as_they_were() -> None:
    tfn, man = _random(0), _random(1)
    before = tfn.copy(), man.copy()
    active_parents("tfn+man", tfn, man)
    assert (tfn != before[0]).nnz == 0
    assert (man != before[1]).nnz == 0


def test_root_is_active_for_all() -> None:
    assert np.array_equal(root_parents(4).toarray(), np.ones((4, 1)))
    assert root_parents(0).shape == (0, 1)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"hard.*tfn, man"):
        active_parents("hard", _random(0))
    with pytest.raises(ValueError, match=r"needs the matrix of man"):
        active_parents("tfn+man", _random(0))
    with pytest.raises(ValueError, match=r"documents x clusters"):
        active_parents("tfn+man", _random(0), _random(1)[:, :4])
