"""Hierarchical balanced spherical 2-means: a binary code for every label.

Letters: L labels, D sparse and d dense features, W ranks.  A node of depth t is named by
the t bits of its labels' codes read as a number, so siblings are neighbours.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import pairwise
from queue import SimpleQueue

import numpy as np
from numba import get_num_threads
from numpy.typing import NDArray

from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range
from xmcdist.sparse.features import Features
from xmcdist.trees.errors import TreeError
from xmcdist.trees.halving import LEFT, RIGHT, lower_half, rearrange
from xmcdist.trees.kernels import (
    add_rows,
    bisect_subtree,
    direction_between,
    direction_of_sums,
    move,
    pack_columns,
    pick_two,
    score_rows,
)
from xmcdist.trees.matrix import Matrix, frozen

__all__ = ["balanced_kmeans"]

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

_WIDE = 1 << 13  # labels from which one node is worth more than one thread
_TASK = 1 << 17  # values below which a node and all nodes under it are one task
_PACKED = 1 << 23  # values below which columns are copied and renumbered: bounds memory a thread


def balanced_kmeans(
    Z: Features,
    depth: int,
    *,
    seed: int = 0,
    max_iter: int = 20,
    order: I64 | None = None,
    world: World | None = None,
    threads: int | None = None,
) -> I64:
    """Halve the labels ``depth`` times; collective.

    A node starts from the difference of two random members and then from the difference of
    its halves' normalised sums; members are ordered by their product with it, the lower
    half goes left, ties by label id.  It ends when no member changes sides.

    Rank 0 splits the top ceil(log2(W)) depths, then every rank its own nodes.  Random
    choices are keyed by (seed, depth, node), products run in the order of a row and sums
    are whole numbers, so codes depend neither on W nor on the number of threads.

    Args:
        Z: label embeddings ``[L, D]`` and/or ``[L, d]``, rows of unit or zero length.
        depth: at least 1, with 2**depth <= L.
        seed: of the random starts.
        max_iter: most iterations a node.
        order: int64 ``[L]``, all labels, those that are near each other in a tree there is near
            each other: a node then starts from the halves of its members in this order, not from
            two random ones, and ties go by it.  A start from random members magnifies the
            slightest difference in Z; this one does not.
        world: default one process.
        threads: a process; default numba's.

    Returns:
        int64 ``[L]`` in ``[0, 2**depth)``; sizes of codes differ by at most one.

    Raises:
        TreeError: depth or max_iter out of range.

    Cost: at most depth * max_iter passes over Z; memory 28 (D + d) bytes a thread, and 4 a
    stored value of the nodes in work, of which nodes of more than 2**23 values do without.

    Source: amzn/pecos ``clustering.hpp`` (Yu et al., arXiv:2010.05878).
    """
    world = world or World.single()
    if depth < 1 or 1 << depth > Z.num_rows:
        raise TreeError(f"{Z.num_rows} labels cannot be halved {depth} times")
    if max_iter < 1:
        raise TreeError(f"tree.kmeans_max_iter ({max_iter}) must be at least 1")
    if order is not None and not np.array_equal(np.sort(order), np.arange(Z.num_rows)):
        raise TreeError(f"order does not hold each of the {Z.num_rows} labels once")
    work = _Bisection(Matrix.of(Z), None if order is not None else seed, max_iter, max(1, threads or get_num_threads()))
    top = min((world.world_size - 1).bit_length(), depth)
    members = np.arange(Z.num_rows, dtype=np.uint32) if order is None else order.astype(np.uint32)
    node_ptr = np.array([0, Z.num_rows], dtype=np.int64)
    if top:
        if world.is_main:
            node_ptr = work.run(members, node_ptr, 0, top)
        members = _from_rank_0(members.astype(np.int64), world).astype(np.uint32)
        node_ptr = _from_rank_0(node_ptr, world)
    first, last = row_range(len(node_ptr) - 1, world.rank, world.world_size)
    begin, end = int(node_ptr[first]), int(node_ptr[last])
    own, ptr = members[begin:end].copy(), node_ptr[first : last + 1] - begin
    if first < last:
        ptr = work.run(own, ptr, top, depth, first_node=first)
    leaves = np.repeat(np.arange(len(ptr) - 1, dtype=np.int64) + (first << (depth - top)), np.diff(ptr))
    codes = np.empty(Z.num_rows, dtype=np.int64)
    codes[_gathered(own.astype(np.int64), world)] = _gathered(leaves, world)
    return codes


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    """A node to bisect: its members, and their columns; ``own`` is these again, writable, where they are packed."""

    first: int
    last: int
    depth: int
    number: int
    values: int
    columns: U32
    at: U64
    width: int
    own: U32


class _Scratch:
    """Work arrays of one thread."""

    def __init__(self, num_sparse: int, num_dense: int) -> None:
        self.where, self.old = np.zeros(num_sparse, dtype=np.uint32), np.empty(num_sparse, dtype=np.uint32)
        self.total = np.empty(num_sparse + num_dense, dtype=np.int64)
        self.right, self.direction = self.total.copy(), np.empty(num_sparse + num_dense, dtype=np.float32)


class _Bisection:
    """Bisects nodes: near the root one by one, rows shared out over threads; below, nodes are."""

    def __init__(self, z: Matrix, seed: int | None, max_iter: int, threads: int) -> None:
        self._z, self._max_iter, self._threads = z, max_iter, threads
        self._halves, self._seed = seed is None, np.uint64((seed or 0) & (2**64 - 1))
        self._indptr, self._nothing = z.indptr.view(np.uint64), np.empty(0, dtype=np.uint32)
        self._begins = np.empty(len(z.indptr) - 1, dtype=np.uint64)
        self._at = frozen(self._begins)
        self._scratch: SimpleQueue[_Scratch] = SimpleQueue()
        for _ in range(threads):
            self._scratch.put(_Scratch(z.num_sparse, z.dense.shape[1]))

    def run(self, members: U32, node_ptr: I64, start: int, stop: int, first_node: int = 0) -> I64:
        """Depths ``[start, stop)`` below some neighbouring nodes of depth ``start``.

        Args:
            members: label ids, those of the i-th node at ``node_ptr[i]:node_ptr[i + 1]``; reordered in place.
            node_ptr: see ``members``.
            start: depth of these nodes.
            stop: depth of the nodes wanted.
            first_node: the number of the first of these nodes within its depth.

        Returns:
            ``node_ptr`` by nodes of depth ``stop``.
        """
        z, nodes = self._z, deque[_Node]()
        for i, (first, last) in enumerate(pairwise(node_ptr.tolist())):
            values = self._values(members[first:last])
            rows = (z.indices, self._indptr, z.num_sparse, self._nothing)
            nodes.append(_Node(first, last, start, first_node + i, values, *rows))
        with ThreadPoolExecutor(self._threads) as pool:
            while nodes and len(nodes) < self._threads and len(members) >= _WIDE * len(nodes):
                for _ in range(len(nodes)):
                    nodes.extend(self._wide(members, nodes.popleft(), stop, pool))
            running: set[Future[list[_Node]]] = {pool.submit(self._task, members, node, stop) for node in nodes}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for task in done:
                    running |= {pool.submit(self._task, members, node, stop) for node in task.result()}
        for _ in range(start, stop):
            node_ptr = _halved(node_ptr)
        return node_ptr

    def _values(self, members: U32) -> int:
        return int(np.sum(self._z.indptr[members.astype(np.int64) + 1] - self._z.indptr[members]))

    def _packed(self, members: U32, node: _Node, scratch: _Scratch) -> _Node:
        """The node with columns of its own, where that is worth the memory."""
        z = self._z
        if node.own.size or not 0 < node.values <= _PACKED:
            return node
        own, mine = np.empty(node.values, dtype=np.uint32), members[node.first : node.last]
        width = pack_columns(self._indptr, z.indices, mine, own, self._begins, scratch.where, scratch.old)
        return replace(node, columns=frozen(own), at=self._at, width=width, own=own)

    def _below(self, members: U32, node: _Node, width: int, stop: int) -> list[_Node]:
        """The two halves of a node that has been bisected."""
        if node.depth + 1 == stop:
            return []
        half = node.first + (node.last - node.first) // 2
        values = self._values(members[node.first : half])
        rest = (node.columns, node.at, width, node.own)
        return [
            _Node(node.first, half, node.depth + 1, 2 * node.number, values, *rest),
            _Node(half, node.last, node.depth + 1, 2 * node.number + 1, node.values - values, *rest),
        ]

    def _task(self, members: U32, node: _Node, stop: int) -> list[_Node]:
        """Bisect a node, if it is a small one with all below it; what is left to do."""
        z, scratch = self._z, self._scratch.get()
        node = self._packed(members, node, scratch)
        end = stop if node.values + (node.last - node.first) * z.dense.shape[1] <= _TASK else node.depth + 1
        width = bisect_subtree(
            self._indptr, node.at, node.columns, node.own, z.data, z.dense, members[node.first : node.last],
            node.width, self._seed, self._halves, node.depth, node.number, end, self._max_iter,
            scratch.where, scratch.old, scratch.total, scratch.right, scratch.direction,
        )  # fmt: skip
        self._scratch.put(scratch)
        return self._below(members, node, width, stop) if end < stop else []

    def _wide(self, members: U32, node: _Node, stop: int, pool: ThreadPoolExecutor) -> list[_Node]:
        """What `bisect_subtree` does for one node, rows shared out over threads."""
        z, scratch = self._z, self._scratch.get()
        node = self._packed(members, node, scratch)
        mine, n = members[node.first : node.last], node.last - node.first
        rows, width = (self._indptr, node.at, node.columns, z.data, z.dense), node.width
        wide = width + z.dense.shape[1]
        total, right, direction = scratch.total[:wide], scratch.right[:wide], scratch.direction
        side, new_side, scores = np.full(n, LEFT), np.empty(n, dtype=np.uint8), np.empty(n, dtype=np.float32)
        work = np.empty(n + 1, dtype=np.float32)
        edges = np.linspace(0, n, 4 * self._threads + 1).astype(np.int64).tolist()
        parts = [slice(a, b) for a, b in pairwise(edges)]
        few = [slice(a, b) for a, b in pairwise(edges[::4])]  # one a thread

        def add(part: slice) -> I64:
            sums = np.zeros(wide, dtype=np.int64)
            add_rows(*rows, mine[part], width, sums)
            return sums

        def carry(part: slice) -> I64:
            sums = np.zeros(wide, dtype=np.int64)
            move(*rows, mine[part], width, side[part], new_side[part], sums)
            return sums

        def score(part: slice) -> None:
            score_rows(*rows, mine[part], width, direction, scores[part])

        total[:] = sum(pool.map(add, few))
        for iteration in range(self._max_iter):
            if iteration == 0 and self._halves:
                new_side[: n // 2], new_side[n // 2 :] = LEFT, RIGHT
            else:
                if iteration == 0:
                    r, b = pick_two(self._seed, node.depth, node.number, n)
                    direction_between(*rows, mine[r], mine[b], width, direction)
                else:
                    direction_of_sums(total, right, wide, direction)
                list(pool.map(score, parts))
                lower_half(scores, new_side, work)
            if iteration == 0:
                right[:] = sum(pool.map(carry, few))
            elif move(*rows, mine, width, side, new_side, right) == 0:
                break
        rearrange(mine, side, np.empty(n + 1, dtype=np.uint32))
        self._scratch.put(scratch)
        return self._below(members, node, width, stop)


def _halved(node_ptr: I64) -> I64:
    out = np.empty(2 * len(node_ptr) - 1, dtype=np.int64)
    out[::2] = node_ptr
    out[1::2] = node_ptr[:-1] + np.diff(node_ptr) // 2
    return out


def _from_rank_0(array: I64, world: World) -> I64:
    import torch

    from xmcdist.parallel.collectives import all_gather_ragged

    mine = torch.from_numpy(array if world.is_main else array[:0])
    return all_gather_ragged(mine)[0].numpy()


def _gathered(array: I64, world: World) -> I64:
    if world.world_size == 1:
        return array
    import torch

    from xmcdist.parallel.collectives import all_gather_ragged

    return torch.cat(all_gather_ragged(torch.from_numpy(array))).numpy()
