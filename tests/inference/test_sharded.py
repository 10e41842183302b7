"""Beam search over ranks that each hold a part of the labels: the answers of one process, bit for bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.ranks import on_ranks
from tests.inference.test_beam import DOCS, PTR, WIDTH, WORDS, check, documents, enumerate_beam, make
from xmcdist.inference.beam import beam_search
from xmcdist.rankers.model import LevelWeights, LinearTree
from xmcdist.sparse.features import Features

CUTS = {1: [0, 40], 2: [0, 33, 40], 3: [0, 7, 7, 40], 4: [0, 1, 20, 20, 40]}  # uneven, and ranks without documents


def _same(got: sp.csr_matrix, want: sp.csr_matrix) -> None:
    assert got.shape == want.shape
    for name in ("indptr", "indices", "data"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.astype(b.dtype).tobytes() == b.tobytes(), name


@on_ranks(1, 2, 3, 4)
def test_ranks_find_what_one_process_finds(rank: int, world_size: int) -> None:
    from xmcdist.inference.sharded import beam_search_sharded

    a, b = CUTS[world_size][rank : rank + 2]
    for coarse in (False, True):  # coarse: very many scores tie
        model, plain = make(coarse=coarse, parts=2)
        docs = documents(coarse=coarse)
        own, part = docs.rows(a, b), model.part(rank, world_size)
        for name, beam, topk in (("noop", 2, 4), ("l3-hinge", 3, 10), ("log-sigmoid", 50, 50), ("sigmoid", 1, 1)):
            args = {"beam": beam, "topk": topk, "post_processor": name}
            whole = beam_search(model, docs, **args)
            longest = int(np.diff(CUTS[world_size]).max())
            got = beam_search_sharded(part, own, block=longest - 1, **args)  # one document in the last block
            _same(got, beam_search_sharded(part, own, block=9, **args))
            _same(got, whole[a:b])
            check(got, enumerate_beam(model, plain, docs, beam, topk, name, name)[a:b], topk)
        upto = beam_search_sharded(part, own, beam=2, topk=5, upto_level=2)
        _same(upto, beam_search(model, docs, beam=2, topk=5, upto_level=2)[a:b])


@on_ranks(1, 2, 3, 4)
def test_a_label_in_several_slots_of_several_ranks_counts_once(rank: int, world_size: int) -> None:
    from xmcdist.inference.sharded import beam_search_sharded

    a, b = CUTS[world_size][rank : rank + 2]
    for labels in (np.arange(23) % 9, np.zeros(23, int), np.arange(23) // 2):
        model, _ = make(labels, coarse=True)
        docs = documents(coarse=True)
        for k in (1, 3, 9):
            got = beam_search_sharded(model.part(rank, world_size), docs.rows(a, b), beam=5, topk=k)
            _same(got, beam_search(model, docs, beam=5, topk=k)[a:b])


@on_ranks(2, 3)
def test_either_part_of_the_features_may_be_missing_and_documents_too(rank: int, world_size: int) -> None:
    from xmcdist.inference.sharded import beam_search_sharded

    _, plain = make()
    docs = documents()
    a, b = CUTS[world_size][rank : rank + 2]
    for has_sparse in (True, False):
        levels = [
            LevelWeights.from_rows(
                sp.csr_matrix(W[:, :WORDS]) if has_sparse else None, None if has_sparse else W[:, WORDS:-1], W[:, -1], p
            )
            for W, p in zip(plain, PTR, strict=True)
        ]
        model = LinearTree(make()[0].tree, levels, WORDS * has_sparse, WIDTH * (not has_sparse))
        one = Features(docs.sparse, None) if has_sparse else Features(None, docs.dense)
        part = model.part(rank, world_size)
        _same(beam_search_sharded(part, one.rows(a, b), beam=3, topk=5), beam_search(model, one, beam=3, topk=5)[a:b])
        none = beam_search_sharded(part, one.rows(0, 0), beam=3, topk=5)
        assert none.shape == (0, 23)


@pytest.mark.parametrize("world_size", [1, 2, 4, 9, 30])
@pytest.mark.parametrize("parts", [1, 3])
def test_ranks_hold_every_node_once_and_near_equal_shares(tmp_path: Path, world_size: int, parts: int) -> None:
    model, plain = make(parts=parts)
    model.save(tmp_path / "m")
    opened = LinearTree.load(tmp_path / "m")
    held = [opened.part(r, world_size) for r in range(world_size)]
    for t, (W, ptr) in enumerate(zip(plain, PTR, strict=True)):
        levels = [part.levels[t] for part in held]
        assert sum(level.num_nodes for level in levels) == ptr[-1]
        assert all(a.first_node + a.num_nodes == b.first_node for a, b in pairwise(levels))
        for level in levels:
            rows = slice(level.first_node, level.first_node + level.num_nodes)
            np.testing.assert_array_equal(level.sparse_rows().toarray(), W[rows, :WORDS])
            dense, bias = level.dense_rows()
            np.testing.assert_array_equal(dense, W[rows, WORDS:-1])
            np.testing.assert_array_equal(bias, W[rows, -1])
        stored = [level.nnz for level in levels]
        assert sum(stored) == np.count_nonzero(W[:, :WORDS])
        widest = max(np.count_nonzero(w) + WIDTH + 1 for w in W)
        assert max(stored) <= np.count_nonzero(W[:, :WORDS]) / world_size + 2 * widest


def test_whole_clusters_of_a_file_are_not_read_into_memory(tmp_path: Path) -> None:
    model, _ = make()
    model.save(tmp_path / "m")
    level = LinearTree.load(tmp_path / "m").levels[2]
    (part,) = level.cut(5, 12, PTR[2]).parts  # clusters 2 to 4 of 7, the third of them without children
    for name in ("feature", "entry_offset", "child", "value", "dense", "bias"):
        assert np.shares_memory(getattr(part, name), getattr(level.parts[0], name)), name
    first, *_ = level.cut(2, 12, PTR[2]).parts
    assert (first.first_node, first.num_nodes) == (2, 2)  # the piece of the cluster that is cut


def test_a_part_is_no_model() -> None:
    model, _ = make()
    part = model.part(0, 2)
    with pytest.raises(ValueError, match="beam_search_sharded"):
        beam_search(part, documents(), beam=2, topk=2)
    with pytest.raises(ValueError, match="only a whole model"):
        part.part(0, 2)
    with pytest.raises(ValueError, match="only a whole model"):
        part.save("nowhere")


def test_documents_are_enough_for_uneven_parts() -> None:
    assert all(cuts[-1] == DOCS for cuts in CUTS.values())
