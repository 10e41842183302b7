"""Compiled loops of balanced 2-means: split one node's labels in two halves of like direction.

Letters: n labels of one node, D sparse and d dense features.  A direction and the two sums
are float64 work arrays over all D + d columns, dense ones last; of the sparse ones only
``touched`` columns, those the node's labels have, are cleared and used.  Nothing here
depends on the number of threads: every sum runs over rising label ids.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["bisect_nodes", "direction_between", "direction_of_sums", "lower_half", "move", "rearrange", "score_rows"]

I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# Sums may be reordered at compile time, so dot products use vector units.
_SUMS = {"reassoc", "contract", "nsz"}
LEFT, RIGHT, NONE = np.uint8(0), np.uint8(1), np.uint8(2)


@njit(cache=True, nogil=True, fastmath=_SUMS)
def score_rows(indptr: I64, indices: U32, data: F32, dense: F32, members: I64, direction: F64, scores: F64) -> None:
    """``scores[i] = <direction, row members[i]>``."""
    num_sparse = direction.shape[0] - dense.shape[1]
    for i in range(members.shape[0]):
        row = members[i]
        total = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            total += data[k] * direction[indices[k]]
        for j in range(dense.shape[1]):
            total += dense[row, j] * direction[num_sparse + j]
        scores[i] = total


@njit(cache=True, nogil=True)
def lower_half(scores: F64, side: U8) -> None:
    """``side`` becomes LEFT for the n // 2 lowest scores, ties by position; RIGHT for the others."""
    n = scores.shape[0]
    half = n // 2
    middle = np.partition(scores, half - 1)[half - 1]
    ties = half
    for i in range(n):
        ties -= scores[i] < middle
    for i in range(n):
        side[i] = RIGHT
        if scores[i] < middle:
            side[i] = LEFT
        elif scores[i] == middle and ties > 0:
            side[i] = LEFT
            ties -= 1


@njit(cache=True, nogil=True)
def move(indptr: I64, indices: U32, data: F32, dense: F32, members: I64, side: U8, new_side: U8, sums: F64) -> int:
    """Carry rows whose side changes over between ``sums`` ``[D + d, 2]``; ``side`` is brought up to date.

    Late iterations move few rows, so this costs far less than summing afresh.

    Returns:
        How many rows changed sides.
    """
    num_sparse = sums.shape[0] - dense.shape[1]
    changes = 0
    for i in range(members.shape[0]):
        old, new = side[i], new_side[i]
        if old == new:
            continue
        row = members[i]
        side[i] = new
        changes += 1
        for k in range(indptr[row], indptr[row + 1]):
            sums[indices[k], new] += data[k]
        for j in range(dense.shape[1]):
            sums[num_sparse + j, new] += dense[row, j]
        if old != NONE:
            for k in range(indptr[row], indptr[row + 1]):
                sums[indices[k], old] -= data[k]
            for j in range(dense.shape[1]):
                sums[num_sparse + j, old] -= dense[row, j]
    return changes


@njit(cache=True, nogil=True)
def direction_between(
    indptr: I64, indices: U32, data: F32, dense: F32, right: int, left: int, touched: U32, direction: F64
) -> None:
    """``direction = row right - row left``."""
    num_sparse = direction.shape[0] - dense.shape[1]
    for k in range(touched.shape[0]):
        direction[touched[k]] = 0.0
    for k in range(indptr[right], indptr[right + 1]):
        direction[indices[k]] = data[k]
    for k in range(indptr[left], indptr[left + 1]):
        direction[indices[k]] -= data[k]
    for j in range(dense.shape[1]):
        direction[num_sparse + j] = np.float64(dense[right, j]) - np.float64(dense[left, j])


@njit(cache=True, nogil=True)
def direction_of_sums(sums: F64, touched: U32, num_sparse: int, direction: F64) -> None:
    """``direction = right / ||right|| - left / ||left||``; a sum of length zero counts as zero."""
    left = right = 0.0
    for k in range(touched.shape[0]):
        left += sums[touched[k], 0] * sums[touched[k], 0]
        right += sums[touched[k], 1] * sums[touched[k], 1]
    for j in range(num_sparse, sums.shape[0]):
        left += sums[j, 0] * sums[j, 0]
        right += sums[j, 1] * sums[j, 1]
    left = 1.0 / np.sqrt(left) if left > 0 else 0.0
    right = 1.0 / np.sqrt(right) if right > 0 else 0.0
    for k in range(touched.shape[0]):
        direction[touched[k]] = sums[touched[k], 1] * right - sums[touched[k], 0] * left
    for j in range(num_sparse, sums.shape[0]):
        direction[j] = sums[j, 1] * right - sums[j, 0] * left


@njit(cache=True, nogil=True)
def halves(side: U8) -> None:
    """The first half goes left."""
    side[: side.shape[0] // 2] = LEFT
    side[side.shape[0] // 2 :] = RIGHT


@njit(cache=True, nogil=True)
def rearrange(members: I64, side: U8) -> None:
    """Left members first, then right ones, each in the order they had."""
    left = members[side == LEFT]
    members[left.shape[0] :] = members[side == RIGHT]
    members[: left.shape[0]] = left


@njit(cache=True, nogil=True)
def bisect_nodes(
    indptr: I64,
    indices: U32,
    data: F32,
    dense: F32,
    num_sparse: int,
    members: I64,
    node_ptr: I64,
    picks: I64,
    first: int,
    last: int,
    max_iter: int,
) -> None:
    """Bisect nodes ``first..last`` in place, one after the other.

    Args:
        indptr: with ``indices``, ``data`` and ``dense`` the label embeddings.
        indices: see ``indptr``.
        data: see ``indptr``.
        dense: see ``indptr``.
        num_sparse: D.
        members: label ids, those of node p at ``node_ptr[p]:node_ptr[p + 1]``; ties go by their order.
        node_ptr: see ``members``.
        picks: ``[nodes, 2]``, the members by position that iteration 0 starts from: right, left;
            twice the same: from the halves of the members as they stand.
        first: first node.
        last: one past the last node.
        max_iter: most iterations a node.
    """
    width = num_sparse + dense.shape[1]
    direction, sums = np.empty(width, dtype=np.float64), np.empty((width, 2), dtype=np.float64)
    seen, columns = np.full(num_sparse, -1, dtype=np.int64), np.empty(num_sparse, dtype=np.uint32)
    longest = 0
    for node in range(first, last):
        longest = max(longest, node_ptr[node + 1] - node_ptr[node])
    scores_, side_, new_ = np.empty(longest), np.empty(longest, dtype=np.uint8), np.empty(longest, dtype=np.uint8)
    for node in range(first, last):
        mine = members[node_ptr[node] : node_ptr[node + 1]]
        n = mine.shape[0]
        scores, side, new_side = scores_[:n], side_[:n], new_[:n]
        used = 0
        for i in range(n):
            for k in range(indptr[mine[i]], indptr[mine[i] + 1]):
                if seen[indices[k]] != node:
                    seen[indices[k]] = node
                    columns[used] = indices[k]
                    used += 1
        touched = columns[:used]
        for k in range(used):
            sums[touched[k], 0] = sums[touched[k], 1] = 0.0
        sums[num_sparse:] = 0.0
        side[:] = NONE
        right, left = picks[node]
        if right != left:
            direction_between(indptr, indices, data, dense, mine[right], mine[left], touched, direction)
        for iteration in range(max_iter):
            if iteration == 0 and right == left:
                halves(new_side)
            else:
                if iteration > 0:
                    direction_of_sums(sums, touched, num_sparse, direction)
                score_rows(indptr, indices, data, dense, mine, direction, scores)
                lower_half(scores, new_side)
            if move(indptr, indices, data, dense, mine, side, new_side, sums) == 0:
                break
        rearrange(mine, side)
