"""The score of a label that lies in several clusters, by max and by mean, against enumeration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.ranks import on_ranks
from tests.inference.test_beam import DOCS, PTR, check, documents, make, outputs
from tests.inference.test_postprocess import formula
from tests.inference.test_selected import some_labels
from xmcdist.inference import steps as steps_module
from xmcdist.inference.beam import beam_search
from xmcdist.inference.selected import score_selected
from xmcdist.rankers.model import LinearTree
from xmcdist.sparse.features import Features

LABELS = (np.arange(23) % 9, np.zeros(23, int), np.arange(23) // 2, np.arange(23))
CUTS = {1: [0, 40], 2: [0, 33, 40], 3: [0, 7, 7, 40]}


def merged(labels: np.ndarray, how: str, *, coarse: bool = False) -> tuple[LinearTree, list[np.ndarray]]:
    model, plain = make(labels, parts=2, coarse=coarse)
    return replace(model, merge=how), plain


def enumerate_merged(
    model: LinearTree, plain: list[np.ndarray], docs: Features, beam: int, topk: int, name: str
) -> list[list[tuple[float, int]]]:
    """(score, label) of every document, best first: the scores of all slots of the kept clusters, then one a label."""
    answers = []
    for i in range(docs.num_rows):
        kept = {0: 0.0 if name.startswith("log-") else 1.0}
        for t, ptr in enumerate(PTR):
            v = outputs(plain[t], docs, i)
            found: dict[int, list[float]] = {}
            for parent, score in kept.items():
                for node in range(ptr[parent], ptr[parent + 1]):
                    key = int(model.tree.labels[node]) if t == 2 else node
                    found.setdefault(key, []).append(
                        float(np.float32(formula(name, float(np.float32(v[node])), score)))
                    )
            one = max if model.merge == "max" else lambda s: float(np.float32(sum(s) / len(s)))
            ranked = sorted(((one(s), key) for key, s in found.items()), key=lambda p: (-p[0], p[1]))
            kept = {key: s for s, key in ranked[: topk if t == 2 else beam]}
        answers.append([(s, key) for key, s in kept.items()])
    return answers


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("name", ["l3-hinge", "noop", "log-sigmoid"])
def test_copies_become_one_score(how: str, name: str) -> None:
    for labels in LABELS:
        model, plain = merged(labels, how)
        for beam, topk in ((1, 1), (2, 3), (4, 9), (50, 50)):
            got = beam_search(model, documents(), beam=beam, topk=topk, post_processor=name)
            check(got, enumerate_merged(model, plain, documents(), beam, topk, name), topk)
            assert got.has_canonical_format


def test_ties_of_means_go_to_the_smaller_label() -> None:
    docs = documents(coarse=True)
    model, plain = merged(np.arange(23)[::-1] % 9, "mean", coarse=True)
    want = enumerate_merged(model, plain, docs, 3, 4, "noop")
    check(beam_search(model, docs, beam=3, topk=4, post_processor="noop"), want, 4)
    assert any(row[1][0] == row[2][0] for row in want if len(row) > 2)


def test_a_cluster_that_the_beam_lost_has_no_part_in_the_mean() -> None:
    model, _ = merged(np.arange(23) % 9, "mean")
    narrow, wide = (beam_search(model, documents(), beam=b, topk=9).toarray() for b in (2, 50))
    best = beam_search(replace(model, merge="max"), documents(), beam=50, topk=9).toarray()
    assert (wide <= best).all()
    both = (narrow > 0) & (wide > 0)
    assert (narrow[both] != wide[both]).any()


def test_blocks_threads_and_single_documents_change_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = merged(np.arange(23) % 9, "mean")
    want = beam_search(model, documents(), beam=4, topk=6, threads=1)
    for i in range(DOCS):
        one = beam_search(model, documents().rows(i, i + 1), beam=4, topk=6)
        row = slice(want.indptr[i], want.indptr[i + 1])
        assert one.indices.tolist() == want.indices[row].tolist()
        assert one.data.tobytes() == want.data[row].tobytes()
    monkeypatch.setattr(steps_module, "_BLOCK_DOCS", 7)
    got = beam_search(model, documents(), beam=4, topk=6, threads=3)
    assert got.data.tobytes() == want.data.tobytes()


def test_given_labels_have_the_mean_of_all_their_clusters() -> None:
    model, plain = merged(np.arange(23) % 9, "mean")
    full = beam_search(model, documents(), beam=50, topk=9)
    got = score_selected(model, documents(), full)
    np.testing.assert_array_equal(got.indices, full.indices)
    assert got.data.tobytes() == full.data.tobytes()
    chosen = some_labels(9)
    some = score_selected(model, documents(), chosen)
    every = [{j: s for s, j in row} for row in enumerate_merged(model, plain, documents(), 50, 9, "l3-hinge")]
    for i in range(DOCS):
        row = slice(some.indptr[i], some.indptr[i + 1])
        np.testing.assert_allclose(some.data[row], [every[i][j] for j in some.indices[row]], rtol=2e-4, atol=1e-30)


def test_a_model_folder_keeps_how_copies_are_merged(tmp_path: Path) -> None:
    model, _ = merged(np.arange(23) % 9, "mean")
    model.save(tmp_path)
    opened = LinearTree.load(tmp_path)
    assert opened.merge == "mean"
    a, b = (beam_search(m, documents(), beam=3, topk=5) for m in (model, opened))
    assert a.data.tobytes() == b.data.tobytes()
    head = json.loads((tmp_path / "model.json").read_text())
    del head["merge"]  # of an earlier version
    (tmp_path / "model.json").write_text(json.dumps(head))
    assert LinearTree.load(tmp_path).merge == "max"
    (tmp_path / "model.json").write_text(json.dumps(head | {"merge": "median"}))
    with pytest.raises(ValueError, match="merge='median' is none of max, mean"):
        LinearTree.load(tmp_path)


@on_ranks(1, 2, 3)
def test_ranks_give_the_bits_of_one_process(rank: int, world_size: int) -> None:
    from xmcdist.inference.sharded import beam_search_sharded

    a, b = CUTS[world_size][rank : rank + 2]
    for labels, coarse, k in zip(LABELS, (True, False, True, False), (3, 1, 9, 4), strict=True):  # coarse: many ties
        model, docs = merged(labels, "mean", coarse=coarse)[0], documents(coarse=coarse)
        want = beam_search(model, docs, beam=5, topk=k)[a:b]
        got = beam_search_sharded(model.part(rank, world_size), docs.rows(a, b), beam=5, topk=k, block=20)
        for x in ("indptr", "indices", "data"):
            mine, his = getattr(got, x), getattr(want, x)
            assert mine.astype(his.dtype).tobytes() == his.tobytes(), (coarse, k, x)
    upto = beam_search_sharded(model.part(rank, world_size), docs.rows(a, b), beam=2, topk=5, upto_level=2)
    assert (upto != sp.csr_matrix(beam_search(model, docs, beam=2, topk=5, upto_level=2)[a:b])).nnz == 0
