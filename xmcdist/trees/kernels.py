"""Compiled loops of balanced 2-means: split a node's labels in two halves of like direction.

Letters: n labels of one node, F columns in use by it and d dense ones, L labels in all.

* Label embeddings are CSR rows whose columns are renumbered as the tree goes down: row l has
  values ``data[indptr[l]:indptr[l + 1]]`` and their columns at ``columns[at[l]:]``.  A node
  with few values gets columns 0..F - 1 of its own, in order of first appearance, so that
  what it works on is short, without gaps, and in the cache.
* A work array has the F sparse columns first and then the d dense ones.
* Sums are whole numbers, `_ONE` for 1.0.  They are exact, so they are the same in whatever
  order, by whatever number of threads and with whatever rows carried over.  2**27 labels
  with 1.0 in the same column fit.
* Positions are unsigned: that spares the loops a branch for negative indices, and more than
  halves the time of a product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit
from xmcdist.trees.halving import LEFT, RIGHT, lower_half, rearrange

__all__ = [
    "add_rows",
    "bisect_subtree",
    "direction_between",
    "direction_of_sums",
    "move",
    "pack_columns",
    "pick_two",
    "score_rows",
]

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

# Sums may be reordered at compile time, so dot products use vector units.
_SUMS = {"reassoc", "contract", "nsz"}
_ONE = np.float32(2.0**36)
_U0, _U1 = np.uint64(0), np.uint64(1)


@njit(nogil=True)
def _mixed(x: np.uint64) -> np.uint64:
    """Splitmix64's mixing function (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(nogil=True)
def pick_two(seed: np.uint64, depth: int, node: int, size: int) -> tuple[np.int64, np.int64]:
    """Two different positions below ``size``; a function of the arguments alone."""
    step = np.uint64(0x9E3779B97F4A7C15)
    state = _mixed(seed + step)
    state = _mixed((state ^ np.uint64(depth)) + step)
    state = _mixed((state ^ np.uint64(node)) + step)
    right = np.int64(_mixed(state + step) % np.uint64(size))
    left = np.int64(_mixed(state + step + step) % np.uint64(size - 1))
    return right, left + (left >= right)


@njit(nogil=True)
def pack_columns(indptr: U64, indices: U32, members: U32, columns: U32, at: U64, where: U32, old: U32) -> Any:
    """Columns of the rows ``members``, one row after the other and renumbered, into ``columns``.

    Args:
        indptr: of the CSR.
        indices: of the CSR.
        members: rows.
        columns: room for all their values.
        at: ``[L]``; where a row begins in ``columns`` is noted there.
        where: ``[D]`` zeros; scratch.
        old: ``[D]``; scratch.

    Returns:
        F.
    """
    used, found = _U0, np.uint32(0)
    for i in range(members.shape[0]):
        row = members[i]
        at[row] = used
        for k in range(indptr[row], indptr[np.uint64(row) + _U1]):
            column = indices[k]
            place = where[column]
            if place == 0:
                old[found] = column
                found += np.uint32(1)
                place = found
                where[column] = place
            columns[used] = place - np.uint32(1)
            used += _U1
    for j in range(found):
        where[old[j]] = 0
    return np.int64(found)


@njit(nogil=True)
def _renumber(indptr: U64, at: U64, columns: U32, members: U32, where: U32, old: U32) -> Any:
    """`pack_columns` in place, for some of the rows that were packed."""
    found = np.uint32(0)
    for i in range(members.shape[0]):
        row = np.uint64(members[i])
        mine = columns[at[row] : at[row] + (indptr[row + _U1] - indptr[row])]
        for k in range(mine.shape[0]):
            place = where[mine[k]]
            if place == 0:
                old[found] = mine[k]
                found += np.uint32(1)
                place = found
                where[mine[k]] = place
            mine[k] = place - np.uint32(1)
    for j in range(found):
        where[old[j]] = 0
    return np.int64(found)


@njit(nogil=True)
def add_rows(
    indptr: U64, at: U64, columns: U32, data: F32, dense: F32, members: U32, num_columns: int, sums: I64
) -> None:
    """``sums += row`` for each of the members."""
    for i in range(members.shape[0]):
        row = np.uint64(members[i])
        values = data[indptr[row] : indptr[row + _U1]]
        mine = columns[at[row] : at[row] + np.uint64(values.shape[0])]
        for k in range(values.shape[0]):
            sums[mine[k]] += np.int64(values[k] * _ONE)
        rest = sums[num_columns : num_columns + dense.shape[1]]
        for j in range(dense.shape[1]):
            rest[j] += np.int64(dense[row, j] * _ONE)


@njit(nogil=True)
def move(
    indptr: U64,
    at: U64,
    columns: U32,
    data: F32,
    dense: F32,
    members: U32,
    num_columns: int,
    side: U8,
    new_side: U8,
    right: I64,
) -> int:
    """Carry rows whose side changes into or out of the sum of the right ones; ``side`` is brought up to date.

    Late iterations move few rows, so this costs far less than summing afresh.

    Returns:
        How many rows changed sides.
    """
    changes = 0
    rest = right[num_columns : num_columns + dense.shape[1]]
    for i in range(members.shape[0]):
        if side[i] == new_side[i]:
            continue
        side[i] = new_side[i]
        changes += 1
        one = _ONE if side[i] == RIGHT else -_ONE
        row = np.uint64(members[i])
        values = data[indptr[row] : indptr[row + _U1]]
        mine = columns[at[row] : at[row] + np.uint64(values.shape[0])]
        for k in range(values.shape[0]):
            right[mine[k]] += np.int64(values[k] * one)
        for j in range(dense.shape[1]):
            rest[j] += np.int64(dense[row, j] * one)
    return changes


@njit(nogil=True)
def direction_between(
    indptr: U64,
    at: U64,
    columns: U32,
    data: F32,
    dense: F32,
    right: int,
    left: int,
    num_columns: int,
    direction: F32,
) -> None:
    """``direction = row right - row left``."""
    direction[: num_columns + dense.shape[1]] = 0.0
    rest = direction[num_columns : num_columns + dense.shape[1]]
    for sign, label in ((np.float32(1), right), (np.float32(-1), left)):
        row = np.uint64(label)
        values = data[indptr[row] : indptr[row + _U1]]
        mine = columns[at[row] : at[row] + np.uint64(values.shape[0])]
        for k in range(values.shape[0]):
            direction[mine[k]] += sign * values[k]
        for j in range(dense.shape[1]):
            rest[j] += sign * dense[row, j]


@njit(nogil=True, fastmath=_SUMS)
def direction_of_sums(total: I64, right: I64, width: int, direction: F32) -> None:
    """``direction = right / ||right|| - left / ||left||`` with ``left = total - right``; a zero sum stays zero."""
    total, right, direction = total[:width], right[:width], direction[:width]
    above = below = 0.0
    for k in range(width):
        r, b = np.float64(right[k]), np.float64(total[k] - right[k])
        above += r * r
        below += b * b
    above = 1.0 / np.sqrt(above) if above > 0 else 0.0
    below = 1.0 / np.sqrt(below) if below > 0 else 0.0
    for k in range(width):
        direction[k] = np.float64(right[k]) * above - np.float64(total[k] - right[k]) * below


@njit(nogil=True, fastmath=_SUMS)
def score_rows(
    indptr: U64,
    at: U64,
    columns: U32,
    data: F32,
    dense: F32,
    members: U32,
    num_columns: int,
    direction: F32,
    scores: F32,
) -> None:
    """``scores[i] = <direction, row members[i]>``."""
    rest = direction[num_columns : num_columns + dense.shape[1]]
    for i in range(members.shape[0]):
        row = np.uint64(members[i])
        values = data[indptr[row] : indptr[row + _U1]]
        mine = columns[at[row] : at[row] + np.uint64(values.shape[0])]
        score = np.float32(0)
        for k in range(values.shape[0]):
            score += values[k] * direction[mine[k]]
        for j in range(dense.shape[1]):
            score += dense[row, j] * rest[j]
        scores[i] = score


@njit(nogil=True)
def _bisect(
    indptr: U64,
    at: U64,
    columns: U32,
    data: F32,
    dense: F32,
    members: U32,
    num_columns: int,
    seed: np.uint64,
    halves: bool,
    depth: int,
    node: int,
    max_iter: int,
    total: I64,
    right: I64,
    direction: F32,
    scores: F32,
    work: F32,
    side: U8,
    new_side: U8,
) -> None:
    """``side`` becomes the halves of one node; arguments as those of `bisect_subtree`, the last ones scratch."""
    n, width = members.shape[0], num_columns + dense.shape[1]
    total[:width] = 0
    right[:width] = 0
    add_rows(indptr, at, columns, data, dense, members, num_columns, total)
    side[:] = LEFT
    for iteration in range(max_iter):
        if iteration == 0 and halves:
            new_side[: n // 2] = LEFT
            new_side[n // 2 :] = RIGHT
        else:
            if iteration == 0:
                r, b = pick_two(seed, depth, node, n)
                direction_between(indptr, at, columns, data, dense, members[r], members[b], num_columns, direction)
            else:
                direction_of_sums(total, right, width, direction)
            score_rows(indptr, at, columns, data, dense, members, num_columns, direction, scores)
            lower_half(scores, new_side, work)
        if move(indptr, at, columns, data, dense, members, num_columns, side, new_side, right) == 0:
            break


@njit(nogil=True)
def bisect_subtree(
    indptr: U64,
    at: U64,
    columns: U32,
    own: U32,
    data: F32,
    dense: F32,
    members: U32,
    num_columns: int,
    seed: np.uint64,
    halves: bool,
    depth: int,
    node: int,
    stop: int,
    max_iter: int,
    where: U32,
    old: U32,
    total: I64,
    right: I64,
    direction: F32,
) -> Any:
    """Bisect a node and the nodes below it down to depth ``stop``, in place.

    Args:
        indptr: with ``at``, ``columns``, ``data`` and ``dense`` the label embeddings, see above.
        at: see ``indptr``.
        columns: see ``indptr``.
        own: the same again, to be renumbered for nodes that have few values for their columns;
            empty: they stay.
        data: see ``indptr``.
        dense: see ``indptr``.
        members: label ids of the node; reordered, so that nodes are neighbours.  Ties go by their order.
        num_columns: F.
        seed: of the random starts.
        halves: start from the halves of the members as they stand, not from random ones.
        depth: of the node.
        node: its number within its depth.
        stop: depth at which to end, above ``depth``.
        max_iter: most iterations a node.
        where: ``[F]`` zeros; scratch.
        old: ``[F]``; scratch.
        total: ``[F + d]``; scratch.
        right: as ``total``.
        direction: as ``total``.

    Returns:
        F of the first node, renumbered or not.
    """
    n = members.shape[0]
    scores, work = np.empty(n, dtype=np.float32), np.empty(n + 1, dtype=np.float32)
    side, new_side, ids = np.empty(n, dtype=np.uint8), np.empty(n, dtype=np.uint8), np.empty(n + 1, dtype=np.uint32)
    # Nodes that wait: first member, last member, depth, number, columns.
    waiting = np.empty((2 + stop - depth, 5), dtype=np.int64)
    waiting[0] = 0, n, depth, node, num_columns
    count, used = 1, num_columns
    while count > 0:
        count -= 1
        first, last, level, number, width = waiting[count]
        mine, size = members[first:last], last - first
        values = np.int64(0)
        for i in range(size):
            row = np.uint64(mine[i])
            values += np.int64(indptr[row + _U1] - indptr[row])
        if own.shape[0] > 0 and values < 4 * width:
            width = _renumber(indptr, at, own, mine, where, old)
            if level == depth:
                used = int(width)
        _bisect(
            indptr, at, columns, data, dense, mine, width, seed, halves, level, number, max_iter, total, right,
            direction, scores[:size], work, side[:size], new_side[:size],
        )  # fmt: skip
        rearrange(mine, side[:size], ids)
        if level + 1 < stop:
            half = first + size // 2
            waiting[count] = half, last, level + 1, 2 * number + 1, width
            waiting[count + 1] = first, half, level + 1, 2 * number, width
            count += 2
    return used
