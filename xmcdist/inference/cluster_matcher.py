"""The fine-tuned encoder's head at prediction: it finds a document's clusters, the rankers go on from there.

The head's rows are dense rankers over the encoder's embedding, which unlike theirs is not
brought to unit length.  So they are kept, memory-mapped, searched and shared out over ranks
as a `LinearTree` of the tree's first levels: without torch, and with the same bits whatever
the block, the thread or the rank.

Letters: N documents, d width of the encoder, K_t nodes of level t, m levels with a head.

Source: X-Transformer (Chang et al., KDD 2020, arXiv:1905.02331): the matcher retrieves
clusters, and rankers score the labels of those alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.inference.beam import beam_search
from xmcdist.inference.selected import nodes_above, score_selected
from xmcdist.rankers.model import LinearTree
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.features import Features
from xmcdist.trees.label_tree import LabelTree

__all__ = ["ClusterMatcher"]


@dataclass(frozen=True, eq=False)
class ClusterMatcher:
    """Head rows of the levels 1..m of a label tree.

    Attributes:
        head: their rows; whole, or one rank's part of them.
        is_part: the latter; `clusters` is then collective.
    """

    head: LinearTree
    is_part: bool = False

    @classmethod
    def from_rows(
        cls, tree: LabelTree, rows: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]], post_processor: str
    ) -> ClusterMatcher:
        """The head of a finished matcher.

        Args:
            tree: T levels, T >= m.
            rows: of each of the m levels weights ``[K_t, d]`` and bias terms ``[K_t]``.
            post_processor: from a row's output to a score, which is combined with the parent's
                as rankers do.

        Raises:
            ValueError: rows do not fill a level.

        Memory: a copy of the rows.
        """
        levels = [
            LevelWeights.from_rows(None, np.asarray(W, np.float32), np.asarray(b, np.float32), child_ptr)
            for (W, b), child_ptr in zip(rows, tree.child_ptr, strict=False)
        ]
        above = tree.truncate(len(levels))
        made = cls(LinearTree(above, levels, 0, rows[0][0].shape[1], post_processor, post_processor))
        if not made.head.is_whole:
            raise ValueError(f"rows of {[level.num_nodes for level in levels]} nodes do not fill the tree's levels")
        return made

    @property
    def num_levels(self) -> int:
        """m."""
        return self.head.last_level

    def save(self, folder: Path | str) -> None:
        """Write all rows, from one process."""
        self.head.save(folder)

    @classmethod
    def load(cls, folder: Path | str, *, verify: bool = False) -> ClusterMatcher:
        """Open what `save` wrote, memory-mapped; see `LinearTree.load`."""
        return cls(LinearTree.load(folder, verify=verify))

    def part(self, rank: int, world_size: int) -> ClusterMatcher:
        """One rank's contiguous range of every level's rows."""
        return ClusterMatcher(self.head.part(rank, world_size), is_part=True)

    def clusters(self, E: NDArray[np.float32], beam: int, *, threads: int | None = None) -> sp.csr_matrix:
        """The best nodes of level m, found by a beam search down the head's levels.

        Args:
            E: the encoder's embeddings ``[N, d]``, not of unit length; of a part: of the own
                documents.
            beam: nodes kept a level.

        Returns:
            ``[N, K_m]`` CSR float32, at most ``beam`` entries a row: what a search of the
            rankers starts from.

        Cost: a document and level, children of the kept nodes times d.
        """
        search: Any = beam_search
        if self.is_part:
            from xmcdist.inference.sharded import beam_search_sharded

            search = beam_search_sharded
        found: sp.csr_matrix = search(self.head, _dense(E), beam=beam, topk=beam, threads=threads)
        return found

    def scores_above(self, E: NDArray[np.float32], rankers: LinearTree, selected: sp.csr_matrix) -> sp.csr_matrix:
        """Scores of the clusters of level m that given labels lie in, however poorly they do.

        Args:
            rankers: of the levels below m.
            selected: ``[N, L]``; its stored entries are the labels.

        Returns:
            ``[N, K_m]`` CSR float32, for `score_selected` to start from.
        """
        return score_selected(self.head, _dense(E), nodes_above(rankers, selected))


def _dense(E: NDArray[np.float32]) -> Features:
    return Features(sparse=None, dense=np.asarray(E, np.float32))
