"""Which wrong clusters a matcher retrieves for the documents of each true cluster.

For every document with true cluster c whose beam holds a wrong cluster w, the pair (c, w)
counts one and its mass grows by the score of w.  The owner of c puts the ranks' pairs
together and keeps the heaviest.

Scores are added up as integers, in units of 2**-32: integers have the same sum in every
order, so nothing depends on how many ranks the documents are spread over.  A score is at
most 1, so a sum of fewer than 2**31 of them fits int64; what is below 2**-33 rounds to 0.

Letters: n documents of this rank, K clusters, W ranks, p kept pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from xmcdist.checkpoint.parts import write_rows
from xmcdist.observability.compiling import njit
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.exchange import exchange
from xmcdist.parallel.launch import World
from xmcdist.sparse.store import StoreError, open_array

__all__ = ["SCORE_UNIT", "Beams", "Confusions", "collect_confusions", "fixed_point"]

I64 = NDArray[np.int64]

SCORE_UNIT = 1 << 32
"""How many units of fixed-point mass a score of 1 is."""

_FIELDS = ("ptr", "wrong", "count", "mass")


@dataclass(frozen=True, slots=True)
class Confusions:
    """The heaviest wrong clusters of a range of true clusters.

    A cluster's pairs come by falling mass, then falling count, then the smaller id.

    Attributes:
        start: the first true cluster.
        ptr: int64 ``[rows + 1]``; cluster ``start + r`` has pairs ``ptr[r] : ptr[r + 1]``.
        wrong: int64 ``[p]``, the wrong clusters.
        count: int64 ``[p]``, documents of the true cluster whose beam held the wrong one.
        mass: int64 ``[p]``, their scores of it, in units of ``1 / SCORE_UNIT``.
    """

    start: int
    ptr: I64
    wrong: I64
    count: I64
    mass: I64

    @property
    def num_clusters(self) -> int:
        """True clusters covered."""
        return len(self.ptr) - 1

    def true(self) -> I64:
        """The true cluster of every pair, int64 ``[p]``."""
        return self.start + np.repeat(np.arange(self.num_clusters, dtype=np.int64), np.diff(self.ptr))

    def mean_score(self) -> NDArray[np.float64]:
        """Mean score of the wrong cluster over the documents that it was retrieved for, ``[p]``."""
        return self.mass / (SCORE_UNIT * np.maximum(self.count, 1).astype(np.float64))

    def save(self, folder: Path, world: World) -> None:
        """Write the confusions of all clusters, of which every rank holds a part; collective.

        Args:
            folder: made when missing; ``ptr.npy``, ``wrong.npy``, ``count.npy``, ``mass.npy``.
            world: its ranks, in order, own consecutive ranges of all clusters.
        """
        folder.mkdir(parents=True, exist_ok=True)
        before = sum(gather_objects(len(self.wrong))[: world.rank])
        first = 0 if world.is_main else 1  # pointers of neighbouring parts share one entry
        write_rows(folder / "ptr.npy", self.ptr[first:] + before, world)
        for name in _FIELDS[1:]:
            write_rows(folder / f"{name}.npy", getattr(self, name), world)

    @classmethod
    def load(cls, folder: Path) -> Confusions:
        """The confusions of all clusters, memory-mapped, whatever number of ranks wrote them.

        Raises:
            StoreError: a file is missing or damaged.
        """
        ptr, wrong, count, mass = (open_array(folder / f"{name}.npy", "int64") for name in _FIELDS)
        if not len(ptr) or ptr[0] != 0 or np.any(np.diff(ptr) < 0):
            raise StoreError(f"{folder / 'ptr.npy'} is damaged: pointers do not rise from 0")
        for name, array in (("wrong", wrong), ("count", count), ("mass", mass)):
            if len(array) != ptr[-1]:
                raise StoreError(f"{folder / name}.npy is damaged: {len(array)} values where ptr.npy counts {ptr[-1]}")
        return cls(0, ptr, wrong, count, mass)


@dataclass(frozen=True, slots=True)
class Beams:
    """This rank's documents, as the counting kernels read them.

    Attributes:
        ptr: ``[n + 1]``, document i retrieved entries ``ptr[i] : ptr[i + 1]``.
        cluster: of every entry.
        score: float32, of every entry.
        wrong: bool, of every entry: not one of the document's true clusters.
        doc_ptr: ``[K + 1]``, cluster c is true for documents ``doc_ptr[c] : doc_ptr[c + 1]``.
        doc: those documents.
    """

    ptr: NDArray[Any]
    cluster: NDArray[Any]
    score: NDArray[np.float32]
    wrong: NDArray[np.bool_]
    doc_ptr: NDArray[Any]
    doc: NDArray[Any]

    def pairs(self) -> I64:
        """(document, wrong cluster) pairs of every true cluster, int64 ``[K]``."""
        up_to = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.wrong, dtype=np.int64)])
        of_doc = np.diff(up_to[self.ptr])
        up_to = np.concatenate([np.zeros(1, np.int64), np.cumsum(of_doc[self.doc], dtype=np.int64)])
        pairs: I64 = np.diff(up_to[self.doc_ptr])
        return pairs


def collect_confusions(
    beams: Beams,
    pairs: I64,
    cuts: Sequence[int],
    per_cluster: int,
    group: dist.ProcessGroup | None = None,
    *,
    room: int = 1 << 22,
) -> Confusions:
    """Merge all ranks' confusions at the owners of the true clusters; collective.

    True clusters are worked through in rounds, so that a rank never holds all pairs at once.

    Args:
        beams: this rank's documents.
        pairs: `Beams.pairs` summed over ranks.
        cuts: ``[W + 1]``; rank r owns the true clusters ``cuts[r] : cuts[r + 1]``.
        per_cluster: most wrong clusters kept for a true one.
        group: the ranks.
        room: pairs that an owner receives in a round, unless a single cluster has more.
            Neither this nor the number of ranks changes the result.

    Returns:
        Those of this rank's own clusters.

    Cost: O(sum over documents of true clusters times wrong ones), and O(per_cluster) for each of
    the few that displace a kept one; memory O(room + K) when the
    documents are spread evenly over the ranks, at worst O(W room + K).
    """
    world, num_clusters = len(cuts) - 1, len(pairs)
    rank = dist.get_rank(group) if world > 1 else 0
    most = np.minimum(pairs, num_clusters * world)  # what can reach the owner of a cluster
    edges = [_edges(most, cuts[r], cuts[r + 1], room) for r in range(world)]
    local = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.minimum(beams.pairs(), num_clusters))])
    kept: list[tuple[I64, I64]] = [(np.zeros(0, np.int64), np.zeros((0, 3), np.int64))]
    for turn in range(max(len(e) for e in edges) - 1):
        spans = [(e[min(turn, len(e) - 1)], e[min(turn + 1, len(e) - 1)]) for e in edges]
        found = [_local(beams, a, b, int(local[b] - local[a]), num_clusters) for a, b in spans]
        lengths = exchange([length for length, _ in found], group)
        triples = exchange([triple for _, triple in found], group)
        kept.append(_heaviest(lengths, triples, per_cluster, num_clusters))
    ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([length for length, _ in kept]))])
    wrong, count, mass = np.ascontiguousarray(np.concatenate([triple for _, triple in kept]).T)
    return Confusions(int(cuts[rank]), ptr, wrong, count, mass)


def _edges(most: I64, start: int, stop: int, room: int) -> list[int]:
    """Cut an owner's clusters into ranges of at most ``room`` pairs, or of one cluster."""
    up_to = np.cumsum(most[start:stop])
    edges, before = [start], 0
    while edges[-1] < stop:
        fit = start + int(np.searchsorted(up_to, before + room, side="right"))
        edges.append(max(fit, edges[-1] + 1))
        before = int(up_to[edges[-1] - start - 1])
    return edges


def _local(beams: Beams, start: int, stop: int, room: int, num_clusters: int) -> tuple[I64, I64]:
    """This rank's pairs of some true clusters: how many of each, and (wrong, count, mass) of all."""
    length, triples = np.zeros(stop - start, np.int64), np.zeros((room, 3), np.int64)
    if not room:
        return length, triples
    place = np.full(num_clusters, -1, np.int64)
    b = beams
    end = _pairs_of(start, stop, (b.doc_ptr, b.doc), (b.ptr, b.cluster, b.score, b.wrong), length, triples, place)
    return length, triples[:end]


def _heaviest(lengths: list[I64], triples: list[I64], keep: int, num_clusters: int) -> tuple[I64, I64]:
    """Add up the ranks' pairs of each row; how many are left of each, and the heaviest in order."""
    each = np.stack(lengths)  # [W, rows]
    ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(each)])
    total = each.sum(axis=0)
    best = np.empty((int(np.minimum(total, keep).sum()), 3), np.int64)
    scratch = np.empty((int(np.minimum(total, num_clusters).max(initial=0)), 3), np.int64)
    length = np.zeros(each.shape[1], np.int64)
    end = _merge(ptr, np.concatenate(triples), keep, np.zeros(num_clusters, np.int64), scratch, length, best)
    return length, best[:end]


@njit(cache=True)
def fixed_point(score: np.float32) -> np.int64:
    """A score in units of ``1 / SCORE_UNIT``, rounded to the nearest, halves to the even one."""
    return np.int64(np.rint(np.float64(score) * 4294967296.0))


@njit(cache=True)
def _pairs_of(
    start: int,
    stop: int,
    true: tuple[NDArray[Any], NDArray[Any]],
    beams: tuple[NDArray[Any], NDArray[Any], NDArray[np.float32], NDArray[np.bool_]],
    length: I64,
    triples: I64,
    place: I64,
) -> int:
    """Add up the wrong clusters of the documents of true clusters ``start : stop``.

    ``place[w]`` is where w was last put; below a row's beginning it is of an earlier row.
    """
    end = 0
    for c in range(start, stop):
        begin = end
        for a in range(true[0][c], true[0][c + 1]):
            i = true[1][a]
            for k in range(beams[0][i], beams[0][i + 1]):
                if not beams[3][k]:
                    continue
                w = beams[1][k]
                at = place[w]
                if at < begin:
                    at = end
                    place[w] = at
                    triples[at, 0] = w
                    end += 1
                triples[at, 1] += 1
                triples[at, 2] += fixed_point(beams[2][k])
        length[c - start] = end - begin
    return end


@njit(cache=True)
def _heavier(a: I64, b: I64) -> bool:
    """Whether pair ``a`` comes before ``b``: more mass, then more documents, then the smaller id."""
    if a[2] != b[2]:
        return bool(a[2] > b[2])
    if a[1] != b[1]:
        return bool(a[1] > b[1])
    return bool(a[0] < b[0])


@njit(cache=True)
def _merge(ptr: I64, triples: I64, keep: int, place: I64, sums: I64, length: I64, best: I64) -> int:
    """Row by row: sums over ranks, then the ``keep`` heaviest by insertion.

    Rank r's pairs of a row are ``ptr[r * rows + row]`` to the next.  ``place[w]`` is where w's
    sum is if that place is in use and holds w: so nothing needs to be cleared between rows.
    """
    rows, end = length.size, 0
    for row in range(rows):
        distinct, begin = 0, end
        for slot in range(row, ptr.size - 1, rows):
            for k in range(ptr[slot], ptr[slot + 1]):
                w = triples[k, 0]
                at = place[w]
                if at >= distinct or sums[at, 0] != w:
                    at = distinct
                    place[w] = at
                    sums[at, 0], sums[at, 1], sums[at, 2] = w, 0, 0
                    distinct += 1
                sums[at, 1] += triples[k, 1]
                sums[at, 2] += triples[k, 2]
        for k in range(distinct):
            if end - begin < keep:
                end += 1
            elif not _heavier(sums[k], best[end - 1]):
                continue
            at = end - 1
            while at > begin and _heavier(sums[k], best[at - 1]):
                best[at] = best[at - 1]
                at -= 1
            best[at] = sums[k]
        length[row] = end - begin
    return end
