"""Beam search against enumerating every node in plain Python."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp

from tests.inference.test_postprocess import formula
from xmcdist.inference import steps as steps_module
from xmcdist.inference.beam import beam_search, predict_level, top_k_arrays
from xmcdist.inference.postprocess import NAMES
from xmcdist.rankers.model import LevelWeights, LinearTree
from xmcdist.sparse.features import Features
from xmcdist.trees.label_tree import LabelTree

PTR = [np.array([0, 3]), np.array([0, 2, 5, 7]), np.array([0, 4, 5, 9, 9, 12, 20, 23])]
DOCS, WORDS, WIDTH = 40, 30, 3


def make(
    labels: np.ndarray | None = None, parts: int = 1, *, coarse: bool = False
) -> tuple[LinearTree, list[np.ndarray]]:
    """A tree of 3, 7 and 23 nodes with random weights; also all weights ``[n, WORDS + WIDTH + 1]``.

    ``coarse`` makes weights small whole numbers, so that very many scores tie.
    """
    rng = np.random.default_rng(0)
    labels = rng.permutation(23) if labels is None else labels
    levels, plain = [], []
    for ptr in PTR:
        n = int(ptr[-1])
        W = rng.normal(size=(n, WORDS + WIDTH + 1)).astype(np.float32)
        W[:, :WORDS] *= rng.random((n, WORDS)) < 0.6
        if coarse:
            W = np.round(W).astype(np.float32)
        cuts = np.linspace(0, n, parts + 1).astype(int)
        levels.append(
            LevelWeights.concat(
                [
                    LevelWeights.from_rows(sp.csr_matrix(W[a:b, :WORDS]), W[a:b, WORDS:-1], W[a:b, -1], ptr, a)
                    for a, b in pairwise(cuts)
                ]
            )
        )
        plain.append(W)
    return LinearTree(LabelTree(list(PTR), labels, int(labels.max()) + 1), levels, WORDS, WIDTH), plain


def documents(*, coarse: bool = False) -> Features:
    rng = np.random.default_rng(1)
    X = rng.random((DOCS, WORDS)) * (rng.random((DOCS, WORDS)) < 0.25)
    X[7] = 0
    E = rng.normal(size=(DOCS, WIDTH))
    if coarse:
        X, E = np.round(X), np.round(E)
    return Features(sp.csr_matrix(X.astype(np.float32)), E.astype(np.float32))


def outputs(plain: np.ndarray, features: Features, i: int) -> list[float]:
    assert features.sparse is not None
    assert features.dense is not None
    x = np.concatenate([features.sparse[[i]].toarray()[0], features.dense[i], [1.0]]).astype(np.float64)
    return [float(w.astype(np.float64) @ x) for w in plain]


def enumerate_beam(
    model: LinearTree, plain: list[np.ndarray], features: Features, beam: int, topk: int, name: str, last: str
) -> list[list[tuple[float, int]]]:
    """For each document its (score, label), best first: loops and sorting only."""
    answers = []
    for i in range(features.num_rows):
        kept = {0: 1.0 if not name.startswith("log-") else 0.0}
        for t, ptr in enumerate(PTR):
            v, is_last = outputs(plain[t], features, i), t == len(PTR) - 1
            found: dict[int, float] = {}
            for parent, score in kept.items():
                for node in range(ptr[parent], ptr[parent + 1]):
                    key = int(model.tree.labels[node]) if is_last else node
                    s = float(np.float32(formula(last if is_last else name, float(np.float32(v[node])), score)))
                    found[key] = max(found.get(key, -np.inf), s)
            ranked = sorted(((s, k) for k, s in found.items()), key=lambda p: (-p[0], p[1]))
            kept = {k: s for s, k in ranked[: topk if is_last else beam]}
        answers.append([(s, k) for k, s in kept.items()])
    return answers


def check(got: sp.csr_matrix, want: list[list[tuple[float, int]]], k: int) -> None:
    scores, labels = top_k_arrays(got, k)
    for i, row in enumerate(want):
        assert labels[i, : len(row)].tolist() == [j for _, j in row], f"document {i}"
        assert (labels[i, len(row) :] == -1).all()
        np.testing.assert_allclose(scores[i, : len(row)], [s for s, _ in row], rtol=2e-4, atol=1e-30)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("beam", "topk"), [(1, 1), (2, 5), (4, 10), (50, 50)])
def test_finds_what_enumeration_finds(name: str, beam: int, topk: int) -> None:
    model, plain = make()
    docs = documents()
    got = beam_search(model, docs, beam=beam, topk=topk, post_processor=name)
    check(got, enumerate_beam(model, plain, docs, beam, topk, name, name), topk)
    assert got.has_canonical_format
    assert got.shape == (DOCS, 23)
    assert np.diff(got.indptr).max() <= topk


def test_the_last_level_may_rank_by_raw_scores() -> None:
    model, plain = make()
    got = beam_search(model, documents(), beam=3, topk=6, last_post_processor="noop")
    check(got, enumerate_beam(model, plain, documents(), 3, 6, "l3-hinge", "noop"), 6)


@pytest.mark.parametrize("name", ["noop", "l3-hinge"])
def test_ties_go_to_the_smaller_id(name: str) -> None:
    model, plain = make(coarse=True)
    docs = documents(coarse=True)
    want = enumerate_beam(model, plain, docs, 2, 4, name, name)
    check(beam_search(model, docs, beam=2, topk=4, post_processor=name), want, 4)
    assert any(row[1][0] == row[2][0] for row in want if len(row) > 2)


def test_a_label_in_several_slots_keeps_its_best() -> None:
    labels = np.arange(23) % 9
    model, plain = make(labels)
    for k in (1, 3, 9):
        got = beam_search(model, documents(), beam=5, topk=k, post_processor="sigmoid")
        assert got.shape == (DOCS, 9)
        check(got, enumerate_beam(model, plain, documents(), 5, k, "sigmoid", "sigmoid"), k)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_weights_in_parts_score_the_same(parts: int) -> None:
    a, b = (beam_search(make(parts=n)[0], documents(), beam=4, topk=8) for n in (1, parts))
    assert (a != b).nnz == 0
    np.testing.assert_array_equal(a.data, b.data)


def test_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make()
    want = beam_search(model, documents(), beam=4, topk=8, threads=1)
    for block in (1, 3, 17):
        monkeypatch.setattr(steps_module, "_BLOCK_DOCS", block)
        for threads in (1, 3):
            got = beam_search(model, documents(), beam=4, topk=8, threads=threads)
            np.testing.assert_array_equal(got.indices, want.indices)
            np.testing.assert_array_equal(got.data, want.data)


def test_one_level_at_a_time_is_the_same_search() -> None:
    model, _ = make()
    rows = sp.csr_matrix(np.ones((DOCS, 1), np.float32))
    for t in (1, 2):
        rows = predict_level(model.levels[t - 1], documents(), rows, PTR[t - 1], 3, "l3-hinge")
        upto = beam_search(model, documents(), beam=3, topk=3, upto_level=t)
        assert upto.shape == rows.shape == (DOCS, [3, 7][t - 1])
        np.testing.assert_array_equal(upto.indices, rows.indices)
        np.testing.assert_array_equal(upto.data, rows.data)


def test_stored_zeros_are_kept_nodes() -> None:
    model, _ = make()
    rows = sp.csr_matrix((np.zeros(DOCS, np.float32), np.zeros(DOCS, int), np.arange(DOCS + 1)), shape=(DOCS, 1))
    found = predict_level(model.levels[0], documents(), rows, PTR[0], 3, "noop")
    assert np.diff(found.indptr).tolist() == [3] * DOCS


def test_a_document_with_no_parents_finds_nothing() -> None:
    model, _ = make()
    rows = sp.csr_matrix((DOCS, 7), dtype=np.float32)
    assert predict_level(model.levels[2], documents(), rows, PTR[2], 3, "noop").nnz == 0


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_either_part_of_the_features_may_be_missing(kind: str) -> None:
    model, plain = make()
    docs = documents()
    keep = (True, False) if kind == "sparse" else (False, True)
    levels = []
    for W, ptr in zip(plain, PTR, strict=True):
        sparse = sp.csr_matrix(W[:, :WORDS]) if keep[0] else None
        levels.append(LevelWeights.from_rows(sparse, W[:, WORDS:-1] if keep[1] else None, W[:, -1], ptr))
        W[:, WORDS:-1] *= keep[1]
        W[:, :WORDS] *= keep[0]
    small = LinearTree(model.tree, levels, WORDS * keep[0], WIDTH * keep[1])
    one = Features(docs.sparse if keep[0] else None, docs.dense if keep[1] else None)
    check(beam_search(small, one, beam=3, topk=5), enumerate_beam(model, plain, docs, 3, 5, "l3-hinge", "l3-hinge"), 5)


def test_what_does_not_fit_is_refused() -> None:
    model, _ = make()
    with pytest.raises(ValueError, match="were trained on 30 and 3"):
        beam_search(model, Features(documents().sparse, None), beam=2, topk=2)
    with pytest.raises(ValueError, match="upto_level"):
        beam_search(model, documents(), beam=2, topk=2, upto_level=4)
    with pytest.raises(ValueError, match="at least 1"):
        beam_search(model, documents(), beam=2, topk=0)
    with pytest.raises(ValueError, match="parent_scores"):
        predict_level(model.levels[0], documents(), sp.csr_matrix((DOCS, 2), dtype=np.float32), PTR[0], 2, "noop")


@pytest.mark.parametrize("width", [1, 7, 100])
def test_outputs_do_not_depend_on_how_wide_the_clusters_here_are(width: int) -> None:
    """Loops over children are cut for vector units; where a child falls must change no bit."""
    rng = np.random.default_rng(2)
    ptr, d = np.array([0, width]), 37
    W, E = sp.csr_matrix(rng.normal(size=(width, 9)).astype(np.float32)), rng.normal(size=(width, d)).astype(np.float32)
    x = Features(sp.csr_matrix(rng.random((20, 9)).astype(np.float32)), rng.normal(size=(20, d)).astype(np.float32))
    tree = LabelTree([ptr], np.arange(width), width)
    bias = rng.normal(size=width).astype(np.float32)
    whole = LinearTree(tree, [LevelWeights.from_rows(W, E, bias, ptr)], 9, d)
    cuts = range(width + 1)  # every child is a part of its own
    single = [LevelWeights.from_rows(W[a:b], E[a:b], bias[a:b], ptr, a) for a, b in pairwise(cuts)]
    alone = LinearTree(tree, [LevelWeights.concat(single)], 9, d)
    args = {"beam": 1, "topk": width, "post_processor": "noop"}
    want = beam_search(whole, x, **args)
    assert want.nnz == 20 * width
    np.testing.assert_array_equal(beam_search(alone, x, **args).data, want.data)
    exact = x.sparse.astype(np.float64) @ W.T.astype(np.float64) + x.dense.astype(np.float64) @ E.T + bias  # type: ignore[union-attr]
    np.testing.assert_allclose(want.toarray(), np.asarray(exact), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [("mixed", 2e-3), ("float16", 2e-3)])
def test_half_precision_weights_score_as_rounded_ones(dtype: str, rtol: float) -> None:
    model, _ = make()
    half = replace(model, levels=[level.astype(dtype) for level in model.levels])
    rounded = []
    for level, ptr in zip(half.levels, PTR, strict=True):
        dense, bias = level.dense_rows()
        rounded.append(LevelWeights.from_rows(level.sparse_rows(), dense, bias, ptr))
    want = beam_search(replace(model, levels=rounded), documents(), beam=50, topk=50, post_processor="noop")
    got = beam_search(half, documents(), beam=50, topk=50, post_processor="noop")
    np.testing.assert_array_equal(got.data, want.data)  # the same numbers in fewer bytes
    full = beam_search(model, documents(), beam=50, topk=50, post_processor="noop")
    np.testing.assert_allclose(got.toarray(), full.toarray(), rtol=rtol, atol=1e-2)
    assert (got != full).nnz


def test_the_smallest_half_precision_numbers_are_read() -> None:
    bits = np.arange(0x7C00, dtype=np.uint16)  # zero, the denormal and all other finite ones
    values = np.concatenate([bits, bits | 0x8000]).view(np.float16).astype(np.float32)
    ptr = np.array([0, values.size])
    sparse = sp.csr_matrix(values[:, None])
    level = LevelWeights.from_rows(sparse, None, np.zeros(values.size, np.float32), ptr).astype("float16")
    model = LinearTree(LabelTree([ptr], np.arange(values.size), values.size), [level], 1, 0)
    one = Features(sp.csr_matrix(np.ones((1, 1), np.float32)), None)
    got = beam_search(model, one, beam=1, topk=values.size, post_processor="noop")
    np.testing.assert_array_equal(got.toarray()[0], values)


def test_no_documents_is_an_answer() -> None:
    model, _ = make()
    assert beam_search(model, documents().rows(0, 0), beam=2, topk=2).shape == (0, 23)
