"""The weights of one tree level, as one or several parts.

Each rank writes the contiguous range of nodes it solved as one part, a file of its own;
readers take the parts as they are, memory-mapped.  Nothing is ever merged on disk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.rankers.part import WeightPart

__all__ = ["LevelWeights"]


@dataclass(frozen=True)
class LevelWeights:
    """Weights of the nodes ``[first_node, first_node + n)`` of a level: adjoining parts, in node order.

    Raises:
        ValueError: there are no parts, they do not adjoin, or they differ in width or type.
    """

    parts: tuple[WeightPart, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a level needs at least one part")
        for before, after in zip(self.parts, self.parts[1:], strict=False):
            end = before.first_node + before.num_nodes
            if after.first_node != end:
                raise ValueError(f"a part starts at node {after.first_node}, the one before ends at {end}")
            if (after.num_sparse, after.num_dense) != (before.num_sparse, before.num_dense):
                raise ValueError(
                    f"parts for {before.num_sparse}+{before.num_dense} and for "
                    f"{after.num_sparse}+{after.num_dense} features"
                )
            if after.dtype != before.dtype:
                raise ValueError(f"parts of {before.dtype} and of {after.dtype} weights")

    @property
    def first_node(self) -> int:
        return self.parts[0].first_node

    @property
    def num_nodes(self) -> int:
        return sum(p.num_nodes for p in self.parts)

    @property
    def num_sparse(self) -> int:
        return self.parts[0].num_sparse

    @property
    def num_dense(self) -> int:
        return self.parts[0].num_dense

    @property
    def nnz(self) -> int:
        """Stored sparse weights."""
        return sum(p.nnz for p in self.parts)

    @property
    def dtype(self) -> str:
        """Of the weights, a key of `xmcdist.rankers.part.DTYPES`."""
        return self.parts[0].dtype

    def astype(self, dtype: str) -> LevelWeights:
        """The same with weights of another type; see `WeightPart.astype`."""
        return LevelWeights(tuple(p.astype(dtype) for p in self.parts))

    def dense_rows(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Dense weights ``[n, d]`` and bias terms ``[n]``: the head a matcher starts from."""
        return np.concatenate([p.dense_rows() for p in self.parts]), np.concatenate([p.bias_rows() for p in self.parts])

    def sparse_rows(self) -> sp.csr_matrix:
        """Sparse weights node by node, ``[n, D]`` CSR float32."""
        return sp.csr_matrix(sp.vstack([p.sparse_rows() for p in self.parts], format="csr"))

    @classmethod
    def from_rows(
        cls,
        sparse: sp.csr_matrix | None,
        dense: NDArray[np.float32] | None,
        bias: NDArray[np.float32],
        child_ptr: NDArray[np.int64],
        first_node: int = 0,
    ) -> LevelWeights:
        """Weights given node by node; see `WeightPart.from_rows`."""
        return cls((WeightPart.from_rows(sparse, dense, bias, child_ptr, first_node),))

    @classmethod
    def concat(cls, ranges: Sequence[LevelWeights]) -> LevelWeights:
        """Adjoining ranges of one level, in node order; nothing is copied."""
        return cls(tuple(p for level in ranges for p in level.parts))

    def node_weights(self, child_ptr: NDArray[np.int64]) -> NDArray[np.float64]:
        """Stored values of each cluster's children, sparse and dense, ``[K]``: what holding them costs.

        Args:
            child_ptr: ``[K+1]`` of this level in the tree.
        """
        children = np.diff(np.clip(child_ptr, self.first_node, self.first_node + self.num_nodes))
        stored = children * (self.num_dense + 1)
        for p in self.parts:
            stored[p.first_cluster : p.first_cluster + p.num_clusters] += p.cluster_weights()
        return stored.astype(np.float64)

    def cut(self, start: int, stop: int, child_ptr: NDArray[np.int64]) -> LevelWeights:
        """The nodes ``[start, stop)`` alone, views as far as possible; see `WeightPart.cut`."""
        parts = tuple(piece for p in self.parts for piece in p.cut(start, stop, child_ptr))
        return LevelWeights(parts or (WeightPart.empty(start, child_ptr, self.num_sparse, self.num_dense, self.dtype),))

    def save(self, folder: Path | str, part: int = 0, parts: int = 1) -> None:
        """Write this range as one part of a level; any rank may do so for its own.

        Args:
            folder: of the level, shared by all its parts.
            part: number of this part, in node order.
            parts: how many parts the level has; with 1, a range of several is kept as several.
        """
        if parts == 1:
            names = [_name(i, len(self.parts)) for i in range(len(self.parts))]
        elif len(self.parts) == 1:
            names = [_name(part, parts)]
        else:
            raise ValueError(f"part {part} of {parts} itself has {len(self.parts)} parts")
        for name, weights in zip(names, self.parts, strict=True):
            weights.save(Path(folder) / name)

    @classmethod
    def load(cls, folder: Path | str, *, verify: bool = False) -> LevelWeights:
        """All parts of a level, memory-mapped.

        Args:
            verify: read all of them and compare with their checksums.

        Raises:
            ValueError: a part is missing or damaged, or parts of different runs are mixed.
        """
        folder = Path(folder)
        found = sorted(p.name for p in folder.glob("part-*-of-*"))
        count = re.search(r"of-(\d+)\.safetensors$", found[0]) if found else None
        if count is None or found != [_name(i, int(count[1])) for i in range(int(count[1]))]:
            raise ValueError(f"{folder}: holds {found or 'no parts'}, not all parts of one level; train it again")
        parts = tuple(WeightPart.load(folder / name, verify=verify) for name in found)
        try:
            return cls(parts)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}; train this level again") from error


def _name(part: int, parts: int) -> str:
    return f"part-{part:05d}-of-{parts:05d}.safetensors"
