"""Active parents against plain Python sets."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from tests.negatives.beams import K, beams, counted, entries_of
from xmcdist.negatives.schemes import MATCHER_SCHEMES, active_parents, consistent_parents, root_parents
from xmcdist.negatives.statistics import collect_statistics


def _random(seed: int) -> sp.csr_matrix:
    A = sp.random(23, 9, density=0.2, random_state=np.random.default_rng(seed), format="csr", dtype=np.float32)
    A.data *= 3
    return A


def _sets(A: sp.csr_matrix) -> list[set[int]]:
    return [set(A.indices[A.indptr[i] : A.indptr[i + 1]].tolist()) for i in range(A.shape[0])]


MEMBERS = {
    "tfn": (0,),
    "man": (1,),
    "tfn+man": (0, 1),
    "consistent": (0, 2),
    "tfn+man+consistent": (0, 1, 2),
}


def _scores(seed: int) -> sp.csr_matrix:
    """As a beam has them: in [0, 1], a few exactly 0 and 1."""
    A = _random(seed)
    A.data = np.random.default_rng(seed).choice([0, 0.25, 0.5, 0.75, 1], A.nnz).astype(np.float32)
    return A


@pytest.mark.parametrize("weight", ["none", "score"])
@pytest.mark.parametrize("scheme", MATCHER_SCHEMES)
def test_equals_dictionaries(scheme: str, weight: str) -> None:
    parts = (_random(0), _scores(1), _scores(2))
    assert all(np.any(A.data == 0) for A in parts[1:])
    M = active_parents(scheme, *parts, weight=weight)
    assert M.dtype == np.float32
    for i in range(M.shape[0]):
        want: dict[int, float] = {}
        for member in MEMBERS[scheme]:
            for p, v in entries_of(parts[member], i).items():
                score = v if weight == "score" and member else 1.0
                want[p] = max(want.get(p, 0.0), score)
        assert list(entries_of(M, i).items()) == sorted(want.items())


@pytest.mark.parametrize("scheme", MATCHER_SCHEMES)
def test_what_a_scheme_leaves_out_is_not_looked_at(scheme: str) -> None:
    parts = [_random(s) if s in MEMBERS[scheme] else None for s in range(3)]
    assert active_parents(scheme, *parts).nnz
    for member in MEMBERS[scheme]:
        with pytest.raises(ValueError, match=f"needs the matrix of {('tfn', 'man', 'consistent')[member]}"):
            active_parents(scheme, *(None if s == member else part for s, part in enumerate(parts)))


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.25, 0.5, 1.0])
def test_consistent_parents_equal_plain_loops(share: float) -> None:
    P, Y = beams()
    stats, confusions = collect_statistics(P, Y, [0, K], per_cluster=4)
    positives, pairs = counted(P, Y, 4)[0]["positives"], counted(P, Y, 4)[1]
    got = consistent_parents(Y, confusions, stats.positives, share)
    added = 0
    for i in range(P.shape[0]):
        want: dict[int, float] = {}
        for c in (c for c, v in entries_of(Y, i).items() if v > 0):
            for w, count, mass in pairs[c]:
                if count >= share * positives[c] - 1e-6:
                    want[w] = max(want.get(w, 0.0), float(np.float32(mass / count / 2**32)))
        added += len(set(want) - set(entries_of(P, i)) - set(entries_of(Y, i)))
        assert list(entries_of(got, i).items()) == sorted(want.items())
    assert got.dtype == np.float32
    assert (added > 0) == (share < 1)  # clusters come in that the document's own beam never held


def test_the_share_is_met_exactly() -> None:
    """7 % of 100 are 7, though 0.07 * 100 is more than 7 in floating point."""
    P = sp.csr_matrix((np.ones(7, np.float32), [1] * 7, [*range(8), *[7] * 93]), shape=(100, 2))
    Y = sp.csr_matrix(np.tile(np.array([[1, 0]], np.float32), (100, 1)))
    stats, confusions = collect_statistics(P, Y, [0, 2], per_cluster=1)
    assert (stats.positives[0], confusions.count[0]) == (100, 7)
    assert 0.07 * 100 > 7
    assert consistent_parents(Y, confusions, stats.positives, 0.07).nnz == 100
    assert consistent_parents(Y, confusions, stats.positives, 0.070001).nnz == 0
    assert consistent_parents(Y[:0], confusions, stats.positives, 0.07).shape == (0, 2)


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
    with pytest.raises(ValueError, match=r"hard.*none, score"):
        active_parents("tfn", _random(0), weight="hard")
    with pytest.raises(ValueError, match=r"documents x clusters"):
        active_parents("tfn+man", _random(0), _random(1)[:, :4])
    P, Y = beams()
    stats, confusions = collect_statistics(P, Y, [0, K], per_cluster=1)
    with pytest.raises(ValueError, match="do not fit together"):
        consistent_parents(Y[:, 1:], confusions, stats.positives, 0.1)
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            consistent_parents(Y, confusions, stats.positives, share)
