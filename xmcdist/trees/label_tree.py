"""The label tree: clusters of clusters of labels, every level numbered in tree order.

Letters: T levels below the root, K_t nodes of level t (K_0 = 1, the root), S = K_T slots
that hold the L labels.  Children of a node are neighbours, so whole clusters are one
contiguous range of the level below, and a rank may own them as a range.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.sparse.csr import as_csr, binarize
from xmcdist.sparse.store import StoreError, open_array
from xmcdist.trees.errors import TreeError

__all__ = ["LabelTree"]

I64 = NDArray[np.int64]
_FORMAT = 1


@dataclass(frozen=True, slots=True, eq=False)
class LabelTree:
    """An immutable tree; a slot of its last level holds one label.

    A partition has S == L slots.  A label may also have several slots, in different
    clusters; none may have no slot.  Clusters may be empty.

    Attributes:
        child_ptr: for t = 1..T at index t - 1, int64 ``[K_{t-1} + 1]``: the children of
            node p of level t - 1 are nodes ``child_ptr[t-1][p] : child_ptr[t-1][p+1]``.
        labels: int64 ``[S]``, the label of each slot.
        num_labels: L.

    Raises:
        TreeError: the arrays do not make a tree.
    """

    child_ptr: list[I64]
    labels: I64
    num_labels: int

    def __post_init__(self) -> None:
        if not self.child_ptr:
            raise TreeError("a label tree needs at least one level")
        nodes = 1
        for t, ptr in enumerate(self.child_ptr, start=1):
            if len(ptr) != nodes + 1 or ptr[0] != 0 or np.any(np.diff(ptr) < 0):
                raise TreeError(f"level {t} of the label tree does not hang below the {nodes} nodes of level {t - 1}")
            nodes = int(ptr[-1])
        if len(self.labels) != nodes:
            raise TreeError(f"the label tree has {nodes} slots for {len(self.labels)} labels")
        if nodes and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_labels:
            raise TreeError(f"the label tree holds label ids outside 0..{self.num_labels - 1}")
        missing = np.flatnonzero(np.bincount(self.labels, minlength=self.num_labels) == 0)
        if len(missing):
            raise TreeError(f"{len(missing)} labels have no place in the label tree, the first is label {missing[0]}")

    @property
    def depth(self) -> int:
        """T."""
        return len(self.child_ptr)

    @property
    def is_partition(self) -> bool:
        """Whether every label has exactly one slot."""
        return len(self.labels) == self.num_labels

    def level_size(self, t: int) -> int:
        """K_t; ``level_size(0) == 1``, ``level_size(depth) == S``."""
        self._check_level(t, lowest=0)
        return 1 if t == 0 else int(self.child_ptr[t - 1][-1])

    def parents(self, t: int) -> I64:
        """Node of level t - 1 above each node of level t, int64 ``[K_t]``, rising."""
        self._check_level(t)
        ptr = self.child_ptr[t - 1]
        return np.repeat(np.arange(len(ptr) - 1, dtype=np.int64), np.diff(ptr))

    def slot_ptr(self, t: int) -> I64:
        """Slots below each node of level t: int64 ``[K_t + 1]``, node p has ``ptr[p] : ptr[p + 1]``."""
        self._check_level(t, lowest=0)
        if t == self.depth:
            return np.arange(len(self.labels) + 1, dtype=np.int64)
        ptr = self.child_ptr[t]
        for below in self.child_ptr[t + 1 :]:
            ptr = below[ptr]
        return ptr

    def slot_to_node(self, t: int) -> I64:
        """Node of level t above each slot, int64 ``[S]``, rising; level T: the slots themselves."""
        ptr = self.slot_ptr(t)
        return np.repeat(np.arange(len(ptr) - 1, dtype=np.int64), np.diff(ptr))

    def slots_of(self, label: int) -> I64:
        """Slots that hold a label, int64, rising."""
        return np.flatnonzero(self.labels == label).astype(np.int64)

    def lift(self, Y: sp.csr_matrix, t: int) -> sp.csr_matrix:
        """Labels of documents as nodes of level t: how many positive slots each node has below it.

        Args:
            Y: ``[N, L]``; a stored value other than zero is a positive label.
            t: level, 1..T; at T the columns are slots.

        Returns:
            ``[N, K_t]`` float32 counts, columns in tree order.

        Raises:
            TreeError: Y has another number of labels, or there is no level t.

        Cost: O(nnz(Y)) time and memory, besides a sort of every row.
        """
        if Y.shape[1] != self.num_labels:
            raise TreeError(f"{Y.shape[1]} labels given to a label tree of {self.num_labels}")
        lifted = sp.csr_matrix(binarize(Y) @ self._membership(t), dtype=np.float32)
        lifted.sum_duplicates()
        return lifted

    def truncate(self, t: int) -> LabelTree:
        """The tree down to level t, whose nodes become the labels."""
        self._check_level(t)
        nodes = self.level_size(t)
        return LabelTree(self.child_ptr[:t], np.arange(nodes, dtype=np.int64), nodes)

    def chain(self) -> list[sp.csr_matrix]:
        """Cluster chain C_1..C_T, C_t ``[K_t, K_{t-1}]`` float32 ones, as PECOS has it.

        Rows of C_T are label ids (``[L, K_{T-1}]``), all other rows and columns tree order.
        """
        inner = [_ones(np.arange(self.level_size(t)), self.parents(t), self._shape(t)) for t in range(1, self.depth)]
        last = _ones(self.labels, self.parents(self.depth), (self.num_labels, self.level_size(self.depth - 1)))
        return [*inner, last]

    @classmethod
    def from_chain(cls, chain: list[Any], what: str = "the given tree") -> LabelTree:
        """A tree from cluster matrices, its nodes renumbered to tree order.

        Args:
            chain: C_1..C_T from the coarsest to the labels, C_t ``[K_t, K_{t-1}]``: node i
                of level t lies in node j of the level above where C_t[i, j] is not zero.
                C_1 may leave out the root.  Nodes without children are allowed.  A row of
                C_T, a label, may lie in several clusters; other nodes in one.
            what: how messages call the tree, best with its place.

        Raises:
            TreeError: no matrix, shapes that do not chain, a node without a parent or an
                inner node with several, a value that is not finite.
        """
        if not chain:
            raise TreeError(f"{what} has no cluster matrix")
        try:
            matrices = [binarize(as_csr(C, f"{what}: C_{t}")) for t, C in enumerate(chain, start=1)]
        except ValueError as error:
            raise TreeError(str(error)) from error
        if matrices[0].shape[1] != 1:
            top = matrices[0].shape[1]
            matrices.insert(0, _ones(np.arange(top), np.zeros(top, dtype=np.int64), (top, 1)))
        _check_chain(matrices, what)
        place = np.zeros(1, dtype=np.int64)  # tree-order number of each node of the level above
        child_ptr: list[I64] = []
        order = place
        for C in matrices:
            rows, above = C.nonzero()
            by_parent = np.lexsort((rows, place[above]))
            order = rows[by_parent].astype(np.int64)
            counts = np.bincount(place[above], minlength=C.shape[1])
            child_ptr.append(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
            place = np.empty(len(order), dtype=np.int64)
            if C is not matrices[-1]:
                place[order] = np.arange(len(order))
        return cls(child_ptr, order, int(matrices[-1].shape[0]))

    def save(self, folder: Path | str) -> None:
        """Write ``child_ptr-<t>.npy``, ``labels.npy`` and, last, ``tree.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for t, ptr in enumerate(self.child_ptr, start=1):
            np.save(folder / f"child_ptr-{t}.npy", ptr)
        np.save(folder / "labels.npy", self.labels)
        about = {"format": _FORMAT, "num_labels": self.num_labels, "depth": self.depth, "fingerprint": self.fingerprint}
        (folder / "tree.json").write_text(json.dumps(about, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> LabelTree:
        """Read what `save` wrote.

        Raises:
            TreeError: a file is missing or damaged, or of a newer format.
        """
        folder = Path(folder)
        path = folder / "tree.json"
        try:
            about = json.loads(path.read_text())
            if about["format"] != _FORMAT:
                raise TreeError(f"{path} has format {about['format']}; this version reads format {_FORMAT}")
            arrays = [
                np.array(open_array(folder / name, "int64"))
                for name in [*(f"child_ptr-{t}.npy" for t in range(1, int(about["depth"]) + 1)), "labels.npy"]
            ]
            tree = cls(arrays[:-1], arrays[-1], int(about["num_labels"]))
        except FileNotFoundError:
            raise TreeError(f"{path} is missing: {folder} holds no label tree") from None
        except StoreError as error:
            raise TreeError(str(error)) from error
        except TreeError as error:
            raise TreeError(f"{folder}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise TreeError(f"{path} is damaged: {error}") from error
        if tree.fingerprint != about.get("fingerprint"):
            raise TreeError(f"{folder} is damaged: its arrays are not those that were saved")
        return tree

    @property
    def fingerprint(self) -> str:
        """Sha256 of all arrays: equal trees, equal prints, on any machine."""
        digest = hashlib.sha256()
        for array in (np.array([self.num_labels, self.depth]), *self.child_ptr, self.labels):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()

    def _membership(self, t: int) -> sp.csr_matrix:
        """Label by node of level t ``[L, K_t]``: in how many slots below the node the label is."""
        self._check_level(t)
        return _ones(self.labels, self.slot_to_node(t), (self.num_labels, self.level_size(t)))

    def _shape(self, t: int) -> tuple[int, int]:
        return self.level_size(t), self.level_size(t - 1)

    def _check_level(self, t: int, lowest: int = 1) -> None:
        if not lowest <= t <= self.depth:
            raise TreeError(f"there is no level {t}: the label tree has levels {lowest} to {self.depth}")


def _check_chain(matrices: list[sp.csr_matrix], what: str) -> None:
    """Refuse matrices that are no tree of single parents above the labels."""
    columns = 1
    for t, C in enumerate(matrices, start=1):
        last = t == len(matrices)
        kind = "label" if last else f"node of level {t}:"
        if C.shape[1] != columns:
            raise TreeError(
                f"{what}: level {t} is {C.shape[0]} x {C.shape[1]}, but the level above has {columns} nodes; "
                "rows are nodes, columns their parents"
            )
        parents = np.diff(C.indptr)
        if np.any(parents == 0):
            raise TreeError(f"{what}: {kind} {int(np.argmin(parents))} lies in no cluster; give each exactly one")
        if not last and np.any(parents > 1):
            raise TreeError(
                f"{what}: {kind} {int(np.argmax(parents > 1))} has {parents.max()} parents; only labels may"
            )
        columns = C.shape[0]


def _ones(rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    A = sp.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, cols)), shape=shape)
    A.sum_duplicates()
    return A
