"""Compiled inner loops of the beam search: ranker outputs of (document, cluster) pairs.

Trees and weights come as tables of whole numbers, among them addresses of arrays;
`xmcdist.inference.steps` makes the tables and keeps the arrays alive.  So one compiled
search serves any number of levels and parts, and a call hands over two tables instead of
dozens of arrays, which would take longer than the search for one document.

An output is the bias term, plus the dense products in the order of the columns, plus the
words in theirs: the same additions whatever the other documents and children are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from xmcdist.inference.keep_kernels import EVERY, MEAN, keep_best, keep_every, keep_given, keep_mean
from xmcdist.inference.native import pointer, prefetch, wide
from xmcdist.observability.compiling import njit

__all__ = ["LEVEL", "PART", "descend", "step_to"]

U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
Rows = tuple[I64, I64, F32]

# Columns of the table of levels and of the table of parts; ``_at``: an address.
LEVEL: tuple[str, ...] = ("child_ptr_at", "clusters", "ids_at", "num_ids", "keep", "kind", "power", "log")
LEVEL += ("first_part", "last_part", "merge")
PART: tuple[str, ...] = ("first_cluster", "clusters", "num_dense", "cluster_ptr_at", "chunk_node_at", "chunk_ptr_at")
PART += ("entry_start_at", "entry_offset_at", "feature_at", "child_at", "value_at", "dense_at", "bias_at")

_ENDLESS = 1 << 40  # length of an array known by its address only
_DIGIT = 11  # bits sorted at a time
_COUNT = 9  # bits for how many weights a feature has in a chunk: 1 to 256
_MOST_MAPPED = 1 << (32 - _COUNT)  # stored weights of a chunk beyond which it has no table


@njit(cache=True, nogil=True, fastmath={"contract"})
def _add_dense(x: F32, i: int, dense: NDArray[Any], at: int, count: int, scores: F32, out: int) -> None:
    """Add one document's dense products with the ``[d, count]`` matrix that starts at ``at``."""
    d = x.shape[1]
    c = 0
    while c + 4 <= d:
        x0, x1, x2, x3 = x[i, c], x[i, c + 1], x[i, c + 2], x[i, c + 3]
        a0 = np.uint64(at + c * count)
        a1, a2, a3 = a0 + np.uint64(count), a0 + np.uint64(2 * count), a0 + np.uint64(3 * count)
        for j in range(np.uint64(count)):
            total = scores[np.uint64(out) + j] + x0 * wide(dense[a0 + j])
            total = total + x1 * wide(dense[a1 + j])
            total = total + x2 * wide(dense[a2 + j])
            scores[np.uint64(out) + j] = total + x3 * wide(dense[a3 + j])
        c += 4
    while c < d:
        for j in range(np.uint64(count)):
            scores[np.uint64(out) + j] += x[i, c] * wide(dense[np.uint64(at + c * count) + j])
        c += 1


@njit(cache=True, nogil=True)
def _add_words(
    words: U32,
    weights: F32,
    begin: int,
    end: int,
    lo: np.uint64,
    hi: np.uint64,
    feature: U32,
    entry_start: I64,
    entry_offset: NDArray[np.uint16],
    child: NDArray[np.uint8],
    value: NDArray[Any],
    places: U32,
    scores: F32,
    out: int,
) -> None:
    """Add a document's words ``[begin, end)`` to its outputs for a chunk of features ``[lo, hi)``, found by halving.

    All words are halved in step: none waits for another's memory.
    """
    one, eight = np.uint64(1), np.uint64(8)
    first_word, num_words = np.uint64(begin), np.uint64(end - begin)
    if lo == hi:
        return
    for e in range(num_words):
        places[e] = 0
    left = hi - lo
    while left > one:
        half = left >> one
        before = lo + half - one
        for e in range(num_words):
            places[e] += half * np.uint64(feature[before + np.uint64(places[e])] < words[first_word + e])
        left -= half
    for e in range(num_words):
        at = lo + np.uint64(places[e])
        if feature[at] == words[first_word + e]:
            first = np.uint64(entry_start[at >> eight]) + np.uint64(entry_offset[at])
            prefetch(child, first)
            prefetch(value, first)
    for e in range(num_words):
        at = lo + np.uint64(places[e])
        if feature[at] != words[first_word + e]:
            continue
        first = np.uint64(entry_start[at >> eight]) + np.uint64(entry_offset[at])
        last = np.uint64(entry_start[(at + one) >> eight]) + np.uint64(entry_offset[at + one])
        for w in range(first, last):
            scores[np.uint64(out) + np.uint64(child[w])] += weights[first_word + e] * wide(value[w])


@njit(cache=True, nogil=True)
def _add_mapped(
    words: U32,
    weights: F32,
    begin: int,
    end: int,
    where: U32,
    origin: np.uint64,
    child: NDArray[np.uint8],
    value: NDArray[Any],
    scores: F32,
    out: int,
) -> None:
    """The same where a table tells the place of each feature's weights, counted from ``origin``."""
    for e in range(np.uint64(begin), np.uint64(end)):
        entry = np.uint64(where[words[e]])
        first = origin + (entry >> np.uint64(_COUNT))
        for w in range(first, first + (entry & np.uint64((1 << _COUNT) - 1))):
            scores[np.uint64(out) + np.uint64(child[w])] += weights[e] * wide(value[w])


@njit(cache=True, nogil=True)
def _score_part(
    part: I64,
    child_ptr: I64,
    like: NDArray[Any],
    like_dense: NDArray[Any],
    x_ptr: I64,
    x_idx: U32,
    x_val: F32,
    x_dense: F32,
    docs: I64,
    clusters: I64,
    outs: I64,
    where: U32,
    places: U32,
    scores: F32,
) -> None:
    """Outputs of the pairs' children that lie in one part; see `_score_level`."""
    first_cluster, num_clusters, d = part[0], part[1], part[2]
    cluster_ptr = carray(pointer(part[3], np.int64), (_ENDLESS,))
    chunk_node = carray(pointer(part[4], np.int64), (_ENDLESS,))
    chunk_ptr = carray(pointer(part[5], np.int64), (_ENDLESS,))
    entry_start = carray(pointer(part[6], np.int64), (_ENDLESS,))
    entry_offset = carray(pointer(part[7], np.uint16), (_ENDLESS,))
    feature = carray(pointer(part[8], np.uint32), (_ENDLESS,))
    child = carray(pointer(part[9], np.uint8), (_ENDLESS,))
    value = carray(pointer(part[10], like), (_ENDLESS,))
    dense = carray(pointer(part[11], like_dense), (_ENDLESS,))
    bias = carray(pointer(part[12], np.float32), (_ENDLESS,))
    one, eight = np.uint64(1), np.uint64(8)
    k: Any = np.int64(0)
    while k < clusters.size and clusters[k] < first_cluster:
        k += 1
    while k < clusters.size and clusters[k] < first_cluster + num_clusters:
        p = clusters[k]
        stop = k
        num_words: Any = np.int64(0)
        while stop < clusters.size and clusters[stop] == p:
            num_words += x_ptr[docs[stop] + 1] - x_ptr[docs[stop]]
            stop += 1
        for b in range(cluster_ptr[p - first_cluster], cluster_ptr[p - first_cluster + 1]):
            lo, hi = np.uint64(chunk_ptr[b]), np.uint64(chunk_ptr[b + 1])
            first, count = chunk_node[b], chunk_node[b + 1] - chunk_node[b]
            row = first - chunk_node[0]
            origin = np.uint64(entry_start[lo >> eight]) + np.uint64(entry_offset[lo])
            stored = np.uint64(entry_start[hi >> eight]) + np.uint64(entry_offset[hi]) - origin
            entries = np.float64(hi - lo)
            mapped = where.size > 0 and num_words * (4.0 + np.log2(entries + 1.0)) > 3.0 * entries
            mapped = mapped and stored < _MOST_MAPPED
            if mapped:
                begin = origin
                for f in range(lo, hi):
                    end = np.uint64(entry_start[(f + one) >> eight]) + np.uint64(entry_offset[f + one])
                    where[feature[f]] = ((begin - origin) << np.uint64(_COUNT)) | (end - begin)
                    begin = end
            for q in range(k, stop):
                i = docs[q]
                out = outs[q] + first - child_ptr[p]
                for j in range(count):
                    scores[out + j] = bias[row + j]
                _add_dense(x_dense, i, dense, row * d, count, scores, out)
                if mapped:
                    _add_mapped(x_idx, x_val, x_ptr[i], x_ptr[i + 1], where, origin, child, value, scores, out)
                else:
                    _add_words(
                        x_idx,
                        x_val,
                        x_ptr[i],
                        x_ptr[i + 1],
                        lo,
                        hi,
                        feature,
                        entry_start,
                        entry_offset,
                        child,
                        value,
                        places,
                        scores,
                        out,
                    )
            if mapped:
                for f in range(lo, hi):
                    where[feature[f]] = 0
        k = stop


@njit(cache=True, nogil=True)
def _by_cluster(ptr: I64, ids: I64, outs: I64, num_clusters: int) -> tuple[I64, I64, I64]:
    """Pairs in cluster order, in a cluster in document order: documents, clusters, places of their outputs."""
    n = ids.size
    docs, order, other = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    for i in range(ptr.size - 1):
        for r in range(ptr[i], ptr[i + 1]):
            docs[r], order[r] = i, r
    if ptr.size == 2:  # one document: clusters ascend
        return docs, ids, outs
    starts = np.empty((1 << _DIGIT) + 1, np.int64)
    shift: Any = np.int64(0)  # a plain 0 is a type of its own, and all would be compiled once more
    while (num_clusters - 1) >> shift > 0:
        starts[:] = 0
        for r in range(n):
            starts[((ids[r] >> shift) & ((1 << _DIGIT) - 1)) + 1] += 1
        for digit in range(1 << _DIGIT):
            starts[digit + 1] += starts[digit]
        for k in range(n):
            digit = (ids[order[k]] >> shift) & ((1 << _DIGIT) - 1)
            other[starts[digit]] = order[k]
            starts[digit] += 1
        order, other = other, order
        shift += _DIGIT
    clusters, places = np.empty(n, np.int64), other
    sorted_docs = np.empty(n, np.int64)
    for k in range(n):
        r = order[k]
        sorted_docs[k], clusters[k], places[k] = docs[r], ids[r], outs[r]
    return sorted_docs, clusters, places


@njit(cache=True, nogil=True)
def _score_level(
    level: I64,
    parts: I64,
    like: NDArray[Any],
    like_dense: NDArray[Any],
    x_ptr: I64,
    x_idx: U32,
    x_val: F32,
    x_dense: F32,
    where: U32,
    ptr: I64,
    ids: I64,
) -> tuple[I64, F32]:
    """Outputs of the children of each document's nodes: where each node's begin, and all of them.

    ``where`` is ``[D]`` zeros on entry and exit, or empty.  It is filled for a chunk with many
    words, so that these need not search the chunk's features.
    """
    child_ptr = carray(pointer(level[0], np.int64), (_ENDLESS,))
    outs = np.empty(ids.size + 1, np.int64)
    outs[0] = 0
    for r in range(ids.size):
        outs[r + 1] = outs[r] + child_ptr[ids[r] + 1] - child_ptr[ids[r]]
    scores = np.empty(outs[-1], np.float32)
    docs, clusters, starts = _by_cluster(ptr, ids, outs[:-1], level[1])
    most_words: Any = np.int64(0)
    for i in range(x_ptr.size - 1):
        most_words = max(most_words, x_ptr[i + 1] - x_ptr[i])
    places = np.empty(most_words, np.uint32)
    for s in range(level[8], level[9]):
        _score_part(
            parts[s],
            child_ptr,
            like,
            like_dense,
            x_ptr,
            x_idx,
            x_val,
            x_dense,
            docs,
            clusters,
            starts,
            where,
            places,
            scores,
        )
    return outs, scores


@njit(cache=True, nogil=True)
def descend(
    levels: I64,
    parts: I64,
    like: NDArray[Any],
    like_dense: NDArray[Any],
    x_ptr: I64,
    x_idx: U32,
    x_val: F32,
    x_dense: F32,
    where: U32,
    ptr: I64,
    ids: I64,
    scores: F32,
) -> Rows:
    """The best nodes of the last of some levels for every document, from its nodes above the first.

    Args:
        levels: a row a level, columns `LEVEL`.
        parts: a row a part, columns `PART`.
        like: empty, of the type of the sparse weights: float32, or uint16 for the bits of float16.
        like_dense: the same of the dense weights.
        x_ptr: ``[n+1]``; with ``x_idx`` and ``x_val`` the sparse features.
        x_dense: ``[n, d]``.
        where: ``[D]`` zeros, left so; or empty.
        ptr: ``[n+1]``; with ``ids``, ascending in a document, and ``scores`` the nodes to start from.
    """
    for t in range(levels.shape[0]):
        level = levels[t]
        outs, raw = _score_level(level, parts, like, like_dense, x_ptr, x_idx, x_val, x_dense, where, ptr, ids)
        child_ptr = carray(pointer(level[0], np.int64), (_ENDLESS,))
        labels = carray(pointer(level[2], np.int64), (level[3],))
        settings = (level[4], level[5], level[6], level[7])
        if labels.size and level[10] == MEAN:
            ptr, ids, scores = keep_mean(ptr, ids, scores, outs, child_ptr, raw, labels, settings)
        elif level[10] == EVERY:
            ptr, ids, scores = keep_every(ptr, ids, scores, outs, child_ptr, raw, settings)
        else:
            ptr, ids, scores = keep_best(ptr, ids, scores, outs, child_ptr, raw, labels, settings)
    return ptr, ids, scores


@njit(cache=True, nogil=True)
def step_to(
    level: I64,
    parts: I64,
    like: NDArray[Any],
    like_dense: NDArray[Any],
    x_ptr: I64,
    x_idx: U32,
    x_val: F32,
    x_dense: F32,
    where: U32,
    ptr: I64,
    ids: I64,
    scores: F32,
    wanted_ptr: I64,
    wanted: I64,
) -> F32:
    """Scores of given nodes of one level, whose parents are all among ``ids``; both ascending in a document."""
    outs, raw = _score_level(level, parts, like, like_dense, x_ptr, x_idx, x_val, x_dense, where, ptr, ids)
    child_ptr = carray(pointer(level[0], np.int64), (_ENDLESS,))
    settings = (level[4], level[5], level[6], level[7])
    found: F32 = keep_given(ptr, ids, scores, outs, child_ptr, raw, settings, wanted_ptr, wanted)
    return found
