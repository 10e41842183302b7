"""Candidates against plain Python sets, and how negatives are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from xmcdist.matchers.candidates import Candidates, CandidateSource, children_of

CHILD_PTR = np.array([0, 3, 3, 7, 11, 16], dtype=np.int64)  # the second parent has no children
N, K = 40, 16
FIELDS = ("doc_ptr", "node", "value", "weight", "counts")


def _level(seed: int = 0) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    rng = np.random.default_rng(seed)
    M = sp.random(N, 5, density=0.35, random_state=rng, format="csr", dtype=np.float32)
    Y = sp.random(N, K, density=0.12, random_state=rng, format="csr", dtype=np.float32)
    Y.data = rng.integers(1, 4, Y.nnz).astype(np.float32)
    return M, Y


def _source(max_active: int = 1000, seed: int = 0, level: int = 2) -> CandidateSource:
    return CandidateSource(*_level(), CHILD_PTR, max_active=max_active, seed=seed, level=level)


def _as_dicts(c: Candidates) -> list[dict[int, float]]:
    return [
        dict(zip(c.node[a:b].tolist(), c.value[a:b].tolist(), strict=True))
        for a, b in zip(c.doc_ptr[:-1], c.doc_ptr[1:], strict=True)
    ]


def _reference(ids: np.ndarray) -> list[dict[int, float]]:
    M, Y = (A.toarray() for A in _level())
    rows = []
    for i in ids:
        row = {c: 0.0 for p in range(5) if M[i, p] for c in range(CHILD_PTR[p], CHILD_PTR[p + 1])}
        row.update({k: float(Y[i, k]) for k in range(K) if Y[i, k]})
        rows.append(dict(sorted(row.items())))
    return rows


def test_children_and_positives() -> None:
    ids = np.random.default_rng(1).permutation(N)
    got = _source().of(ids, 3)
    want = _reference(ids)
    assert any(not row for row in want)  # a document without any is among them
    assert [list(r.items()) for r in _as_dicts(got)] == [list(r.items()) for r in want]
    assert got.counts.tolist() == [len(r) for r in want]
    assert np.array_equal(got.doc(), np.repeat(np.arange(N), [len(r) for r in want]))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranges_part_the_pairs(world: int) -> None:
    whole = _source().of(np.arange(N), 0)
    found: list[set[tuple[int, int]]] = []
    for r in range(world):
        start, stop = r * K // world, (r + 1) * K // world
        own = whole.restrict(start, stop)
        assert np.array_equal(own.counts, whole.counts)
        assert np.all((own.node >= 0) & (own.node < stop - start))
        found.append(set(zip(own.doc().tolist(), (own.node + start).tolist(), strict=True)))
    assert sum(map(len, found)) == len(set().union(*found)) == len(whole.node)


def test_take_is_as_if_asked_for_alone() -> None:
    whole = _source(6).of(np.arange(N), 2)
    places = np.array([7, 3, 39, 3], dtype=np.int64)
    one, other = whole.take(places), _source(6).of(places, 2)
    assert all(np.array_equal(getattr(one, f), getattr(other, f)) for f in FIELDS)
    assert whole.take([]).num_docs == 0


@pytest.mark.parametrize("cap", [1, 3, 6])
def test_the_cap_keeps_positives_and_fills_up_with_negatives(cap: int) -> None:
    ids = np.arange(N)
    for got, want in zip(_as_dicts(_source(cap).of(ids, 0)), _reference(ids), strict=True):
        positives = {k: v for k, v in want.items() if v}
        assert {k: v for k, v in got.items() if v} == positives
        assert set(got) <= set(want)
        assert len(got) == min(len(want), max(cap, len(positives)))


def test_draws_depend_on_seed_level_step_document_and_nothing_else() -> None:
    ids = np.arange(N)
    base = _as_dicts(_source(4).of(ids, 5))
    assert base == _as_dicts(_source(4).of(ids, 5))
    assert list(reversed(base)) == _as_dicts(_source(4).of(ids[::-1], 5))
    others = (_source(4).of(ids, 6), _source(4, seed=1).of(ids, 5), _source(4, level=3).of(ids, 5))
    assert all(base != _as_dicts(o) for o in others)


def test_negatives_are_drawn_evenly() -> None:
    M, Y = sp.csr_matrix(np.ones((1, 1), np.float32)), sp.csr_matrix(np.eye(1, 10, 4, dtype=np.float32))
    source = CandidateSource(M, Y, np.array([0, 10]), max_active=4, seed=0, level=1)
    hits = np.zeros(10)
    draws = 6000
    for step in range(draws):
        hits[source.of([0], step).node] += 1
    assert hits[4] == draws
    share = np.delete(hits, 4) / draws  # 3 of 9: a third each, standard error 0.006
    assert np.all(np.abs(share - 1 / 3) < 0.03)


@pytest.mark.parametrize("cap", [1000, 5])
def test_a_negative_weighs_what_its_parent_does(cap: int) -> None:
    M, Y = _level()
    M.data[::3] = 0.0  # an active parent whose score underflowed
    M.data[1::3] = 1.0
    source = CandidateSource(M, Y, CHILD_PTR, max_active=cap, seed=0, level=2, weighted=True)
    got, plain = (s.of(np.arange(N), 3) for s in (source, _source(cap)))
    parent = np.searchsorted(CHILD_PTR, np.arange(K), side="right") - 1
    dense = M.toarray()
    for i, node, value, weight in zip(got.doc(), got.node, got.value, got.weight, strict=True):
        assert weight == (1.0 if value else dense[i, parent[node]])
    assert {0.0, 1.0} < set(got.weight.tolist())
    assert all(np.array_equal(getattr(got, f), getattr(plain, f)) for f in FIELDS if f != "weight")
    assert np.all(plain.weight == 1)


def test_weights_go_with_their_pairs() -> None:
    M, Y = _level()
    whole = CandidateSource(M, Y, CHILD_PTR, max_active=1000, seed=0, level=2, weighted=True).of(np.arange(N), 0)
    of = dict(zip(zip(whole.doc().tolist(), whole.node.tolist(), strict=True), whole.weight.tolist(), strict=True))
    assert len(set(of.values())) > 10
    part = whole.take([9, 4, 9]).restrict(2, 11)
    pairs = zip(part.doc().tolist(), part.node.tolist(), part.weight.tolist(), strict=True)
    assert all(weight == of[(9, 4, 9)[place], node + 2] for place, node, weight in pairs)
    assert len(part.weight) == len(part.node) > 0


def test_children_of_ranges() -> None:
    M, _ = _level()
    for start, stop in ((0, K), (4, 9), (9, 9)):
        ptr, node, value = children_of(M, CHILD_PTR, start, stop)
        for i in range(N):
            want = [
                (c - start, M[i, p])
                for p in np.flatnonzero(M[i].toarray()[0])
                for c in range(CHILD_PTR[p], CHILD_PTR[p + 1])
                if start <= c < stop
            ]
            got = list(zip(node[ptr[i] : ptr[i + 1]].tolist(), value[ptr[i] : ptr[i + 1]].tolist(), strict=True))
            assert got == [(int(c), pytest.approx(float(v))) for c, v in want]


def test_shapes_that_do_not_fit() -> None:
    M, Y = _level()
    with pytest.raises(ValueError, match="do not fit"):
        CandidateSource(M[:, :4], Y, CHILD_PTR, max_active=5, seed=0, level=1)
    with pytest.raises(ValueError, match="max_active=0"):
        _source(0)
