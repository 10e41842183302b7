"""The weights of a range of a level's nodes, laid out for beam search, and their file.

A beam search scores all children of a cluster at once.  So weights lie chunk after chunk,
where a chunk is up to 256 neighbouring children of one cluster; in a chunk feature after
feature; and for each feature its (child, value) pairs.  A document touches one short run
of memory for each word and chunk.  A child is one byte; where a feature's pairs begin is
two bytes, from a start that is kept for every 256th feature.  The idea is that of the
chunked matrices of PECOS (Yu et al., arXiv:2010.05878).

Letters: n nodes, C clusters (parents), B chunks, F (chunk, feature) entries, D sparse
features, d dense width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.rankers.layout import (
    I64,
    STEP,
    Chunk,
    by_chunk,
    chunk_starts,
    clusters_of,
    entry_pointers,
    split_chunk,
)
from xmcdist.rankers.part_file import read_arrays, write_arrays

__all__ = ["DTYPES", "Chunk", "WeightPart"]

DTYPES = {"float32": ("float32", "float32"), "mixed": ("float32", "float16"), "float16": ("float16", "float16")}

_ARRAYS: dict[str, tuple[str, ...]] = {
    "cluster_ptr": ("int64",),
    "chunk_node": ("int64",),
    "chunk_ptr": ("int64",),
    "entry_start": ("int64",),
    "feature": ("uint32",),
    "value": ("float32", "float16"),
    "dense": ("float32", "float16"),
    "bias": ("float32",),
    "entry_offset": ("uint16",),
    "child": ("uint8",),
}


@dataclass(frozen=True, eq=False)
class WeightPart:
    """Weights of adjoining nodes of one level.

    The chunks of cluster ``first_cluster + c`` are ``cluster_ptr[c]:cluster_ptr[c+1]``.  Chunk
    b holds nodes ``chunk_node[b]:chunk_node[b+1]`` and features ``feature[chunk_ptr[b]:
    chunk_ptr[b+1]]``, ascending.  The weights of entry f begin at ``entry_start[f >> 8] +
    entry_offset[f]`` of ``child``, counted from the chunk's first node, and ``value``, and end
    where those of f + 1 begin.  The dense weights of chunk b are ``[d, nodes of b]``, flat, at
    ``dense[(chunk_node[b] - chunk_node[0]) * d:]``; its bias terms at ``bias[chunk_node[b] -
    chunk_node[0]:]``.

    Arrays may be memory-mapped.  A part of a part (`cut`) has all arrays of the larger one and
    a slice of ``cluster_ptr``.

    Attributes:
        first_cluster: of the C clusters.
        num_sparse: D.
        num_dense: d.
        cluster_ptr: ``[C+1]`` int64.
        chunk_node: ``[B+1]`` int64, numbered as in the level.
        chunk_ptr: ``[B+1]`` int64.
        entry_start: ``[F // 256 + 1]`` int64.
        feature: ``[F]`` uint32.
        value: float32 or float16.
        dense: ``[n * d]`` float32 or float16; nothing dropped.
        bias: ``[n]`` float32, weight times value of the bias feature.
        entry_offset: ``[F+1]`` uint16.
        child: uint8.
    """

    first_cluster: int
    num_sparse: int
    num_dense: int
    cluster_ptr: I64
    chunk_node: I64
    chunk_ptr: I64
    entry_start: I64
    feature: NDArray[np.uint32]
    value: NDArray[Any]
    dense: NDArray[Any]
    bias: NDArray[np.float32]
    entry_offset: NDArray[np.uint16]
    child: NDArray[np.uint8]

    def __post_init__(self) -> None:
        for name, dtypes in _ARRAYS.items():
            array = getattr(self, name)
            if array.dtype.name not in dtypes or array.ndim != 1:
                raise ValueError(f"{name}: {array.ndim}-d {array.dtype}, must be 1-d {' or '.join(dtypes)}")
        chunks, entries = self.chunk_ptr.size - 1, self.feature.size
        nodes = int(self.chunk_node[-1] - self.chunk_node[0]) if self.chunk_node.size else -1
        weights = int(self.entry_start[-1]) + int(self.entry_offset[-1]) if self.entry_offset.size else -1
        for name, size, must in (
            ("chunk_node", self.chunk_node.size, chunks + 1),
            ("cluster_ptr", self.cluster_ptr[-1] <= chunks if self.cluster_ptr.size else False, True),
            ("feature", entries, int(self.chunk_ptr[-1]) if chunks >= 0 else -1),
            ("entry_offset", self.entry_offset.size, entries + 1),
            ("entry_start", self.entry_start.size, (entries >> STEP) + 1),
            ("child", self.child.size, weights),
            ("value", self.value.size, weights),
            ("bias", self.bias.size, nodes),
            ("dense", self.dense.size, nodes * self.num_dense),
        ):
            if size != must:
                raise ValueError(f"{name}: does not fit the other arrays ({size} for {must})")
        if (self.value.dtype.name, self.dense.dtype.name) not in DTYPES.values():
            raise ValueError(f"dense: {self.dense.dtype}, the sparse weights are {self.value.dtype}")

    @property
    def first_node(self) -> int:
        return int(self.chunk_node[self.cluster_ptr[0]])

    @property
    def num_nodes(self) -> int:
        return int(self.chunk_node[self.cluster_ptr[-1]]) - self.first_node

    @property
    def num_clusters(self) -> int:
        return int(self.cluster_ptr.size - 1)

    @property
    def nnz(self) -> int:
        """Stored sparse weights."""
        first, last = self._starts(self.chunk_ptr[self.cluster_ptr[[0, -1]]])
        return int(last - first)

    @property
    def dtype(self) -> str:
        """Of the weights, a key of `DTYPES`."""
        return {types: name for name, types in DTYPES.items()}[self.value.dtype.name, self.dense.dtype.name]

    @property
    def _is_whole(self) -> bool:
        """Whether it is no part of a part."""
        return bool(self.cluster_ptr[0] == 0 and self.cluster_ptr[-1] == self.chunk_ptr.size - 1)

    def _starts(self, entries: NDArray[Any]) -> I64:
        """Where the weights of some entries begin."""
        starts: I64 = self.entry_start[entries >> STEP] + self.entry_offset[entries]
        return starts

    def cluster_weights(self) -> I64:
        """Stored sparse weights of each cluster, ``[C]``."""
        return np.diff(self._starts(self.chunk_ptr[self.cluster_ptr]))

    def _entries(self) -> tuple[I64, NDArray[np.uint32], I64]:
        """Of every stored weight the node, the feature, and its place in ``child`` and ``value``."""
        lo, hi = self.cluster_ptr[[0, -1]]
        starts = self._starts(np.arange(self.chunk_ptr[lo], self.chunk_ptr[hi] + 1))
        per_chunk = np.diff(starts[self.chunk_ptr[lo : hi + 1] - self.chunk_ptr[lo]])
        places = np.arange(starts[0], starts[-1])
        nodes = np.repeat(self.chunk_node[lo:hi], per_chunk) + self.child[starts[0] : starts[-1]]
        features = np.repeat(self.feature[self.chunk_ptr[lo] : self.chunk_ptr[hi]], np.diff(starts))
        return nodes, features, places

    def sparse_rows(self) -> sp.csr_matrix:
        """The sparse weights node by node, ``[n, D]`` CSR float32."""
        nodes, features, places = self._entries()
        values = self.value[places].astype(np.float32)
        shape = (self.num_nodes, self.num_sparse)
        out = sp.csr_matrix((values, (nodes - self.first_node, features)), shape=shape, dtype=np.float32)
        out.sort_indices()
        return out

    def dense_rows(self) -> NDArray[np.float32]:
        """The dense weights node by node, ``[n, d]`` float32."""
        lo, hi = self.cluster_ptr[[0, -1]]
        out = np.empty((self.num_nodes, self.num_dense), np.float32)
        nodes = self.chunk_node[lo : hi + 1]
        for a, b in pairwise(nodes):
            flat = self.dense[(a - self.chunk_node[0]) * self.num_dense : (b - self.chunk_node[0]) * self.num_dense]
            out[a - nodes[0] : b - nodes[0]] = flat.reshape(self.num_dense, b - a).T
        return out

    def bias_rows(self) -> NDArray[np.float32]:
        """The bias terms, ``[n]`` float32, a view."""
        start = self.first_node - int(self.chunk_node[0])
        return self.bias[start : start + self.num_nodes]

    def astype(self, dtype: str) -> WeightPart:
        """The same with weights of another type.

        Args:
            dtype: a key of `DTYPES`.

        Raises:
            ValueError: a weight is too large for it.
        """
        if dtype == self.dtype:
            return self
        with np.errstate(over="ignore"):
            value, dense = (a.astype(t) for a, t in zip((self.value, self.dense), DTYPES[dtype], strict=True))
        if not (np.isfinite(value).all() and np.isfinite(dense).all()):
            raise ValueError(f"a weight is beyond {np.finfo(np.float16).max}, the largest float16: keep float32")
        return replace(self, value=value, dense=dense)

    def cut(self, start: int, stop: int, child_ptr: I64) -> tuple[WeightPart, ...]:
        """Those of the nodes ``[start, stop)`` that lie in this part, as none to three adjoining parts.

        Whole clusters are views, so that of a memory-mapped part nothing is read but a few
        pointers.  A cluster that is cut gets a copy of its weights in the range.

        Args:
            child_ptr: ``[K+1]`` of this level in the tree.
        """
        own = (self.first_node, self.first_node + self.num_nodes)
        start, stop = max(start, own[0]), min(stop, own[1])
        if start >= stop:
            return ()
        first, last = clusters_of(child_ptr, start, stop)
        edges = np.clip(child_ptr[first : last + 1], *own)
        low, high = first + int(start > edges[0]), last - int(stop < edges[-1])  # clusters that stay whole
        runs = [(first, low), (low, high), (high, last)] if low <= high else [(first, last)]
        pieces = []
        for a, b in runs:
            if a == b:
                continue
            piece = replace(self, first_cluster=a, cluster_ptr=self.cluster_ptr[a - self.first_cluster :][: b - a + 1])
            end = piece.first_node + piece.num_nodes
            whole = piece.first_node >= start and end <= stop
            pieces.append(piece if whole else piece._copy(max(start, piece.first_node), min(stop, end)))
        return tuple(pieces)

    def _copy(self, start: int, stop: int) -> WeightPart:
        """The nodes ``[start, stop)`` of this part with arrays of their own."""
        nodes, features, places = self._entries()
        kept = (nodes >= start) & (nodes < stop)
        rows = slice(start - self.first_node, stop - self.first_node)
        return _from_triples(
            nodes[kept],
            features[kept],
            self.value[places[kept]].astype(np.float32),
            np.clip(self.chunk_node[self.cluster_ptr], start, stop),
            self.dense_rows()[rows],
            np.array(self.bias_rows()[rows]),
            self.first_cluster,
            self.num_sparse,
        ).astype(self.dtype)

    @classmethod
    def empty(cls, node: int, child_ptr: I64, num_sparse: int, num_dense: int, dtype: str = "float32") -> WeightPart:
        """No nodes, before ``node``: what a rank holds of a level with fewer nodes than ranks."""
        none = np.zeros(0, np.float32)
        part = cls.from_rows(None, np.zeros((0, num_dense), np.float32), none, child_ptr, node)
        return replace(part, num_sparse=num_sparse).astype(dtype)

    @classmethod
    def from_rows(
        cls,
        sparse: sp.csr_matrix | None,
        dense: NDArray[np.float32] | None,
        bias: NDArray[np.float32],
        child_ptr: I64,
        first_node: int = 0,
    ) -> WeightPart:
        """Weights given node by node, as another program may have made them.

        Args:
            sparse: ``[n, D]``; None when D is 0.
            dense: ``[n, d]``; None when d is 0.
            bias: ``[n]``, already times the value of the bias feature.
            child_ptr: ``[K+1]`` of this level in the tree.
            first_node: where the n nodes start.

        Raises:
            ValueError: the numbers of nodes disagree.
        """
        n = bias.size
        rows = sp.coo_matrix(np.zeros((n, 0), np.float32)) if sparse is None else sparse.tocoo()
        matrix = np.zeros((n, 0), np.float32) if dense is None else dense
        if rows.shape[0] != n or first_node + n > child_ptr[-1]:
            raise ValueError(f"{rows.shape[0]} sparse rows, {n} bias terms, {child_ptr[-1]} nodes in the level")
        if matrix.shape[0] != n:
            raise ValueError(f"{matrix.shape[0]} dense rows for {n} nodes")
        first, last = clusters_of(child_ptr, first_node, first_node + n)
        bounds = np.clip(child_ptr[first : last + 1], first_node, first_node + n)
        node = rows.row.astype(np.int64) + first_node
        return _from_triples(
            node,
            rows.col,
            rows.data.astype(np.float32),
            bounds,
            matrix,
            np.ascontiguousarray(bias, np.float32),
            first,
            rows.shape[1],
        )

    @classmethod
    def from_chunks(
        cls,
        chunks: list[Chunk],
        bounds: NDArray[np.int64],
        dense: NDArray[np.float32],
        bias: NDArray[np.float32],
        first_cluster: int,
        num_sparse: int,
    ) -> WeightPart:
        """Weights solved cluster by cluster.

        Args:
            chunks: one for every cluster, in order: its features ``[f]`` ascending, how many
                weights each has ``[f]``, and of every weight the child, counted from the
                cluster's first here and ascending in a feature, and the value.  The list is
                emptied.
            bounds: ``[C+1]`` where the children of each cluster begin, cut to the nodes at hand.
            dense: ``[n, d]`` float32, contiguous; its memory becomes the part's.
            bias: ``[n]`` float32, already times the value of the bias feature.
            first_cluster: of the C clusters.
            num_sparse: D.

        Memory: the result and, array by array, the chunks.
        """
        edges, cluster_ptr = chunk_starts(bounds)
        pieces: list[Chunk] = []
        for c, chunk in enumerate(chunks):
            pieces += split_chunk(chunk, int(cluster_ptr[c + 1] - cluster_ptr[c]))
        chunks.clear()
        empty: Chunk = (np.zeros(0, np.uint32), np.zeros(0, np.uint16), np.zeros(0, np.uint8), np.zeros(0, np.float32))
        sizes = np.array([0, *(p[0].size for p in pieces)], np.int64)
        fields = [list(x) for x in zip(empty, *pieces, strict=True)]
        pieces.clear()
        joined: list[NDArray[Any]] = []
        while fields:  # one after the other, each freed before the next is copied
            joined.append(np.concatenate(fields.pop(0)))
        feature, counts, child, value = joined
        start, offset = entry_pointers(counts)
        return cls(
            first_cluster=first_cluster,
            num_sparse=num_sparse,
            num_dense=int(dense.shape[1]),
            cluster_ptr=cluster_ptr,
            chunk_node=edges,
            chunk_ptr=np.cumsum(sizes),
            entry_start=start,
            feature=feature,
            value=value,
            dense=by_chunk(np.ascontiguousarray(dense, np.float32), edges),
            bias=np.ascontiguousarray(bias, np.float32),
            entry_offset=offset,
            child=child,
        )

    def save(self, path: Path) -> None:
        """Write the file; it appears whole or not at all."""
        part = self if self._is_whole else self._copy(self.first_node, self.first_node + self.num_nodes)
        scalars = {k: int(getattr(part, k)) for k in ("first_cluster", "num_sparse", "num_dense")}
        write_arrays(path, {name: getattr(part, name) for name in _ARRAYS}, scalars)

    @classmethod
    def load(cls, path: Path, *, verify: bool = False) -> WeightPart:
        """Open the file, memory-mapped.

        Args:
            verify: also read all of it and compare with its checksums.

        Raises:
            ValueError: the file is missing, damaged, or its arrays do not fit each other.
        """
        arrays, scalars = read_arrays(path, tuple(_ARRAYS), verify=verify)
        given: dict[str, Any] = {**scalars, **arrays}
        try:
            part = cls(**given)
            if not part._is_whole:
                raise ValueError("cluster_ptr: does not point to all chunks")
            return part
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{path}: damaged ({error}); train this level again") from error


def _from_triples(
    node: I64,
    feature: NDArray[Any],
    value: NDArray[Any],
    bounds: I64,
    dense: NDArray[np.float32],
    bias: NDArray[np.float32],
    first_cluster: int,
    num_sparse: int,
) -> WeightPart:
    """A part from (node, feature, value) in any order; ``bounds`` as in `WeightPart.from_chunks`."""
    edges, cluster_ptr = chunk_starts(bounds)
    chunk = np.searchsorted(edges, node, side="right") - 1
    order = np.lexsort((node, feature, chunk))
    node, chunk, feature = node[order], chunk[order], feature[order]
    new = np.ones(node.size, bool)
    new[1:] = (np.diff(chunk) != 0) | (feature[1:] != feature[:-1])
    firsts = np.flatnonzero(new)
    start, offset = entry_pointers(np.diff(np.append(firsts, node.size)))
    return WeightPart(
        first_cluster=first_cluster,
        num_sparse=num_sparse,
        num_dense=int(dense.shape[1]),
        cluster_ptr=cluster_ptr,
        chunk_node=edges,
        chunk_ptr=np.searchsorted(chunk[firsts], np.arange(edges.size)).astype(np.int64),
        entry_start=start,
        feature=feature[firsts].astype(np.uint32),
        value=value[order],
        dense=by_chunk(np.array(dense, np.float32, order="C"), edges),
        bias=bias,
        entry_offset=offset,
        child=(node - edges[chunk]).astype(np.uint8),
    )
