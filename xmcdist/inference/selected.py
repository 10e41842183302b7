"""Scores of given labels of every document, without a beam: what PECOS calls selected outputs.

A label's score is that of its path from the root, all of whose clusters are scored, however
poorly they do; of a label in several clusters it is that of the best path.  So the labels a
beam search finds have the scores it gives them, bit for bit.  Where a model takes the mean of
a label's paths (``merge=mean``), it is that of all of them here, since all are scored; a beam
search takes those that its beam holds, and gives the same bits where it holds all.

Letters: N documents, L labels, S slots (nodes of the last level), K_t nodes of level t.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.inference.steps import (
    Block,
    Rows,
    Tables,
    check_width,
    each,
    row_span,
    search_steps,
    start_rows,
    workers,
)
from xmcdist.rankers.model import LinearTree
from xmcdist.sparse.csr import row_slice
from xmcdist.sparse.features import Features
from xmcdist.trees.label_tree import LabelTree

__all__ = ["nodes_above", "score_selected"]

I64 = NDArray[np.int64]
Ragged = tuple[I64, I64]  # indptr, ids ascending in a row

_BLOCK_SCORES = 1 << 21
_BLOCK_DOCS = 2048


def score_selected(
    model: LinearTree,
    features: Features,
    selected: sp.csr_matrix,
    *,
    post_processor: str | None = None,
    last_post_processor: str | None = None,
    start: sp.csr_matrix | None = None,
    threads: int | None = None,
) -> sp.csr_matrix:
    """Scores of the stored labels of every document.

    Args:
        model: tree and rankers of all levels, or of all from its first.
        features: of N documents.
        selected: ``[N, L]``; its stored entries, whatever their values, are scored.
        post_processor: with ``last_post_processor`` and ``threads`` as of `beam_search`.
        start: scores of nodes of the level above the model's first ``[N, K]``, among them those
            of `nodes_above`; None where that is the root.

    Returns:
        ``[N, L]`` CSR float32 with the entries of ``selected``, labels ascending in a row.

    Raises:
        ValueError: features, selected labels or settings do not fit the model.

    Cost: of a document and level, as a beam search whose beam holds the clusters above its
    labels.
    """
    tree = model.tree
    if not model.is_whole or model.last_level != tree.depth:
        raise ValueError("only a whole model scores given labels, this is a part of one")
    steps = search_steps(model, 1, 1, post_processor, last_post_processor, None)
    check_width(steps, features)
    if selected.shape != (features.num_rows, tree.num_labels):
        raise ValueError(f"selected is {selected.shape}, must be {(features.num_rows, tree.num_labels)}")
    tables = [Tables.of([step]) for step in steps]
    slots, first = _slots(model), model.first_level
    n = features.num_rows
    known = start_rows(tree, first, start, n, steps[0].post)
    widest = max(int(np.diff(ptr).max(initial=1)) for ptr in tree.child_ptr)
    paths = max(int(np.diff(selected.indptr).max(initial=1)), 1) * int(np.diff(slots[0]).max(initial=1))
    docs = max(1, min(_BLOCK_DOCS, _BLOCK_SCORES // (widest * paths), -(-n // workers(threads))))

    def run(a: int) -> sp.csr_matrix:
        b = min(a + docs, n)
        wanted = row_slice(selected, a, b).copy()
        wanted.sum_duplicates()
        levels = _paths(tree, (wanted.indptr.astype(np.int64), wanted.indices.astype(np.int64)), slots)
        block = Block(features.rows(a, b))
        scores = _scores_of(levels[first - 1], row_span(known, a, b))
        for table, above, (ptr, ids) in zip(tables, levels[first - 1 :], levels[first:], strict=False):
            scores = block.score(table, (*above, scores), ptr, ids)
        wanted.data = _merge_slots(wanted, levels[-1], scores, tree, model.merge)
        return wanted

    done = each(run, range(0, n, docs), threads)
    if not done:
        return sp.csr_matrix(np.zeros(selected.shape, np.float32))
    return sp.csr_matrix(sp.vstack(done, format="csr"))


def nodes_above(model: LinearTree, selected: sp.csr_matrix) -> sp.csr_matrix:
    """Nodes of the level above the model's first on the paths to given labels: ones ``[N, K]``."""
    wanted = selected.copy()
    wanted.sum_duplicates()
    given = (wanted.indptr.astype(np.int64), wanted.indices.astype(np.int64))
    ptr, nodes = _paths(model.tree, given, _slots(model))[model.first_level - 1]
    shape = (selected.shape[0], model.tree.level_size(model.first_level - 1))
    return sp.csr_matrix((np.ones(nodes.size, np.float32), nodes, ptr), shape=shape)


def _scores_of(wanted: Ragged, known: Rows) -> NDArray[np.float32]:
    """Scores of given nodes among those that are known.

    Raises:
        ValueError: one is not known.
    """
    ptr, ids, scores = known
    width = int(max(wanted[1].max(initial=0), ids.max(initial=0))) + 1
    keys = np.repeat(np.arange(ptr.size - 1), np.diff(ptr)) * width + ids
    asked = np.repeat(np.arange(wanted[0].size - 1), np.diff(wanted[0])) * width + wanted[1]
    place = np.minimum(np.searchsorted(keys, asked), max(keys.size - 1, 0))
    if asked.size and (not keys.size or np.any(keys[place] != asked)):
        raise ValueError("start lacks the score of a node above a selected label")
    return scores[place]


_SLOTS: WeakKeyDictionary[LinearTree, Ragged] = WeakKeyDictionary()


def _slots(model: LinearTree) -> Ragged:
    """Slots of every label, made once a model: indptr ``[L+1]``, slots."""
    if model not in _SLOTS:
        counts = np.bincount(model.tree.labels, minlength=model.tree.num_labels)
        _SLOTS[model] = np.concatenate([[0], np.cumsum(counts)]), np.argsort(model.tree.labels, kind="stable")
    return _SLOTS[model]


def _paths(tree: LabelTree, wanted: Ragged, slots: Ragged) -> list[Ragged]:
    """Nodes of every level on the paths to each document's labels, the root's level first."""
    ptr, labels = wanted
    docs = np.repeat(np.arange(ptr.size - 1), np.diff(ptr))
    counts = np.diff(slots[0])[labels]
    begins = np.repeat(slots[0][labels] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    docs, nodes = _unique(np.repeat(docs, counts), slots[1][begins + np.arange(counts.sum())])
    levels = []
    for child_ptr in reversed(tree.child_ptr):
        levels.append((np.searchsorted(docs, np.arange(ptr.size)).astype(np.int64), nodes))
        docs, nodes = _unique(docs, np.searchsorted(child_ptr, nodes, side="right").astype(np.int64) - 1)
    every = np.arange(ptr.size, dtype=np.int64)  # documents without labels start at the root as well
    return [(every, np.zeros(ptr.size - 1, np.int64)), *reversed(levels)]


def _unique(docs: I64, nodes: I64) -> tuple[I64, I64]:
    """Pairs by document, then node, each once."""
    order = np.lexsort((nodes, docs))
    docs, nodes = docs[order], nodes[order]
    new = np.ones(docs.size, bool)
    new[1:] = (np.diff(docs) != 0) | (np.diff(nodes) != 0)
    return docs[new], nodes[new]


def _merge_slots(
    wanted: sp.csr_matrix, leaves: Ragged, scores: NDArray[np.float32], tree: LabelTree, merge: str
) -> NDArray[np.float32]:
    """Of each stored label of ``wanted`` the largest or the mean score of its slots."""
    docs = np.repeat(np.arange(leaves[0].size - 1), np.diff(leaves[0]))
    keys = docs * tree.num_labels + tree.labels[leaves[1]]
    rows = np.repeat(np.arange(wanted.shape[0]), np.diff(wanted.indptr))
    place = np.searchsorted(rows * tree.num_labels + wanted.indices, keys)
    if merge == "mean":  # added up in the order of the slots, as a beam search does
        totals = np.bincount(place, scores.astype(np.float64), minlength=wanted.nnz)
        mean: NDArray[np.float32] = (totals / np.bincount(place, minlength=wanted.nnz)).astype(np.float32)
        return mean
    best = np.full(wanted.nnz, -np.inf, np.float32)
    np.maximum.at(best, place, scores)
    return best
