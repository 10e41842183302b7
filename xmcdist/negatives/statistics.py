"""What a matcher's beams say of each cluster, counted over the documents of all ranks.

Everything is counted in integers (scores in fixed point, see `xmcdist.negatives.confusions`),
so that the statistics have the same bits on any number of ranks.

Letters: n documents of this rank, K clusters, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch.distributed as dist
from numpy.typing import NDArray

from xmcdist.checkpoint.atomic import no_space_is_clear
from xmcdist.negatives.confusions import SCORE_UNIT, Beams, Confusions, collect_confusions, fixed_point
from xmcdist.observability.compiling import njit
from xmcdist.parallel.collectives import all_reduce_array, group_size
from xmcdist.sparse.store import StoreError, open_array

__all__ = ["ClusterStatistics", "collect_statistics"]

I64 = NDArray[np.int64]

_MOST_DOCS = 1 << 31  # a cluster's fixed-point mass fits int64 below this many documents


@dataclass(frozen=True, slots=True)
class ClusterStatistics:
    """Counts of every cluster, each int64 ``[K]``, over all documents.

    Attributes:
        positives: documents that have the cluster.
        retrieved: documents whose beam holds it.
        hits: documents of which both are true.
        false_mass: scores of its wrong retrievals, summed, in units of ``1 / SCORE_UNIT``.
    """

    positives: I64
    retrieved: I64
    hits: I64
    false_mass: I64

    @property
    def misses(self) -> I64:
        """Documents that have the cluster and whose beam does not hold it."""
        return self.positives - self.hits

    @property
    def false_score(self) -> NDArray[np.float64]:
        """`false_mass` as a sum of scores."""
        return self.false_mass / float(SCORE_UNIT)

    @property
    def beam_recall(self) -> float:
        """Share of the (document, true cluster) pairs that the beams hold; 0 when there are none."""
        return int(self.hits.sum()) / max(int(self.positives.sum()), 1)

    def hardest(self, by: str, most: int) -> I64:
        """Clusters with the most of something, ties to the smaller id; those with none are left out.

        Args:
            by: ``misses`` or ``false_mass``.
            most: length of the answer, at most.

        Raises:
            ValueError: another ``by``.
        """
        if by not in ("misses", "false_mass"):
            raise ValueError(f"by={by!r} is none of misses, false_mass")
        amount: I64 = getattr(self, by)
        order = np.argsort(-amount, kind="stable")[:most]
        return order[amount[order] > 0]

    def save(self, path: Path) -> None:
        """Write one ``.npy``, int64 ``[4, K]``; equal on all ranks, so one rank writes it."""
        with no_space_is_clear(path):
            np.save(path, np.stack([self.positives, self.retrieved, self.hits, self.false_mass]))

    @classmethod
    def load(cls, path: Path) -> ClusterStatistics:
        """What `save` wrote, memory-mapped.

        Raises:
            StoreError: the file is missing or damaged.
        """
        rows = open_array(path, "int64", ndim=2)
        if len(rows) != 4:
            raise StoreError(f"{path} is damaged: {len(rows)} rows where 4 belong")
        return cls(*rows)


def collect_statistics(
    P: sp.csr_matrix,
    Y: sp.csr_matrix,
    cuts: Sequence[int],
    *,
    per_cluster: int,
    group: dist.ProcessGroup | None = None,
    room: int = 1 << 22,
) -> tuple[ClusterStatistics, Confusions]:
    """Count the beams of all ranks' documents; collective.

    Args:
        P: beams of this rank's documents ``[n, K]``, scores in [0, 1], indices ascending;
            every stored entry counts as retrieved, also one whose score is 0.
        Y: their true clusters ``[n, K]``, indices ascending; an entry above 0 counts.
        cuts: ``[W + 1]``, ascending from 0 to K; rank r of the group owns the true clusters
            ``cuts[r] : cuts[r + 1]`` and gets their confusions.  A range may be empty.
        per_cluster: most wrong clusters kept for a true one.
        group: the ranks over which the documents are parted; default all.
        room: see `collect_confusions`.

    Returns:
        The statistics of all clusters, on every rank; the confusions of this rank's own.

    Raises:
        ValueError: shapes or cuts that do not fit, indices not ascending, a score that is
            not in [0, 1], ``per_cluster`` or ``room`` below 1, 2**31 documents or more.

    Cost: O(nnz(P) + nnz(Y) + sum over documents of true clusters times wrong ones);
    memory beside P and Y: O(nnz(P) bytes + nnz(Y) + K + room).
    """
    _check(P, Y, cuts, per_cluster, room, group_size(group))
    num_docs, num_clusters = P.shape
    Y = _positive(Y)
    counts, wrong = np.zeros((4, num_clusters), np.int64), np.zeros(P.nnz, dtype=np.bool_)
    score = np.asarray(P.data, dtype=np.float32)
    _count((P.indptr, np.asarray(P.indices), score), (Y.indptr, np.asarray(Y.indices)), counts, wrong)
    by_cluster = sp.csr_matrix((np.ones(Y.nnz, np.int8), Y.indices, Y.indptr), shape=Y.shape).tocsc()
    beams = Beams(P.indptr, np.asarray(P.indices), score, wrong, by_cluster.indptr, by_cluster.indices)
    sums = all_reduce_array(np.concatenate([counts.reshape(-1), beams.pairs(), [num_docs]]), group)
    if sums[-1] >= _MOST_DOCS:
        raise ValueError(f"{sums[-1]} documents: statistics hold fewer than {_MOST_DOCS}")
    *totals, pairs = sums[:-1].reshape(5, num_clusters)
    return ClusterStatistics(*totals), collect_confusions(beams, pairs, cuts, per_cluster, group, room=room)


def _check(P: sp.csr_matrix, Y: sp.csr_matrix, cuts: Sequence[int], per_cluster: int, room: int, world: int) -> None:
    if P.shape != Y.shape:
        raise ValueError(f"beams are {P.shape} and true clusters {Y.shape}: both must be documents x clusters")
    if len(cuts) != world + 1 or cuts[0] != 0 or cuts[-1] != P.shape[1] or np.any(np.diff(cuts) < 0):
        raise ValueError(f"cuts {list(cuts)} do not part {P.shape[1]} clusters over {world} ranks")
    if per_cluster < 1 or room < 1:
        raise ValueError(f"per_cluster={per_cluster} and room={room} must be at least 1")
    for name, A in (("beams", P), ("true clusters", Y)):
        if not A.has_canonical_format:
            raise ValueError(f"indices of the {name} must ascend within a document")
    if P.nnz and not (P.data.min() >= 0 and P.data.max() <= 1):  # also false of NaN
        raise ValueError(f"scores must be in [0, 1]; found {P.data.min()} to {P.data.max()}")


def _positive(Y: sp.csr_matrix) -> sp.csr_matrix:
    """Y without the entries that are not above 0; itself when there are none."""
    keep = np.asarray(Y.data) > 0
    if keep.all():
        return Y
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep, dtype=np.int64)])
    return sp.csr_matrix((Y.data[keep], Y.indices[keep], before[Y.indptr]), shape=Y.shape)


@njit(cache=True)
def _count(
    P: tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]],
    Y: tuple[NDArray[Any], NDArray[Any]],
    counts: I64,
    wrong: NDArray[np.bool_],
) -> None:
    """Fill the four rows of counts, and mark the retrieved entries that are not true."""
    for i in range(P[0].size - 1):
        at, last = Y[0][i], Y[0][i + 1]
        for k in range(at, last):
            counts[0, Y[1][k]] += 1
        for k in range(P[0][i], P[0][i + 1]):
            w = P[1][k]
            counts[1, w] += 1
            while at < last and Y[1][at] < w:
                at += 1
            if at < last and Y[1][at] == w:
                counts[2, w] += 1
            else:
                wrong[k] = True
                counts[3, w] += fixed_point(P[2][k])
