"""Compiled inner loops of the beam search: from ranker outputs to scores, and which nodes are kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit

__all__ = ["EVERY", "HINGE", "MAX", "MEAN", "NOOP", "SIGMOID", "keep_best", "keep_every", "keep_given", "keep_mean"]

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
Settings = tuple[int, int, int, int]  # how many are kept; kind, power and log of the post-processor

NOOP, SIGMOID, HINGE = 0, 1, 2

# How the scores of a label's nodes become one: the largest, or the mean of those whose cluster
# was kept; or every node goes on for itself, all of them, to be merged elsewhere.
MAX, MEAN, EVERY = 0, 1, 2


@njit(cache=True, nogil=True)
def _final(output: float, parent: float, kind: int, power: int, log: int) -> float:
    """Score of a node from its ranker's output and its parent's score; see `PostProcessor`."""
    x = np.float64(output)
    if kind == NOOP:
        return x
    exponent = 0.0
    if kind == SIGMOID:
        exponent = min(x, 0.0) - math.log1p(math.exp(-abs(x)))
    elif x < 1.0:
        gap = 1.0 - x
        exponent = -gap
        for _ in range(power - 1):
            exponent *= gap
    return exponent + parent if log else math.exp(exponent) * parent


@njit(cache=True, nogil=True)
def keep_best(
    parent_ptr: I64,
    parents: I64,
    parent_scores: F32,
    outs: I64,
    child_ptr: I64,
    outputs: F32,
    labels: I64,
    settings: Settings,
) -> tuple[I64, I64, F32]:
    """Final scores, and the best k of every document: ids ascending within its row.

    Args:
        parent_ptr: ``[n+1]``; with ``parents`` and ``parent_scores`` the nodes kept a level above.
        outs: ``[r+1]`` where the outputs of each parent's children begin.
        child_ptr: children of every node of the level above.
        outputs: of the rankers.
        labels: of the nodes, where the better of a label's nodes counts; empty: nodes stand
            for themselves.
        settings: k and the post-processor.
    """
    k, kind, power, log = settings
    n = parent_ptr.size - 1
    out_ptr = np.zeros(n + 1, np.int64)
    room = min(n * k, outputs.size)
    out_ids, out = np.empty(room, np.int64), np.empty(room, np.float32)
    best_ids, best = np.empty(k, np.int64), np.empty(k, np.float32)
    for i in range(n):
        kept: Any = np.int64(0)  # a plain 0 is a type of its own, and all would be compiled once more
        for r in range(parent_ptr[i], parent_ptr[i + 1]):
            p, parent = parents[r], parent_scores[r]
            if kept == k and kind != NOOP and parent < best[k - 1]:
                continue  # a child never scores above its parent
            hopeless = -np.inf  # children of a parent rank by their outputs: below this none is kept
            for j in range(child_ptr[p + 1] - child_ptr[p]):
                output = outputs[outs[r] + j]
                if output <= hopeless:
                    continue
                final = np.float32(_final(output, parent, kind, power, log))
                if kept == k and final < best[k - 1]:
                    hopeless = output
                    continue
                node = child_ptr[p] + j
                label = labels[node] if labels.size else node
                if kept == k and final == best[k - 1] and label > best_ids[k - 1]:
                    continue
                if labels.size:
                    kept, better = _forget(best_ids, best, kept, label, final)
                    if not better:
                        continue
                kept = _insert(best_ids, best, kept, k, label, final)
        _sort_by_id(best_ids, best, kept)
        start = out_ptr[i]
        for j in range(kept):
            out_ids[start + j], out[start + j] = best_ids[j], best[j]
        out_ptr[i + 1] = start + kept
    return out_ptr, out_ids[: out_ptr[n]], out[: out_ptr[n]]


@njit(cache=True, nogil=True)
def keep_mean(
    parent_ptr: I64,
    parents: I64,
    parent_scores: F32,
    outs: I64,
    child_ptr: I64,
    outputs: F32,
    labels: I64,
    settings: Settings,
) -> tuple[I64, I64, F32]:
    """`keep_best` where a label counts by the mean score of its nodes below the kept parents.

    A node that scores low may lower a label that scores high, so none is passed over.  A label's
    scores are added up in float64 in the order of its nodes.
    """
    k, kind, power, log = settings
    n = parent_ptr.size - 1
    out_ptr = np.zeros(n + 1, np.int64)
    room = min(n * k, outputs.size)
    out_ids, out = np.empty(room, np.int64), np.empty(room, np.float32)
    best_ids, best = np.empty(k, np.int64), np.empty(k, np.float32)
    most: Any = np.int64(0)
    for i in range(n):
        most = max(most, outs[parent_ptr[i + 1]] - outs[parent_ptr[i]])
    found, totals, copies = np.empty(most, np.int64), np.empty(most, np.float64), np.empty(most, np.int64)
    slots: Any = np.int64(4)  # of a hash table: where a label stands in ``found``
    while slots < 2 * most:
        slots *= 2
    table = np.empty(slots, np.int64)
    for i in range(n):
        slots = np.int64(4)
        while slots < 2 * (outs[parent_ptr[i + 1]] - outs[parent_ptr[i]]):
            slots *= 2
        table[:slots] = -1
        size: Any = np.int64(0)
        for r in range(parent_ptr[i], parent_ptr[i + 1]):
            p = parents[r]
            for j in range(child_ptr[p + 1] - child_ptr[p]):
                final = np.float32(_final(outputs[outs[r] + j], parent_scores[r], kind, power, log))
                label = labels[child_ptr[p] + j]
                at = (label * 2654435761) & (slots - 1)  # Knuth's multiplier; an empty place is always left
                while table[at] >= 0 and found[table[at]] != label:
                    at = (at + 1) & (slots - 1)
                if table[at] < 0:
                    table[at] = size
                    found[size], totals[size], copies[size] = label, 0.0, 0
                    size += 1
                totals[table[at]] += np.float64(final)
                copies[table[at]] += 1
        kept: Any = np.int64(0)
        for m in range(size):
            mean = np.float32(totals[m] / copies[m])
            if kept == k and (mean < best[k - 1] or (mean == best[k - 1] and found[m] > best_ids[k - 1])):
                continue
            kept = _insert(best_ids, best, kept, k, found[m], mean)
        _sort_by_id(best_ids, best, kept)
        start = out_ptr[i]
        for j in range(kept):
            out_ids[start + j], out[start + j] = best_ids[j], best[j]
        out_ptr[i + 1] = start + kept
    return out_ptr, out_ids[: out_ptr[n]], out[: out_ptr[n]]


@njit(cache=True, nogil=True)
def keep_every(
    parent_ptr: I64,
    parents: I64,
    parent_scores: F32,
    outs: I64,
    child_ptr: I64,
    outputs: F32,
    settings: Settings,
) -> tuple[I64, I64, F32]:
    """Final scores of all children of each document's parents: nodes ascending within its row."""
    _, kind, power, log = settings
    n = parent_ptr.size - 1
    out_ptr = np.empty(n + 1, np.int64)
    for i in range(n + 1):
        out_ptr[i] = outs[parent_ptr[i]]
    out_ids, out = np.empty(outputs.size, np.int64), np.empty(outputs.size, np.float32)
    for r in range(parents.size):
        p = parents[r]
        for j in range(child_ptr[p + 1] - child_ptr[p]):
            out_ids[outs[r] + j] = child_ptr[p] + j
            out[outs[r] + j] = np.float32(_final(outputs[outs[r] + j], parent_scores[r], kind, power, log))
    return out_ptr, out_ids, out


@njit(cache=True, nogil=True)
def keep_given(
    parent_ptr: I64,
    parents: I64,
    parent_scores: F32,
    outs: I64,
    child_ptr: I64,
    outputs: F32,
    settings: Settings,
    wanted_ptr: I64,
    wanted: I64,
) -> F32:
    """Final scores of given nodes; arguments as of `keep_best`.

    Args:
        wanted_ptr: ``[n+1]``; with ``wanted`` the nodes of each document, ascending, whose
            parents are all among its ``parents``.
    """
    _, kind, power, log = settings
    out = np.empty(wanted.size, np.float32)
    for i in range(wanted_ptr.size - 1):
        r = parent_ptr[i]
        for w in range(wanted_ptr[i], wanted_ptr[i + 1]):
            while child_ptr[parents[r] + 1] <= wanted[w]:
                r += 1
            output = outputs[outs[r] + wanted[w] - child_ptr[parents[r]]]
            out[w] = _final(output, parent_scores[r], kind, power, log)
    return out


@njit(cache=True, nogil=True)
def _sort_by_id(ids: I64, scores: F32, size: int) -> None:
    """Shell sort with Knuth's gaps: rows are short, and the library's sort takes seconds to compile."""
    gap: Any = np.int64(1)
    while gap < size // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for a in range(gap, size):
            node, score = ids[a], scores[a]
            b = a
            while b >= gap and ids[b - gap] > node:
                ids[b], scores[b] = ids[b - gap], scores[b - gap]
                b -= gap
            ids[b], scores[b] = node, score
        gap //= 3


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
