"""Beam search down a label tree of linear rankers: the few best nodes a level, then labels.

Documents are taken in blocks.  In a block the (document, cluster) pairs of a level are
scored cluster after cluster, so that a cluster's weights are in cache for all its
documents; then every document keeps its best.  Memory is a block's scores for each
thread, never documents x nodes.

A document's scores do not depend on the block, the thread or the part of the weights it
meets.  Ties go to the smaller id.

Source: Yu et al., PECOS (arXiv:2010.05878), inference.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.inference.postprocess import PostProcessor
from xmcdist.inference.steps import (
    Block,
    Rows,
    Step,
    Tables,
    block_size,
    check_width,
    each,
    join_rows,
    most_scores,
    root_rows,
    row_span,
    search_steps,
    start_rows,
    to_csr,
    widest_row,
)
from xmcdist.rankers.model import LinearTree
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.features import Features

__all__ = ["Search", "beam_search", "predict_level", "top_k_arrays"]

_KEPT = 16  # prepared searches of a model


class Search:
    """A prepared search: what does not depend on the documents is done once.

    `beam_search` prepares one for each of its settings and keeps it with the model, so a
    program need not.  It may be used by several threads at once.

    Args:
        model: with the other arguments as of `beam_search`.

    Raises:
        ValueError: settings do not fit the model.
    """

    def __init__(
        self,
        model: LinearTree,
        beam: int,
        topk: int,
        post_processor: str | None = None,
        last_post_processor: str | None = None,
        upto_level: int | None = None,
    ) -> None:
        if not model.is_whole:
            raise ValueError("this is one rank's part of a model: search it with beam_search_sharded")
        self.steps = search_steps(model, beam, topk, post_processor, last_post_processor, upto_level)
        self.tree, self.first_level = model.tree, model.first_level
        last, tree = model.first_level + len(self.steps) - 1, model.tree
        self.columns = tree.num_labels if last == tree.depth else tree.level_size(last)
        self._tables, self._most = Tables.of(self.steps), most_scores(self.steps, 1)
        self._root = root_rows(1, self.steps[0].post)

    def __call__(
        self, features: Features, threads: int | None = None, start: sp.csr_matrix | None = None
    ) -> sp.csr_matrix:
        """The best labels of every document, as `beam_search` gives them."""
        return to_csr(self.rows(features, threads, start), self.columns)

    def rows(self, features: Features, threads: int | None = None, start: sp.csr_matrix | None = None) -> Rows:
        """The same as arrays: where the labels of each document begin, labels, scores."""
        check_width(self.steps, features)
        n = features.num_rows
        if start is None and n == 1 and self.first_level == 1:
            return Block(features).descend(self._tables, self._root)
        rows = start_rows(self.tree, self.first_level, start, n, self.steps[0].post)
        most = self._most if start is None else most_scores(self.steps, widest_row(rows))
        return _search(self._tables, features, rows, threads, most)


_SEARCHES: WeakKeyDictionary[LinearTree, dict[tuple[Any, ...], Search]] = WeakKeyDictionary()


def prepared(model: LinearTree, *settings: Any) -> Search:
    """The model's search with these settings, made once."""
    kept = _SEARCHES.setdefault(model, {})
    search = kept.get(settings)
    if search is None:
        if len(kept) >= _KEPT:
            kept.clear()
        search = kept[settings] = Search(model, *settings)
    return search


def beam_search(
    model: LinearTree,
    features: Features,
    *,
    beam: int,
    topk: int,
    post_processor: str | None = None,
    last_post_processor: str | None = None,
    upto_level: int | None = None,
    start: sp.csr_matrix | None = None,
    threads: int | None = None,
) -> sp.csr_matrix:
    """The best labels of every document.

    Args:
        model: tree and rankers.
        features: of N documents, as wide as the model; a document without any is scored by
            the bias terms.
        beam: nodes kept a level.
        topk: most labels a document.
        post_processor: of the inner levels; default the model's.
        last_post_processor: of the tree's last level; default the model's when
            ``post_processor`` is not given either, else the same as ``post_processor``.
        upto_level: stop at this level (1..T) and give its ``topk`` nodes.
        start: ``[N, K]`` of the level above the model's first, where the search begins: stored
            entries, 0 included, are the nodes, their values the scores that those of the
            children are combined with.  None: the root.
        threads: default numba's.

    Returns:
        ``[N, L]`` CSR float32 (``[N, K_t]`` when stopped before the last level), at most
        ``topk`` entries a row.  Scores of exactly 0 stay stored.

    Raises:
        ValueError: features or settings do not fit the model.

    Cost: a document and level, beam clusters times (its words found in the cluster times
    their weights, plus children times dense width).
    """
    return prepared(model, beam, topk, post_processor, last_post_processor, upto_level)(features, threads, start)


def predict_level(
    weights_t: LevelWeights,
    features: Features,
    parent_scores: sp.csr_matrix,
    child_ptr: NDArray[np.int64],
    beam: int,
    post_processor: str,
    *,
    threads: int | None = None,
) -> sp.csr_matrix:
    """One step of a search: from kept nodes of level t-1 to the best ``beam`` nodes of level t.

    Args:
        weights_t: of level t.
        features: of N documents.
        parent_scores: ``[N, K_{t-1}]``; stored entries, 0 included, are the kept nodes.
        child_ptr: ``[K_{t-1}+1]``.
        beam: nodes kept.
        post_processor: its name.

    Returns:
        ``[N, K_t]`` CSR float32, at most ``beam`` entries a row.
    """
    if parent_scores.shape != (features.num_rows, child_ptr.size - 1):
        raise ValueError(f"parent_scores is {parent_scores.shape}, must be {(features.num_rows, child_ptr.size - 1)}")
    if weights_t.num_nodes != child_ptr[-1]:
        raise ValueError(f"weights of {weights_t.num_nodes} nodes, the level has {child_ptr[-1]}")
    step = Step.of(weights_t, child_ptr, PostProcessor.named(post_processor), beam)
    check_width([step], features)
    start: Any = (parent_scores.indptr, parent_scores.indices, parent_scores.data)  # cast block by block
    most = most_scores([step], int(np.diff(parent_scores.indptr).max(initial=1)))
    return to_csr(_search(Tables.of([step]), features, start, threads, most), int(child_ptr[-1]))


def top_k_arrays(predictions: sp.csr_matrix, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The first k entries of every row by score, ties to the smaller id.

    Returns:
        scores ``[N, k]`` float32, descending, ``-inf`` where a row has fewer, and labels
        ``[N, k]`` int64, -1 there.
    """
    n = predictions.shape[0]
    lengths = np.diff(predictions.indptr)
    row = np.repeat(np.arange(n), lengths)
    order = np.lexsort((predictions.indices, -predictions.data, row))
    place = np.arange(order.size) - np.repeat(predictions.indptr[:-1], lengths)
    kept = place < k
    scores, labels = np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int64)
    scores[row[kept], place[kept]] = predictions.data[order[kept]]
    labels[row[kept], place[kept]] = predictions.indices[order[kept]]
    return scores, labels


def _search(tables: Tables, features: Features, start: Rows, threads: int | None, most: int) -> Rows:
    """Run all levels, block by block."""
    n = features.num_rows
    docs = block_size(most, n, threads)

    def run(a: int) -> Rows:
        b = min(a + docs, n)
        own = features if b - a == n else features.rows(a, b)
        return Block(own).descend(tables, row_span(start, a, b))

    return join_rows(each(run, range(0, n, docs), threads))
