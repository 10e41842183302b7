"""Compiled loops that halve a list of labels by their scores.

The lower half is found without sorting: scores are counted into bins of equal width, and only
those of the bin that holds the middle are looked at again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit

__all__ = ["LEFT", "RIGHT", "lower_half", "rearrange"]

U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

_FINITE = {"nnan", "ninf", "nsz"}
LEFT, RIGHT = np.uint8(0), np.uint8(1)
_FEW = 128  # scores that are selected from without bins
_BINS = 512


@njit(nogil=True)
def _select(values: F32, n: int, k: int) -> Any:
    """The k-th smallest of the first n values, k from 0; values are reordered.  Hoare's find."""
    low, high = 0, n - 1
    while low < high:
        a, b, c = values[low], values[(low + high) >> 1], values[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while pivot < values[j]:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if j < k:
            low = i
        if k < i:
            high = j
    return values[k]


@njit(nogil=True, fastmath=_FINITE)
def _kth_smallest(scores: F32, k: int, work: F32) -> Any:
    """The k-th smallest score, k from 0: equal bins first, then among those of its bin."""
    n = scores.shape[0]
    if n <= _FEW:
        work[:n] = scores
        return _select(work, n, k)
    low = high = scores[0]
    for i in range(n):
        low, high = min(low, scores[i]), max(high, scores[i])
    if high - low < np.float32(1e-30):  # no room for bins
        work[:n] = scores
        return _select(work, n, k)
    scale = np.float32(_BINS) / (high - low)
    counts = np.zeros(_BINS + 1, dtype=np.int32)
    for i in range(n):
        counts[np.uint32((scores[i] - low) * scale)] += 1
    chosen = np.uint32(0)
    while k >= counts[chosen]:
        k -= counts[chosen]
        chosen += np.uint32(1)
    found = np.int64(0)  # typed: a literal 0 would be another signature of _select
    for i in range(n):
        work[found] = scores[i]
        found += np.uint32((scores[i] - low) * scale) == chosen
    return _select(work, found, k)


@njit(nogil=True)
def lower_half(scores: F32, side: U8, work: F32) -> None:
    """``side`` becomes LEFT for the n // 2 lowest scores, ties by position; RIGHT for the others.

    ``work`` is scratch, ``[n + 1]``.
    """
    n = scores.shape[0]
    half = n // 2
    middle = _kth_smallest(scores, half - 1, work)
    ties = half
    for i in range(n):
        ties -= scores[i] < middle
        side[i] = scores[i] >= middle
    i = 0
    while ties > 0:
        if scores[i] == middle:
            side[i] = LEFT
            ties -= 1
        i += 1


@njit(nogil=True)
def rearrange(members: U32, side: U8, work: U32) -> None:
    """Left members first, then right ones, each in the order they had; ``work`` is scratch, ``[n + 1]``."""
    left = right = 0
    for i in range(members.shape[0]):
        member = members[i]
        members[left] = member
        work[right] = member
        right += side[i]
        left += 1 - side[i]
    members[left:] = work[:right]
