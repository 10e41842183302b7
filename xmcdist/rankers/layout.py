"""How a level's weights are ordered in memory: what `xmcdist.rankers.part` is put together with."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CHUNK", "STEP", "Chunk", "by_chunk", "chunk_starts", "clusters_of", "entry_pointers", "split_chunk"]

CHUNK = 256  # most children of a chunk: a child is one byte
STEP = 8  # log2 of how many entries share a start: 255 entries of 256 weights stay below 2**16

I64 = NDArray[np.int64]
Chunk = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]  # features, weights of each, child, value


def chunk_starts(bounds: I64) -> tuple[I64, I64]:
    """First nodes of the chunks, with the end, ``[B+1]``; chunks of each cluster, ``[C+1]``.

    Args:
        bounds: ``[C+1]`` where the nodes of each cluster begin, with the end; or ``[1]``: none.
    """
    chunks = -(-np.diff(bounds) // CHUNK)
    cluster_ptr = np.concatenate([[0], np.cumsum(chunks)]).astype(np.int64)
    place = np.arange(cluster_ptr[-1]) - np.repeat(cluster_ptr[:-1], chunks)
    return np.append(np.repeat(bounds[:-1], chunks) + place * CHUNK, bounds[-1]).astype(np.int64), cluster_ptr


def split_chunk(chunk: Chunk, parts: int) -> list[Chunk]:
    """The weights of one cluster as chunks of at most 256 children."""
    feature, counts, child, value = chunk
    if parts == 1:
        return [(feature.astype(np.uint32, copy=False), counts.astype(np.uint16), child.astype(np.uint8), value)]
    entry = np.repeat(np.arange(feature.size), counts)
    out: list[Chunk] = []
    for k in range(parts):
        kept = child // CHUNK == k
        found = np.bincount(entry[kept], minlength=feature.size)
        some = found > 0
        own = (child[kept] % CHUNK).astype(np.uint8)
        out.append((feature[some].astype(np.uint32), found[some].astype(np.uint16), own, value[kept]))
    return out


def entry_pointers(counts: NDArray[Any]) -> tuple[I64, NDArray[np.uint16]]:
    """Where the weights of each entry begin, and where the last end: ``entry_start``, ``entry_offset``."""
    starts = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    shared = np.ascontiguousarray(starts[:: 1 << STEP])
    offsets = starts - np.repeat(shared, 1 << STEP)[: starts.size]
    return shared, offsets.astype(np.uint16)


def by_chunk(dense: NDArray[Any], edges: I64) -> NDArray[Any]:
    """Rows ``[n, d]`` as one ``[d, nodes]`` matrix a chunk, flat; in their place, which they lose."""
    flat, width = dense.reshape(-1), dense.shape[1]
    for a, b in pairwise(edges - edges[0]):
        flat[a * width : b * width] = dense[a:b].T.ravel()  # a copy, except of one row or column
    return flat


def clusters_of(child_ptr: I64, start: int, stop: int) -> tuple[int, int]:
    """Half-open range of the clusters that have a child in ``[start, stop)``; empty for no nodes."""
    if start >= stop:
        first = int(np.searchsorted(child_ptr, start, side="left"))
        return first, first
    first = int(np.searchsorted(child_ptr, start, side="right")) - 1
    return first, int(np.searchsorted(child_ptr, stop, side="left"))
