"""Compiled inner loops of the beam search: score pairs, keep the best."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["HINGE", "NOOP", "SIGMOID", "keep_best", "score_pairs"]

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

NOOP, SIGMOID, HINGE = 0, 1, 2


@njit(cache=True, nogil=True)
def _add_words(
    words: U32,
    weights: F32,
    lo: np.uint64,
    hi: np.uint64,
    feature: U32,
    entry_ptr: U64,
    child: U32,
    value: F32,
    mapped: bool,
    where: U32,
    out: F32,
) -> None:
    """Add one document's words to its outputs for one cluster, whose features are ``feature[lo:hi]``."""
    one = np.uint64(1)
    at = lo
    for e in range(words.size):
        f = words[e]
        if mapped:
            if where[f] == 0:
                continue
            at = lo + np.uint64(where[f]) - one
        else:
            end = hi
            while at < end:
                middle = (at + end) >> one
                if feature[middle] < f:
                    at = middle + one
                else:
                    end = middle
            if at >= hi:
                break
            if feature[at] != f:
                continue
        for w in range(entry_ptr[at] - entry_ptr[0], entry_ptr[at + one] - entry_ptr[0]):
            out[child[w]] += weights[e] * value[w]


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def score_pairs(
    x_ptr: U64,
    x_idx: U32,
    x_val: F32,
    x_dense: F32,
    docs: I64,
    clusters: I64,
    outs: I64,
    child_ptr: I64,
    first_cluster: int,
    first_node: int,
    chunk_ptr: U64,
    feature: U32,
    entry_ptr: U64,
    child: U32,
    value: F32,
    dense: F32,
    bias: F32,
    where: U32,
    scores: F32,
) -> None:
    """Ranker outputs of the children of each (document, cluster) pair, as far as this part holds them.

    Pairs come in cluster order; pair k's children go to ``scores[outs[k]:]``.  ``where`` is
    ``[D]`` zeros on entry and exit: for a cluster with many pairs it holds the place of each
    feature plus one; with few pairs, places are found by halving.
    """
    k = np.searchsorted(clusters, first_cluster)
    one = np.uint64(1)
    while k < clusters.size and clusters[k] < first_cluster + chunk_ptr.size - 1:
        p = clusters[k]
        stop = k
        count_words = np.uint64(0)
        while stop < clusters.size and clusters[stop] == p:
            count_words += x_ptr[docs[stop] + 1] - x_ptr[docs[stop]]
            stop += 1
        lo, hi = chunk_ptr[p - first_cluster], chunk_ptr[p - first_cluster + 1]
        mapped = np.float64(count_words) * (4.0 + np.log2(np.float64(hi - lo) + 1.0)) > 3.0 * np.float64(hi - lo)
        if mapped:
            for f in range(lo, hi):
                where[feature[f]] = f - lo + one
        start = max(child_ptr[p], first_node)
        count = min(child_ptr[p + 1], first_node + bias.size) - start
        for q in range(k, stop):
            i = docs[q]
            out = scores[outs[q] + start - child_ptr[p] : outs[q] + start - child_ptr[p] + count]
            for j in range(count):
                total = bias[start - first_node + j]
                for c in range(x_dense.shape[1]):
                    total += x_dense[i, c] * dense[start - first_node + j, c]
                out[j] = total
            words = slice(x_ptr[i], x_ptr[i + 1])
            _add_words(x_idx[words], x_val[words], lo, hi, feature, entry_ptr, child, value, mapped, where, out)
        if mapped:
            for f in range(lo, hi):
                where[feature[f]] = 0
        k = stop


@njit(cache=True, nogil=True)
def _final(output: float, parent: float, kind: int, power: int, log: bool) -> float:
    """Score of a node from its ranker's output and its parent's score; see `PostProcessor`."""
    x = np.float64(output)
    if kind == NOOP:
        return x
    exponent = -(max(0.0, 1.0 - x) ** power)
    if kind == SIGMOID:
        exponent = min(x, 0.0) - math.log1p(math.exp(-abs(x)))
    return exponent + parent if log else math.exp(exponent) * parent


@njit(cache=True, nogil=True)
def keep_best(
    parent_ptr: I64,
    parents: I64,
    parent_scores: F32,
    outs: I64,
    child_ptr: I64,
    scores: F32,
    ids: I64,
    k: int,
    kind: int,
    power: int,
    log: bool,
) -> tuple[I64, I64, F32]:
    """Final scores, and the best k of every document: ids ascending within its row.

    ``ids`` maps nodes to labels, where the better of a label's nodes counts; empty: nodes
    stand for themselves.
    """
    n = parent_ptr.size - 1
    counts, best_ids, best = np.zeros(n + 1, np.int64), np.empty((n, k), np.int64), np.empty((n, k), np.float32)
    for i in range(n):
        kept = 0
        for r in range(parent_ptr[i], parent_ptr[i + 1]):
            p, parent = parents[r], parent_scores[r]
            if kept == k and kind != NOOP and parent < best[i, k - 1]:
                continue  # a child never scores above its parent
            for j in range(child_ptr[p + 1] - child_ptr[p]):
                final = np.float32(_final(scores[outs[r] + j], parent, kind, power, log))
                node = child_ptr[p] + j
                label = ids[node] if ids.size else node
                if kept == k and (final < best[i, k - 1] or (final == best[i, k - 1] and label > best_ids[i, k - 1])):
                    continue
                if ids.size:
                    kept, better = _forget(best_ids[i], best[i], kept, label, final)
                    if not better:
                        continue
                kept = _insert(best_ids[i], best[i], kept, k, label, final)
        counts[i + 1] = kept
    out_ptr = np.cumsum(counts)
    out_ids, out = np.empty(out_ptr[n], np.int64), np.empty(out_ptr[n], np.float32)
    for i in range(n):
        order = np.argsort(best_ids[i, : counts[i + 1]])
        for j in range(order.size):
            out_ids[out_ptr[i] + j], out[out_ptr[i] + j] = best_ids[i, order[j]], best[i, order[j]]
    return out_ptr, out_ids, out


@njit(cache=True, nogil=True)
def _forget(best_ids: I64, best: F32, kept: int, label: int, score: np.float32) -> tuple[int, bool]:
    """Take a label off the list if it is there with a lower score; (length, whether to insert it)."""
    for j in range(kept):
        if best_ids[j] == label:
            if score <= best[j]:
                return kept, False
            for m in range(j, kept - 1):
                best_ids[m], best[m] = best_ids[m + 1], best[m + 1]
            return kept - 1, True
    return kept, True


@njit(cache=True, nogil=True)
def _insert(best_ids: I64, best: F32, kept: int, k: int, label: int, score: np.float32) -> int:
    """Put a label into a list sorted by score, then id; the last falls off a full list."""
    j = kept if kept < k else k - 1
    while j > 0 and (score > best[j - 1] or (score == best[j - 1] and label < best_ids[j - 1])):
        best_ids[j], best[j] = best_ids[j - 1], best[j - 1]
        j -= 1
    best_ids[j], best[j] = label, score
    return min(kept + 1, k)
