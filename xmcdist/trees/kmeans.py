"""Hierarchical balanced spherical 2-means: a binary code for every label.

Letters: L labels, D sparse and d dense features, W ranks.  A node of depth t is named by
the t bits of its labels' codes read as a number, so siblings are neighbours.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import get_num_threads
from numpy.typing import NDArray

from xmcdist.parallel.collectives import all_gather_ragged
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range
from xmcdist.sparse.features import Features
from xmcdist.trees.errors import TreeError
from xmcdist.trees.kernels import (
    NONE,
    bisect_nodes,
    direction_between,
    direction_of_sums,
    halves,
    lower_half,
    move,
    rearrange,
    score_rows,
)
from xmcdist.trees.matrix import Matrix

__all__ = ["balanced_kmeans"]

I64 = NDArray[np.int64]

_WIDE = 1 << 13  # labels from which one node is worth more than one thread


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
    choices are keyed by (seed, depth, node) and sums run in label order, so codes depend
    neither on W nor on the number of threads.

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

    Cost: at most depth * max_iter passes over Z; memory 24 (D + d) bytes a thread.

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
    members = np.arange(Z.num_rows, dtype=np.int64) if order is None else np.array(order, dtype=np.int64)
    node_ptr = np.array([0, Z.num_rows], dtype=np.int64)
    if top:
        if world.is_main:
            members, node_ptr = work.run(members, node_ptr, 0, top)
        members = _from_rank_0(members, world)
        node_ptr = _from_rank_0(node_ptr, world)
    first, last = row_range(len(node_ptr) - 1, world.rank, world.world_size)
    begin, end = int(node_ptr[first]), int(node_ptr[last])
    own, ptr = members[begin:end].copy(), node_ptr[first : last + 1] - begin
    if first < last:
        own, ptr = work.run(own, ptr, top, depth, first_node=first)
    leaves = np.repeat(np.arange(len(ptr) - 1, dtype=np.int64) + (first << (depth - top)), np.diff(ptr))
    codes = np.empty(Z.num_rows, dtype=np.int64)
    codes[_gathered(own, world)] = _gathered(leaves, world)
    return codes


class _Bisection:
    """Bisects nodes depth by depth, nodes or, near the root, rows shared out over threads."""

    def __init__(self, z: Matrix, seed: int | None, max_iter: int, threads: int) -> None:
        self._z, self._seed, self._max_iter, self._threads = z, seed, max_iter, threads

    def run(self, members: I64, node_ptr: I64, start: int, stop: int, first_node: int = 0) -> tuple[I64, I64]:
        """Depths ``[start, stop)`` below some neighbouring nodes of depth ``start``.

        Args:
            members: label ids, those of the i-th node at ``node_ptr[i]:node_ptr[i + 1]``; reordered in place.
            node_ptr: see ``members``.
            start: depth of these nodes.
            stop: depth of the nodes wanted.
            first_node: the number of the first of these nodes within its depth.

        Returns:
            The same labels and ``node_ptr`` by nodes of depth ``stop``.
        """
        with ThreadPoolExecutor(self._threads) as pool:
            for depth in range(start, stop):
                picks = self._picks(node_ptr, depth, first_node << (depth - start))
                nodes = len(node_ptr) - 1
                if nodes < self._threads and len(members) >= _WIDE * nodes:
                    for node in range(nodes):
                        self._bisect_wide(members[node_ptr[node] : node_ptr[node + 1]], picks[node], pool)
                else:
                    self._bisect_all(members, node_ptr, picks, pool)
                node_ptr = _halved(node_ptr)
        return members, node_ptr

    def _picks(self, node_ptr: I64, depth: int, first_node: int) -> I64:
        """Two different members, by position, of each node; without a seed the same one twice: halves."""
        if self._seed is None:
            return np.zeros((len(node_ptr) - 1, 2), dtype=np.int64)
        picks = np.empty((len(node_ptr) - 1, 2), dtype=np.int64)
        for i, size in enumerate(np.diff(node_ptr).tolist()):
            rng = np.random.default_rng((self._seed, depth, first_node + i))
            right, left = int(rng.integers(size)), int(rng.integers(size - 1))
            picks[i] = right, left + (left >= right)
        return picks

    def _bisect_all(self, members: I64, node_ptr: I64, picks: I64, pool: ThreadPoolExecutor) -> None:
        z, nodes = self._z, len(node_ptr) - 1
        pieces = min(nodes, 4 * self._threads)
        edges = np.searchsorted(node_ptr, np.linspace(0, len(members), pieces + 1)).tolist()
        edges[0], edges[-1] = 0, nodes

        def run(i: int) -> None:
            bisect_nodes(
                z.indptr, z.indices, z.data, z.dense, z.num_sparse, members, node_ptr, picks,
                edges[i], edges[i + 1], self._max_iter,
            )  # fmt: skip

        list(pool.map(run, range(pieces)))

    def _bisect_wide(self, mine: I64, pick: I64, pool: ThreadPoolExecutor) -> None:
        """What `bisect_nodes` does for one node, scoring shared out over threads: scores are no sums over rows."""
        z, n = self._z, len(mine)
        rows = (z.indptr, z.indices, z.data, z.dense)
        width = z.num_sparse + z.dense.shape[1]
        touched = np.arange(z.num_sparse, dtype=np.uint32)
        direction, sums, scores = np.zeros(width), np.zeros((width, 2)), np.empty(n)
        side, new_side = np.full(n, NONE, dtype=np.uint8), np.empty(n, dtype=np.uint8)
        edges = np.linspace(0, n, 4 * self._threads + 1).astype(np.int64).tolist()

        def score(i: int) -> None:
            part = slice(edges[i], edges[i + 1])
            score_rows(*rows, mine[part], direction, scores[part])

        right, left = pick
        if right != left:
            direction_between(*rows, mine[right], mine[left], touched, direction)
        for iteration in range(self._max_iter):
            if iteration == 0 and right == left:
                halves(new_side)
            else:
                if iteration:
                    direction_of_sums(sums, touched, z.num_sparse, direction)
                list(pool.map(score, range(len(edges) - 1)))
                lower_half(scores, new_side)
            if move(*rows, mine, side, new_side, sums) == 0:
                break
        rearrange(mine, side)


def _halved(node_ptr: I64) -> I64:
    out = np.empty(2 * len(node_ptr) - 1, dtype=np.int64)
    out[::2] = node_ptr
    out[1::2] = node_ptr[:-1] + np.diff(node_ptr) // 2
    return out


def _from_rank_0(array: I64, world: World) -> I64:
    mine = torch.from_numpy(array if world.is_main else array[:0])
    return all_gather_ragged(mine)[0].numpy()


def _gathered(array: I64, world: World) -> I64:
    if world.world_size == 1:
        return array
    return torch.cat(all_gather_ragged(torch.from_numpy(array))).numpy()
