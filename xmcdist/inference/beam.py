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

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numba import get_num_threads
from numpy.typing import NDArray

from xmcdist.inference import beam_kernels as kernels
from xmcdist.inference.postprocess import PostProcessor
from xmcdist.rankers.model import LinearTree
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.features import Features

__all__ = ["beam_search", "predict_level", "top_k_arrays"]

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
Rows = tuple[I64, I64, F32]  # ragged rows: indptr, ids ascending in a row, scores

_BLOCK_SCORES = 1 << 21  # most scores of a block: 8 MB a thread
_BLOCK_DOCS = 2048
_KINDS = {"noop": kernels.NOOP, "sigmoid": kernels.SIGMOID, "hinge": kernels.HINGE}


@dataclass(frozen=True)
class _Step:
    """One level of a search: weights, the children of its clusters, and what is kept."""

    weights: LevelWeights
    child_ptr: I64
    post: PostProcessor
    keep: int
    ids: I64  # labels of the nodes, or empty

    def widest(self, beam: int) -> int:
        """Most scores one document can need here when it comes with ``beam`` clusters."""
        sizes = np.diff(self.child_ptr)
        return int(sizes.sum() if beam >= sizes.size else -np.partition(-sizes, beam)[:beam].sum())


class _Block:
    """Some documents on their way down."""

    def __init__(self, features: Features) -> None:
        n = features.num_rows
        X = features.sparse
        if X is None:
            X = sp.csr_matrix(np.zeros((n, 0), np.float32))
        self.ptr = X.indptr.astype(np.uint64)
        self.idx = _frozen(X.indices.view(np.uint32) if X.indices.dtype == np.int32 else X.indices.astype(np.uint32))
        self.val = _frozen(X.data.astype(np.float32, copy=False))
        dense = np.zeros((n, 0), np.float32) if features.dense is None else features.dense
        self.dense = _frozen(np.asarray(dense, np.float32))
        self.where = np.zeros(X.shape[1], np.uint32)

    def step(self, level: _Step, rows: Rows) -> Rows:
        """From the kept nodes of one level to those of the next."""
        ptr, ids, scores = rows
        sizes = level.child_ptr[ids + 1] - level.child_ptr[ids]
        outs = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        docs = np.repeat(np.arange(ptr.size - 1), np.diff(ptr))
        by_cluster = np.argsort(ids, kind="stable")
        docs, clusters, places = docs[by_cluster], ids[by_cluster], outs[by_cluster]
        raw = np.empty(outs[-1], np.float32)
        for p in level.weights.parts:
            kernels.score_pairs(
                self.ptr,
                self.idx,
                self.val,
                self.dense,
                docs,
                clusters,
                places,
                level.child_ptr,
                p.first_cluster,
                p.first_node,
                _frozen(p.chunk_ptr.view(np.uint64)),
                _frozen(p.feature),
                _frozen(p.entry_ptr.view(np.uint64)),
                _frozen(p.child),
                _frozen(p.value),
                _frozen(p.dense),
                _frozen(p.bias),
                self.where,
                raw,
            )
        post = level.post
        best: Rows = kernels.keep_best(
            ptr, ids, scores, outs, level.child_ptr, raw, level.ids, level.keep, _KINDS[post.kind], post.power, post.log
        )
        return best


def beam_search(
    model: LinearTree,
    features: Features,
    *,
    beam: int,
    topk: int,
    post_processor: str | None = None,
    last_post_processor: str | None = None,
    upto_level: int | None = None,
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
        threads: default numba's.

    Returns:
        ``[N, L]`` CSR float32 (``[N, K_t]`` when stopped before the last level), at most
        ``topk`` entries a row.  Scores of exactly 0 stay stored.

    Raises:
        ValueError: features or settings do not fit the model.

    Cost: a document and level, beam clusters times (its words found in the cluster times
    their weights, plus children times dense width).
    """
    depth = len(model.levels)
    last = depth if upto_level is None else upto_level
    if not 1 <= last <= depth:
        raise ValueError(f"upto_level ({upto_level}) must be in [1, {depth}]")
    name = post_processor or model.post_processor
    last_name = last_post_processor or (model.last_post_processor if post_processor is None else None) or name
    tree = model.tree
    steps = []
    for t in range(1, last + 1):
        is_leaf = t == tree.depth
        post = PostProcessor.named(last_name if is_leaf else name)
        ids = np.asarray(tree.labels, np.int64) if is_leaf else np.zeros(0, np.int64)
        keep = topk if t == last else beam
        steps.append(_step(model.levels[t - 1], tree.child_ptr[t - 1], post, keep, ids))
    n = features.num_rows
    root = sp.csr_matrix(
        (np.full(n, steps[0].post.root_score, np.float32), np.zeros(n, np.int32), np.arange(n + 1)), shape=(n, 1)
    )
    columns = tree.num_labels if last == tree.depth else tree.level_size(last)
    return _search(steps, features, root, columns, threads)


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
    step = _step(weights_t, child_ptr, PostProcessor.named(post_processor), beam, np.zeros(0, np.int64))
    return _search([step], features, parent_scores, int(child_ptr[-1]), threads)


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


def _step(level: LevelWeights, child_ptr: NDArray[np.int64], post: PostProcessor, keep: int, ids: I64) -> _Step:
    if keep < 1:
        raise ValueError(f"beam and topk must be at least 1, not {keep}")
    if level.first_node != 0 or level.num_nodes != child_ptr[-1]:
        raise ValueError(f"weights of {level.num_nodes} nodes from {level.first_node}, the level has {child_ptr[-1]}")
    return _Step(level, np.ascontiguousarray(child_ptr, np.int64), post, min(keep, level.num_nodes), ids)


def _search(
    steps: list[_Step], features: Features, start: sp.csr_matrix, columns: int, threads: int | None
) -> sp.csr_matrix:
    """Run all steps, block by block."""
    for level in (step.weights for step in steps):
        if (level.num_sparse, level.num_dense) != (features.num_sparse, features.num_dense):
            raise ValueError(
                f"documents have {features.num_sparse} sparse and {features.num_dense} dense features, "
                f"the rankers were trained on {level.num_sparse} and {level.num_dense}"
            )
    n = features.num_rows
    width = [int(np.diff(start.indptr).max(initial=1)), *(step.keep for step in steps[:-1])]
    most = max(step.widest(w) for step, w in zip(steps, width, strict=True))
    docs = max(min(_BLOCK_SCORES // max(most, 1), _BLOCK_DOCS), 1)

    def run(a: int) -> Rows:
        b = min(a + docs, n)
        block = _Block(features.rows(a, b))
        span = slice(start.indptr[a], start.indptr[b])
        rows = (
            (start.indptr[a : b + 1] - start.indptr[a]).astype(np.int64),
            start.indices[span].astype(np.int64),
            start.data[span].astype(np.float32),
        )
        for step in steps:
            rows = block.step(step, rows)
        return rows

    done = _each(run, range(0, n, docs), threads)
    lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(ptr) for ptr, _, _ in done)])
    ids = np.concatenate([np.zeros(0, np.int32), *(i.astype(np.int32) for _, i, _ in done)])
    scores = np.concatenate([np.zeros(0, np.float32), *(s for _, _, s in done)])
    return sp.csr_matrix((scores, ids, np.cumsum(lengths)), shape=(n, columns))


def _each(run: Callable[[int], Rows], starts: range, threads: int | None) -> list[Rows]:
    workers = min(max(threads or get_num_threads(), 1), len(starts))
    if workers <= 1:
        return [run(a) for a in starts]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, starts))


def _frozen(a: NDArray[Any]) -> NDArray[Any]:
    """A read-only view: arrays from memory and from files then compile to one kernel."""
    out = np.ascontiguousarray(a).view(np.ndarray)
    out.flags.writeable = False
    return out
