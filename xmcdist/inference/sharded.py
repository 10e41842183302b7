"""Beam search with the labels shared out over ranks: for models larger than one machine's memory.

Every rank holds a contiguous range of each level's nodes (`LinearTree.part`) and brings
documents of its own.  Blocks of documents meet on all ranks; at each level a rank scores
the children it owns of the kept clusters; a document's candidates go to the rank that
brought it, which keeps the best; and the kept nodes go to all ranks for the next level.
Weights never travel.

A pair's score does not depend on who computes it, and ties go to the smaller id: the
answers are those of `xmcdist.inference.beam.beam_search` on one process, bit for bit.

Letters: W ranks, n documents of a block, D sparse and d dense features, k kept nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from xmcdist.inference.keep_kernels import EVERY, MEAN
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
from xmcdist.parallel.collectives import all_gather_ragged, gather_objects
from xmcdist.parallel.exchange import gather_csr, merge_rows
from xmcdist.rankers.model import LinearTree
from xmcdist.sparse.features import Features

__all__ = ["beam_search_sharded"]


def beam_search_sharded(
    model: LinearTree,
    features: Features,
    *,
    beam: int,
    topk: int,
    post_processor: str | None = None,
    last_post_processor: str | None = None,
    upto_level: int | None = None,
    start: sp.csr_matrix | None = None,
    block: int = 1024,
    threads: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> sp.csr_matrix:
    """The best labels of this rank's documents; collective.

    Args:
        model: this rank's part, ``whole.part(rank, world_size)`` on every rank of the group.
        features: of this rank's N documents; N may differ between ranks and be 0.
        beam: with ``topk``, ``post_processor``, ``last_post_processor``, ``upto_level`` and
            ``threads`` as in `xmcdist.inference.beam.beam_search`; equal on all ranks.
        start: as in `beam_search`, of the own documents; on all ranks or on none.
        block: most documents a rank brings at a time; equal on all ranks.  All ranks take
            as many blocks as the one with most documents.

    Returns:
        ``[N, L]`` CSR float32 of the own documents (``[N, K_t]`` when stopped before the last
        level), at most ``topk`` entries a row.

    Raises:
        ValueError: features or settings do not fit the model.

    Cost: a rank's share of the scores.  Memory: W blocks' features.  Traffic: of a block its
    features once, and at each level ``W k`` (id, score) pairs a document twice; at the last level
    all scored slots once, where a label counts by the mean of several.
    """
    steps = search_steps(model, beam, topk, post_processor, last_post_processor, upto_level)
    check_width(steps, features)
    tree, last = model.tree, model.first_level + len(steps) - 1
    copies = int(np.bincount(tree.labels).max()) if last == tree.depth else 1
    n = features.num_rows
    above = start_rows(tree, model.first_level, start, n, steps[0].post)
    counts = gather_objects(n, group)
    done = []
    for first in range(0, max(counts), block):
        sizes = [min(max(c - first, 0), block) for c in counts]
        a, b = min(first, n), min(first + block, n)
        rows = _gather_rows(row_span(above, a, b), group) if start is not None else root_rows(sum(sizes), steps[0].post)
        done.append(_descend(steps, _gather(features.rows(a, b), group), rows, sizes, copies, threads, group))
    return to_csr(join_rows(done) if done else join_rows([(np.zeros(1, np.int64), *_nothing())]), _columns(model, last))


def _columns(model: LinearTree, last: int) -> int:
    return model.tree.num_labels if last == model.tree.depth else model.tree.level_size(last)


def _nothing() -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.zeros(0, np.int64), np.zeros(0, np.float32)


def _descend(
    steps: Sequence[Step],
    features: Features,
    rows: Rows,
    sizes: list[int],
    copies: int,
    threads: int | None,
    group: Any,
) -> Rows:
    """One block of every rank, ``features`` of them all, from their nodes down; the own documents' best.

    Args:
        rows: of the level above the first, of them all.
        sizes: documents of each rank, ``[W]``.
        copies: most nodes of the last level that stand for one label.
    """
    n = features.num_rows
    docs = block_size(most_scores(steps, widest_row(rows)), n, threads)
    starts = range(0, n, docs)
    blocks = {a: Block(features.rows(a, min(a + docs, n))) for a in starts}
    for level, step in enumerate(steps, start=1):
        above = rows
        mean = level == len(steps) and step.merge == MEAN and copies > 1
        tables = Tables.of([replace(step, merge=EVERY) if mean else step])

        def score(a: int, tables: Tables = tables, above: Rows = above) -> Rows:
            return blocks[a].descend(tables, row_span(above, a, min(a + docs, n)))

        found = join_rows(each(score, starts, threads)) if n else above
        if level < len(steps):
            rows = _gather_rows(merge_rows(found, sizes, step.keep, group), group)
        elif mean:  # a label's scores are added up in the order of its slots, whoever found them
            rows = _mean(merge_rows(found, sizes, step.ids.size, group), step.ids, step.keep)
        elif copies == 1:
            rows = merge_rows(found, sizes, step.keep, group)
        else:  # a label may come from several ranks: enough that k different ones are left
            rows = _once(merge_rows(found, sizes, step.keep * min(copies, len(sizes)), group), step.keep)
    return rows


def _once(rows: Rows, k: int) -> Rows:
    """Every label once with its best score, and of these the best k a document."""
    ptr, ids, scores = rows
    docs = np.repeat(np.arange(ptr.size - 1), np.diff(ptr))
    order = np.lexsort((-scores, ids, docs))
    repeated = (np.diff(docs[order]) == 0) & (np.diff(ids[order]) == 0)
    order = order[np.concatenate([np.ones(min(order.size, 1), bool), ~repeated])]
    order = order[np.lexsort((ids[order], -scores[order], docs[order]))]
    docs = docs[order]
    kept = np.arange(docs.size) - np.searchsorted(docs, docs) < k
    order, docs = order[kept], docs[kept]
    by_id = np.lexsort((ids[order], docs))
    lengths = np.bincount(docs, minlength=ptr.size - 1)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), ids[order[by_id]], scores[order[by_id]]


def _mean(rows: Rows, labels: NDArray[np.int64], k: int) -> Rows:
    """From scores of slots, ascending in a document, to the mean score of each label; the best k of these."""
    ptr, slots, scores = rows
    docs = np.repeat(np.arange(ptr.size - 1), np.diff(ptr))
    order = np.lexsort((slots, labels[slots], docs))
    docs, ids, scores = docs[order], labels[slots[order]], scores[order]
    first = np.ones(docs.size, bool)
    first[1:] = (np.diff(docs) != 0) | (np.diff(ids) != 0)
    place = np.cumsum(first) - 1
    mean = (np.bincount(place, scores.astype(np.float64)) / np.bincount(place)).astype(np.float32)
    lengths = np.bincount(docs[first], minlength=ptr.size - 1)
    return _once((np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), ids[first], mean), k)


def _gather(own: Features, group: Any) -> Features:
    """Every rank's documents, in rank order."""
    sparse = None if own.sparse is None else gather_csr(_in_memory(own.sparse), group)
    if own.dense is None:
        return Features(sparse, None)
    return Features(sparse, np.concatenate(_gather_arrays(own.dense, group)))


def _gather_rows(rows: Rows, group: Any) -> Rows:
    """Every rank's rows, in rank order."""
    lengths, ids, scores = (np.concatenate(_gather_arrays(a, group)) for a in (np.diff(rows[0]), rows[1], rows[2]))
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), ids, scores


def _gather_arrays(a: NDArray[Any], group: Any) -> list[NDArray[Any]]:
    return [part.numpy() for part in all_gather_ragged(torch.from_numpy(np.array(a)), group)]


def _in_memory(A: sp.csr_matrix) -> sp.csr_matrix:
    """A copy of rows that may be views of a file, since torch takes no read-only array."""
    out = sp.csr_matrix((np.array(A.data), np.array(A.indices), np.array(A.indptr)), shape=A.shape)
    out.has_sorted_indices = True
    return out
