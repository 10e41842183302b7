"""The weights of a range of a level's nodes, laid out for beam search, and their files.

A beam search scores all children of a cluster at once.  So weights lie cluster after
cluster; in a cluster feature after feature; and for each feature its (child, value)
pairs.  A document touches one short run of memory for each word and cluster.  The idea
is that of the chunked matrices of PECOS (Yu et al., arXiv:2010.05878).

Letters: n nodes, C clusters (parents), D sparse features, d dense width.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["WeightPart"]

_ARRAYS: dict[str, tuple[type, int]] = {
    "chunk_ptr": (np.int64, 1),
    "feature": (np.uint32, 1),
    "entry_ptr": (np.int64, 1),
    "child": (np.uint32, 1),
    "value": (np.float32, 1),
    "dense": (np.float32, 2),
    "bias": (np.float32, 1),
}


@dataclass(frozen=True)
class WeightPart:
    """Weights of the nodes ``[first_node, first_node + n)`` of one level.

    Chunk c holds those children of cluster ``first_cluster + c`` that lie in the range.
    Its features are ``feature[chunk_ptr[c]:chunk_ptr[c+1]]``, ascending; the weights of
    the f-th entry of ``feature`` are ``child``/``value`` at ``entry_ptr[f]:entry_ptr[f+1]``,
    children counted from the chunk's first.  Arrays may be memory-mapped, and views of those
    of a larger part (`cut`).

    Attributes:
        first_cluster: of the C clusters.
        first_node: of the n nodes.
        num_sparse: D.
        chunk_ptr: ``[C+1]`` int64.
        feature: uint32.
        entry_ptr: int64, from any start: ``entry_ptr[f] - entry_ptr[0]`` is where the entry begins.
        child: uint32.
        value: float32.
        dense: ``[n, d]`` float32, nothing dropped.
        bias: ``[n]`` float32, weight times value of the bias feature.
    """

    first_cluster: int
    first_node: int
    num_sparse: int
    chunk_ptr: NDArray[np.int64]
    feature: NDArray[np.uint32]
    entry_ptr: NDArray[np.int64]
    child: NDArray[np.uint32]
    value: NDArray[np.float32]
    dense: NDArray[np.float32]
    bias: NDArray[np.float32]

    def __post_init__(self) -> None:
        for name, (dtype, ndim) in _ARRAYS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != ndim:
                raise ValueError(f"{name}: {array.ndim}-d {array.dtype}, must be {ndim}-d {np.dtype(dtype)}")
        for name, pointed in (("chunk_ptr", self.feature.size), ("entry_ptr", self.value.size)):
            ptr = getattr(self, name)
            if ptr.size == 0 or ptr[-1] - ptr[0] != pointed or (name == "chunk_ptr" and ptr[0] != 0):
                raise ValueError(f"{name}: must point to {pointed} entries")
        if self.entry_ptr.size != self.feature.size + 1:
            raise ValueError(f"entry_ptr: {self.entry_ptr.size} entries for {self.feature.size} features")
        if self.child.size != self.value.size:
            raise ValueError(f"child: {self.child.size} entries for {self.value.size} weights")
        if self.dense.shape[0] != self.bias.size:
            raise ValueError(f"dense: {self.dense.shape[0]} rows for {self.bias.size} nodes")

    @property
    def num_nodes(self) -> int:
        return int(self.bias.size)

    @property
    def num_clusters(self) -> int:
        return int(self.chunk_ptr.size - 1)

    @property
    def num_dense(self) -> int:
        return int(self.dense.shape[1])

    def sparse_rows(self, child_ptr: NDArray[np.int64]) -> sp.csr_matrix:
        """The sparse weights node by node, ``[n, D]`` CSR float32.

        Args:
            child_ptr: ``[K+1]`` of this level in the tree.
        """
        per_chunk = np.diff(self.entry_ptr[self.chunk_ptr])
        clusters = np.arange(self.first_cluster, self.first_cluster + self.num_clusters)
        starts = np.maximum(child_ptr[clusters], self.first_node) - self.first_node
        rows = np.repeat(starts, per_chunk) + self.child
        columns = np.repeat(self.feature, np.diff(self.entry_ptr))
        out = sp.csr_matrix((self.value, (rows, columns)), shape=(self.num_nodes, self.num_sparse), dtype=np.float32)
        out.sort_indices()
        return out

    def chunk_weights(self) -> NDArray[np.int64]:
        """Stored sparse weights of each chunk, ``[C]``."""
        return np.diff(self.entry_ptr[self.chunk_ptr])

    def cut(self, start: int, stop: int, child_ptr: NDArray[np.int64]) -> tuple[WeightPart, ...]:
        """Those of the nodes ``[start, stop)`` that lie in this part, as none to three adjoining parts.

        Whole clusters are views, so that of a memory-mapped part nothing is read but one
        pointer a cluster.  A cluster that is cut gets a copy of its weights in the range.

        Args:
            child_ptr: ``[K+1]`` of this level in the tree.
        """
        start, stop = max(start, self.first_node), min(stop, self.first_node + self.num_nodes)
        if start >= stop:
            return ()
        first, last = _clusters_of(child_ptr, start, stop)
        edges = np.clip(child_ptr[first : last + 1], self.first_node, self.first_node + self.num_nodes)
        low, high = first + int(start > edges[0]), last - int(stop < edges[-1])  # clusters that stay whole
        runs = [(first, low), (low, high), (high, last)] if low <= high else [(first, last)]
        return tuple(
            self._clusters(a, b, max(start, int(edges[a - first])), min(stop, int(edges[b - first])), child_ptr)
            for a, b in runs
            if a < b
        )

    def _clusters(self, a: int, b: int, start: int, stop: int, child_ptr: NDArray[np.int64]) -> WeightPart:
        """Nodes ``[start, stop)``, which are the clusters ``[a, b)`` of this part or a piece of one of them."""
        chunk_ptr = self.chunk_ptr[a - self.first_cluster : b - self.first_cluster + 1]
        feature = self.feature[chunk_ptr[0] : chunk_ptr[-1]]
        entry_ptr = self.entry_ptr[chunk_ptr[0] : chunk_ptr[-1] + 1]
        begin, end = entry_ptr[[0, -1]] - self.entry_ptr[0]
        child, value = self.child[begin:end], self.value[begin:end]
        origin = max(int(child_ptr[a]), self.first_node)
        if start != origin or stop < min(int(child_ptr[b]), self.first_node + self.num_nodes):
            kept = (child >= start - origin) & (child < stop - origin)
            counts = np.diff(np.concatenate([[0], np.cumsum(kept)])[entry_ptr - entry_ptr[0]])
            feature = feature[counts > 0]
            entry_ptr = np.concatenate([[0], np.cumsum(counts[counts > 0])]).astype(np.int64)
            child, value = (child[kept] - np.uint32(start - origin)).astype(np.uint32), value[kept]
            chunk_ptr = np.array([0, feature.size], np.int64)
        nodes = slice(start - self.first_node, stop - self.first_node)
        return WeightPart(
            first_cluster=a,
            first_node=start,
            num_sparse=self.num_sparse,
            chunk_ptr=chunk_ptr - chunk_ptr[0],
            feature=feature,
            entry_ptr=entry_ptr,
            child=child,
            value=value,
            dense=self.dense[nodes],
            bias=self.bias[nodes],
        )

    @classmethod
    def empty(cls, node: int, child_ptr: NDArray[np.int64], num_sparse: int, num_dense: int) -> WeightPart:
        """No nodes, before ``node``: what a rank holds of a level with fewer nodes than ranks."""
        none = np.zeros(0, np.float32)
        part = cls.from_rows(None, np.zeros((0, num_dense), np.float32), none, child_ptr, node)
        return replace(part, num_sparse=num_sparse)

    @classmethod
    def from_rows(
        cls,
        sparse: sp.csr_matrix | None,
        dense: NDArray[np.float32] | None,
        bias: NDArray[np.float32],
        child_ptr: NDArray[np.int64],
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
        matrix = np.zeros((n, 0), np.float32) if dense is None else np.ascontiguousarray(dense, np.float32)
        if rows.shape[0] != n or first_node + n > child_ptr[-1]:
            raise ValueError(f"{rows.shape[0]} sparse rows, {n} bias terms, {child_ptr[-1]} nodes in the level")
        first, last = _clusters_of(child_ptr, first_node, first_node + n)
        node = rows.row.astype(np.int64) + first_node
        cluster = np.searchsorted(child_ptr, node, side="right") - 1
        order = np.lexsort((node, rows.col, cluster))
        node, cluster, column = node[order], cluster[order], rows.col[order].astype(np.int64)
        new = np.ones(node.size, bool)
        new[1:] = (np.diff(cluster) != 0) | (np.diff(column) != 0)
        starts = np.flatnonzero(new)
        return cls(
            first_cluster=first,
            first_node=first_node,
            num_sparse=rows.shape[1],
            chunk_ptr=np.searchsorted(cluster[starts], np.arange(first, last + 1)).astype(np.int64),
            feature=column[starts].astype(np.uint32),
            entry_ptr=np.append(starts, node.size).astype(np.int64),
            child=(node - np.maximum(child_ptr[cluster], first_node)).astype(np.uint32),
            value=rows.data[order].astype(np.float32),
            dense=matrix,
            bias=np.ascontiguousarray(bias, np.float32),
        )

    def save(self, folder: Path) -> None:
        """Write the folder; it appears whole or not at all."""
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name in _ARRAYS:
            array = np.asarray(getattr(self, name))
            np.save(unfinished / f"{name}.npy", array - array[0] if name == "entry_ptr" else array, allow_pickle=False)
        scalars = {k: int(getattr(self, k)) for k in ("first_cluster", "first_node", "num_sparse")}
        (unfinished / "part.json").write_text(json.dumps(scalars))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)

    @classmethod
    def load(cls, folder: Path) -> WeightPart:
        """Open the folder, memory-mapped.

        Raises:
            ValueError: a file is missing, damaged, or does not fit the others.
        """
        arrays: dict[str, Any] = {name: _open(folder / f"{name}.npy") for name in _ARRAYS}
        meta = folder / "part.json"
        try:
            scalars: dict[str, Any] = {k: int(v) for k, v in json.loads(meta.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{meta}: damaged ({error}); train this level again") from error
        try:
            return cls(**scalars, **arrays)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: damaged ({error}); train this level again") from error


def _clusters_of(child_ptr: NDArray[np.int64], start: int, stop: int) -> tuple[int, int]:
    """Half-open range of the clusters that have a child in ``[start, stop)``; empty for no nodes."""
    if start >= stop:
        first = int(np.searchsorted(child_ptr, start, side="left"))
        return first, first
    first = int(np.searchsorted(child_ptr, start, side="right")) - 1
    return first, int(np.searchsorted(child_ptr, stop, side="left"))


def _open(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); train this level again") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: not an array file; train this level again")
    return array.view(np.ndarray)
