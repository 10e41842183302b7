"""Clusters found by a head, labels ranked inside them, against enumerating all nodes in plain Python."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.ranks import on_ranks
from tests.inference.test_beam import DOCS, PTR, check, documents, make, outputs
from tests.inference.test_postprocess import formula
from tests.inference.test_selected import some_labels
from xmcdist.inference import selected as selected_module
from xmcdist.inference.beam import beam_search
from xmcdist.inference.cluster_matcher import ClusterMatcher
from xmcdist.inference.selected import nodes_above, score_selected
from xmcdist.rankers.model import LinearTree

WIDTH = 6  # of the encoder: other vectors than the rankers read
CUTS = [0, 7, 7, 40]  # one of three ranks has no documents

Rows = list[tuple[np.ndarray, np.ndarray]]


def head_rows(levels: int) -> Rows:
    """Weights and bias terms of the first levels."""
    rng = np.random.default_rng(8)
    sizes = [int(ptr[-1]) for ptr in PTR[:levels]]
    return [(rng.normal(size=(n, WIDTH)).astype(np.float32), rng.normal(size=n).astype(np.float32)) for n in sizes]


def vectors() -> np.ndarray:
    """Of any length, one of them nothing."""
    E = np.random.default_rng(9).normal(size=(DOCS, WIDTH)) * np.linspace(0.1, 3, DOCS)[:, None]
    E[5] = 0
    return E.astype(np.float32)


def below(model: LinearTree, levels: int) -> LinearTree:
    """The rankers of the levels below some."""
    return replace(model, levels=model.levels[levels:], first_level=levels + 1)


def best(found: dict[int, float], k: int) -> dict[int, float]:
    return dict(sorted(found.items(), key=lambda p: (-p[1], p[0]))[:k])


def enumerate_all(
    model: LinearTree, plain: list[np.ndarray], rows: Rows, beam: int, topk: int, head: str, post: str
) -> list[list[tuple[float, int]]]:
    """Each document's (score, label), best first: every cluster and label scored by numpy, kept or thrown away."""
    answers, E, docs = [], vectors().astype(np.float64), documents()
    for i in range(DOCS):
        kept = {0: 0.0 if head.startswith("log-") else 1.0}
        for t, ptr in enumerate(PTR):
            by_head, is_last = t < len(rows), t == len(PTR) - 1
            v = rows[t][0].astype(np.float64) @ E[i] + rows[t][1] if by_head else np.array(outputs(plain[t], docs, i))
            found: dict[int, float] = {}
            for node in range(ptr[-1]):
                parent = int(np.searchsorted(ptr, node, side="right")) - 1
                if parent not in kept:
                    continue
                key = int(model.tree.labels[node]) if is_last else node
                s = float(np.float32(formula(head if by_head else post, float(np.float32(v[node])), kept[parent])))
                found[key] = max(found.get(key, -np.inf), s)
            kept = best(found, topk if is_last else beam)
        answers.append([(s, k) for k, s in kept.items()])
    return answers


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(
    ("head", "post"), [("l3-hinge", "l3-hinge"), ("sigmoid", "noop"), ("log-sigmoid", "log-l3-hinge")]
)
def test_labels_come_from_the_clusters_that_the_head_finds(levels: int, copies: bool, head: str, post: str) -> None:
    model, plain = make(np.arange(23) % 9 if copies else None, parts=3)
    rows = head_rows(levels)
    matcher, rankers = ClusterMatcher.from_rows(model.tree, rows, head), below(model, levels)
    for beam, topk in ((1, 3), (2, 5), (50, 50)):
        found = matcher.clusters(vectors(), beam)
        assert np.diff(found.indptr).max() == min(beam, PTR[levels - 1][-1])
        got = beam_search(rankers, documents(), beam=beam, topk=topk, post_processor=post, start=found)
        check(got, enumerate_all(model, plain, rows, beam, topk, head, post), topk)
        # the one document of a server, and threads, give the same bits
        alone = matcher.clusters(vectors()[3:4], beam)
        one = beam_search(rankers, documents().rows(3, 4), beam=beam, topk=topk, post_processor=post, start=alone)
        assert one.data.tobytes() == got[3].data.tobytes()
        many = beam_search(rankers, documents(), beam=beam, topk=topk, post_processor=post, start=found, threads=3)
        assert many.data.tobytes() == got.data.tobytes()


@pytest.mark.parametrize("copies", [False, True])
def test_given_labels_are_scored_through_the_head_s_clusters(monkeypatch: pytest.MonkeyPatch, copies: bool) -> None:
    model, plain = make(np.arange(23) % 9 if copies else None)
    rows = head_rows(2)
    matcher, rankers = ClusterMatcher.from_rows(model.tree, rows, "sigmoid"), below(model, 2)
    every = enumerate_all(model, plain, rows, 50, 50, "sigmoid", "l3-hinge")
    chosen = some_labels(model.tree.num_labels)
    for docs, threads in ((2048, 1), (7, 3)):
        monkeypatch.setattr(selected_module, "_BLOCK_DOCS", docs)
        start = matcher.scores_above(vectors(), rankers, chosen)
        got = score_selected(rankers, documents(), chosen, start=start, threads=threads)
        np.testing.assert_array_equal(got.indices, chosen.indices)
        for i, row in enumerate(every):
            span, known = slice(got.indptr[i], got.indptr[i + 1]), {k: s for s, k in row}
            np.testing.assert_allclose(got.data[span], [known[j] for j in got.indices[span]], rtol=2e-4, atol=1e-30)
    # labels that a search finds have the scores it gives, bit for bit
    full = beam_search(rankers, documents(), beam=50, topk=9, start=matcher.clusters(vectors(), 50))
    again = score_selected(rankers, documents(), full, start=matcher.scores_above(vectors(), rankers, full))
    assert again.data.tobytes() == full.data.tobytes()


@on_ranks(3)
def test_ranks_that_share_the_head_find_what_one_process_finds(rank: int, world_size: int) -> None:
    from xmcdist.inference.sharded import beam_search_sharded

    a, b = CUTS[rank : rank + 2]
    for levels, copies in ((1, False), (2, True)):
        model, _ = make(np.arange(23) % 9 if copies else None, parts=2)
        matcher, rankers = ClusterMatcher.from_rows(model.tree, head_rows(levels), "l3-hinge"), below(model, levels)
        held, part = matcher.part(rank, world_size), rankers.part(rank, world_size)
        for beam, topk in ((1, 3), (3, 8), (50, 50)):
            found = matcher.clusters(vectors(), beam)
            own = held.clusters(vectors()[a:b], beam)
            want = beam_search(rankers, documents(), beam=beam, topk=topk, start=found)
            got = beam_search_sharded(part, documents().rows(a, b), beam=beam, topk=topk, start=own, block=9)
            for x, y in ((own, found[a:b]), (got, want[a:b])):
                assert x.shape == y.shape
                for name in ("indptr", "indices", "data"):
                    assert getattr(x, name).astype(getattr(y, name).dtype).tobytes() == getattr(y, name).tobytes()


def test_a_saved_head_is_the_same_and_memory_mapped(tmp_path: Path) -> None:
    model, _ = make()
    matcher, rankers = ClusterMatcher.from_rows(model.tree, head_rows(2), "sigmoid"), below(model, 2)
    matcher.save(tmp_path / "matcher")
    rankers.save(tmp_path / "rankers")
    opened, ranked = ClusterMatcher.load(tmp_path / "matcher"), LinearTree.load(tmp_path / "rankers")
    assert (opened.num_levels, ranked.first_level, ranked.last_level) == (2, 3, 3)
    held = opened.head.levels[0].parts[0].dense.base
    assert isinstance(held, memoryview)
    assert isinstance(held.obj, mmap.mmap)
    for (W, b), level in zip(head_rows(2), opened.head.levels, strict=True):
        np.testing.assert_array_equal(level.dense_rows()[0], W)
        np.testing.assert_array_equal(level.dense_rows()[1], b)
    for m, r in ((matcher, rankers), (opened, ranked)):
        found = m.clusters(vectors(), 2)
        want = beam_search(rankers, documents(), beam=2, topk=5, start=matcher.clusters(vectors(), 2))
        assert beam_search(r, documents(), beam=2, topk=5, start=found).data.tobytes() == want.data.tobytes()


def test_what_does_not_fit_is_refused() -> None:
    model, _ = make()
    rankers, docs = below(model, 2), documents()
    with pytest.raises(ValueError, match="the rankers begin at level 3: give the nodes of level 2"):
        beam_search(rankers, docs, beam=2, topk=2)
    with pytest.raises(ValueError, match=r"start is \(40, 3\), must be \(40, 7\)"):
        beam_search(rankers, docs, beam=2, topk=2, start=sp.csr_matrix((DOCS, 3), dtype=np.float32))
    chosen = some_labels(23)
    lacking = nodes_above(rankers, chosen)
    lacking.data[:] = 0
    lacking.eliminate_zeros()
    with pytest.raises(ValueError, match="start lacks the score of a node above a selected label"):
        score_selected(rankers, docs, chosen, start=lacking)
    with pytest.raises(ValueError, match=r"upto_level \(2\) must be in \[3, 3\]"):
        beam_search(rankers, docs, beam=2, topk=2, upto_level=2)
    with pytest.raises(ValueError, match="do not fill the tree's levels"):
        ClusterMatcher.from_rows(model.tree, [(W[:-1], b[:-1]) for W, b in head_rows(1)], "sigmoid")
    with pytest.raises(ValueError, match="1 levels of weights from level 4 on, for a tree of 3 levels"):
        replace(rankers, first_level=4)
