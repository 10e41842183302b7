"""Labels in several clusters: each goes into the clusters that are retrieved for its documents.

``counts[l, c]`` is how many documents of label l a trained model retrieves leaf cluster c
for: Y^T M over the training documents.  A label takes its ``copies`` clusters with the
largest counts.  That maximises the number of (document, label) pairs whose label lies in a
retrieved cluster, each copy counted.

Letters: N documents, L labels, K leaf clusters, W ranks, S slots, m (label, cluster) pairs.

Source: Liu et al., Label Disentanglement in Partition-based Extreme Multilabel
Classification (NeurIPS 2021), section 4; amzn/pecos ``examples/overlap-xmc``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range
from xmcdist.trees.errors import TreeError
from xmcdist.trees.label_tree import LabelTree

__all__ = ["Assignment", "assign", "count_matches"]

I64 = NDArray[np.int64]

_ROOM = 1 << 24  # (document's label, document's cluster) pairs multiplied at a time


@dataclass(frozen=True, slots=True)
class Assignment:
    """A tree whose labels lie where they are retrieved.

    Attributes:
        tree: the levels of clusters that it was made from, other slots.
        unmatched: labels for whose documents nothing is retrieved, or that have none; they
            stayed where they were.
        crowded_out: labels that no cluster with room is retrieved for; they stayed, too.
    """

    tree: LabelTree
    unmatched: int
    crowded_out: int


def count_matches(
    Y: sp.csr_matrix, M: sp.csr_matrix, world: World | None = None, *, keep: int | None = None, room: int = _ROOM
) -> sp.csr_matrix:
    """For how many documents of each label each cluster is retrieved; collective.

    Args:
        Y: labels of this rank's documents ``[n, L]``; a value other than zero is a label.
        M: clusters retrieved for them ``[n, K]``; every stored entry counts, whatever its value.
        world: default one process.  Rank r gets the labels ``row_range(L, r, W)``.
        keep: only the largest so many of a label, ties to the smaller cluster; None: all.
        room: pairs that a rank multiplies at a time, about; changes nothing in the result.

    Returns:
        int64 ``[own labels, K]``, clusters ascending in a row.

    Raises:
        ValueError: Y and M hold different numbers of documents.

    Cost: O(sum over documents of labels times clusters).  Memory: ``room``, and what is kept.
    """
    world = world or World.single()
    if Y.shape[0] != M.shape[0]:
        raise ValueError(f"labels of {Y.shape[0]} documents and clusters of {M.shape[0]}")
    num_labels, ranks = int(Y.shape[1]), world.world_size
    labels = _ones_where(Y, np.asarray(Y.data) != 0).T.tocsr()
    found = _ones_where(M, np.ones(M.nnz, bool))
    pairs = int(np.diff(Y.indptr).astype(np.int64) @ np.diff(M.indptr).astype(np.int64))
    turns = max(_gathered(-(-pairs // room), world), default=1) or 1
    own = [row_range(num_labels, r, ranks) for r in range(ranks)]
    parts = []
    for turn in range(turns):
        spans = [tuple(a + cut for cut in row_range(b - a, turn, turns)) for a, b in own]
        block = sp.csr_matrix(sp.vstack([labels[a:b] @ found for a, b in spans], format="csr"))
        if ranks > 1:
            from xmcdist.parallel.exchange import reduce_csr

            block = reduce_csr(block, np.concatenate([[0], np.cumsum([b - a for a, b in spans])]).tolist())
        block.sort_indices()
        parts.append(block if keep is None else _largest(block, keep))
    return sp.csr_matrix(sp.vstack(parts, format="csr"), dtype=np.int64)


def assign(
    tree: LabelTree,
    counts: sp.csr_matrix,
    copies: int,
    max_cluster_size: int | None = None,
    world: World | None = None,
) -> Assignment:
    """The tree in which every label lies in its ``copies`` most retrieved clusters; collective.

    Ties of counts go to the smaller cluster.  A label without counts keeps its clusters.

    With ``max_cluster_size`` the (label, cluster) pairs are taken greedily by falling count,
    ties to the smaller label, then the smaller cluster; a pair is passed over where its label
    has all its copies or its cluster is full.  Labels that keep their clusters for want of
    counts take their places there first.  A label that finds all its clusters full keeps
    those it was in, so these may hold more than ``max_cluster_size``.

    Args:
        tree: with at least one level of clusters above the labels.
        counts: of this rank's labels ``row_range(L, rank, W)``, ``[own, K]``, as `count_matches`
            gives them; without ``max_cluster_size`` the largest ``copies`` of a label suffice.
        copies: most clusters a label lies in.
        max_cluster_size: most labels that a cluster is given; None: any number.
        world: default one process.

    Returns:
        The same on every rank, and on any number of ranks.

    Raises:
        TreeError: the tree has no clusters, the counts are of others, or ``copies`` or
            ``max_cluster_size`` is below 1.

    Cost: O(m log m) and the new tree; with ``max_cluster_size`` a few rounds, in which the pairs
    in question go to the owner of their cluster and what does not fit comes back.
    """
    world = world or World.single()
    first, stop = row_range(tree.num_labels, world.rank, world.world_size)
    _check(tree, counts, stop - first, copies, max_cluster_size)
    order = _by_preference(counts)
    labels = first + np.repeat(np.arange(stop - first, dtype=np.int64), np.diff(counts.indptr))[order]
    clusters = counts.indices[order].astype(np.int64)
    matched = np.diff(counts.indptr) > 0
    leaf = tree.slot_to_node(tree.depth - 1)
    own = (tree.labels >= first) & (tree.labels < stop)
    before_label, before_cluster = tree.labels[own], leaf[own]
    stays = ~matched[before_label - first]
    if max_cluster_size is None:
        taken = _place_in_row(counts.indptr) < copies
    else:
        taken_places = _summed(np.bincount(before_cluster[stays], minlength=tree.level_size(tree.depth - 1)), world)
        free = np.maximum(max_cluster_size - taken_places, 0)
        ptr = counts.indptr.astype(np.int64)
        taken = _greedy(labels, clusters, counts.data[order], ptr, copies, free, tree.num_labels, world)
    placed = np.zeros(stop - first, bool)
    placed[labels[taken] - first] = True
    stays = ~placed[before_label - first]
    pairs = [np.stack([clusters[taken], labels[taken]], 1), np.stack([before_cluster[stays], before_label[stays]], 1)]
    every = np.concatenate(_gathered(np.concatenate(pairs), world))
    every = every[np.lexsort((every[:, 1], every[:, 0]))]
    ptr = np.concatenate([[0], np.cumsum(np.bincount(every[:, 0], minlength=tree.level_size(tree.depth - 1)))])
    made = LabelTree([*tree.child_ptr[:-1], ptr.astype(np.int64)], np.ascontiguousarray(every[:, 1]), tree.num_labels)
    left = np.array([np.sum(~matched), np.sum(matched & ~placed)])
    unmatched, crowded_out = _summed(left, world).tolist()
    return Assignment(made, unmatched, crowded_out)


def _check(tree: LabelTree, counts: sp.csr_matrix, own: int, copies: int, max_cluster_size: int | None) -> None:
    if tree.depth < 2:
        raise TreeError("this tree has no clusters between its root and its labels, so labels cannot lie in several")
    must = (own, tree.level_size(tree.depth - 1))
    if counts.shape != must:
        raise TreeError(
            f"counts are {counts.shape[0]} x {counts.shape[1]}, must be {must[0]} labels x {must[1]} clusters"
        )
    for name, value in (("copies", copies), ("max_cluster_size", max_cluster_size)):
        if value is not None and value < 1:
            raise TreeError(f"overlap.{name} ({value}) must be at least 1")


def _greedy(
    labels: I64, clusters: I64, counts: I64, row_ptr: I64, copies: int, free: I64, num_labels: int, world: World
) -> NDArray[np.bool_]:
    """Which pairs are taken: greedily by falling count, then label, then cluster; collective.

    One order of all pairs is what labels and clusters both prefer by, so what greedy takes is
    the one stable matching, which proposing and rejecting finds without a global sort (Gale
    and Shapley, 1962): a label proposes to its best clusters, a full cluster rejects its worst.

    Args:
        labels: with ``clusters`` and ``counts`` this rank's pairs ``[m]``, label by label, the
            best first; ``row_ptr [own + 1]`` where each label's begin.
        free: places of each cluster ``[K]``.
    """
    ranks, num_clusters = world.world_size, len(free)
    cuts = [row_range(num_clusters, r, ranks)[0] for r in range(ranks)] + [num_clusters]
    rank_of = np.searchsorted(np.array(cuts[1:]), np.arange(num_clusters), side="right")
    label_ends = np.array([row_range(num_labels, r, ranks)[1] for r in range(ranks)])
    tried = np.zeros(len(row_ptr) - 1, np.int64)
    held_by_label = np.zeros(len(row_ptr) - 1, np.int64)
    taken = np.zeros(len(labels), bool)
    width = np.diff(row_ptr)
    held = np.zeros((0, 3), np.int64)  # at the clusters' owner: cluster, count, label
    keys = labels * num_clusters + clusters
    by_key = np.argsort(keys)
    while True:
        more = np.minimum(copies - held_by_label, width - tried)
        if not sum(_gathered(int(more.sum()), world)):
            return taken
        at = np.repeat(row_ptr[:-1] + tried, more) + _place_in_row(np.concatenate([[0], np.cumsum(more)]))
        taken[at] = True
        tried += more
        held_by_label += more
        new = np.stack([clusters[at], counts[at], labels[at]], axis=1)
        held = np.concatenate([held, *_sent(new, rank_of[new[:, 0]], world)])
        held = held[np.lexsort((held[:, 2], -held[:, 1], held[:, 0]))]
        fits = np.arange(len(held)) - np.searchsorted(held[:, 0], held[:, 0]) < free[held[:, 0]]
        rejected, held = held[~fits], held[fits]
        owner = np.searchsorted(label_ends, rejected[:, 2], side="right")
        back = np.concatenate(_sent(rejected, owner, world))
        place = by_key[np.searchsorted(keys, back[:, 2] * num_clusters + back[:, 0], sorter=by_key)]
        taken[place] = False
        np.subtract.at(held_by_label, np.searchsorted(row_ptr, place, side="right") - 1, 1)


def _by_preference(counts: sp.csr_matrix) -> I64:
    """Places of the stored counts, row by row: the larger count first, then the smaller cluster."""
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    order: I64 = np.lexsort((counts.indices, -counts.data, rows))
    return order


def _largest(counts: sp.csr_matrix, keep: int) -> sp.csr_matrix:
    """The ``keep`` first entries of each row by `_by_preference`, clusters ascending again."""
    chosen = np.sort(_by_preference(counts)[_place_in_row(counts.indptr) < keep])
    lengths = np.minimum(np.diff(counts.indptr), keep)
    ptr = np.concatenate([[0], np.cumsum(lengths)])
    return sp.csr_matrix((counts.data[chosen], counts.indices[chosen], ptr), shape=counts.shape)


def _place_in_row(ptr: NDArray[Any]) -> I64:
    """0, 1, 2, .. of the entries of every row."""
    place: I64 = np.arange(ptr[-1], dtype=np.int64) - np.repeat(np.asarray(ptr[:-1], np.int64), np.diff(ptr))
    return place


def _ones_where(A: sp.csr_matrix, kept: NDArray[np.bool_]) -> sp.csr_matrix:
    """int64 ones at the kept stored entries."""
    ones = sp.csr_matrix((kept.astype(np.int64), A.indices, A.indptr), shape=A.shape)
    if not kept.all():
        ones = ones.copy()
        ones.eliminate_zeros()
    return ones


def _sent(rows: I64, to: I64, world: World) -> Sequence[I64]:
    """Rows to the ranks named beside them; what this rank gets."""
    if world.world_size == 1:
        return [rows]
    from xmcdist.parallel.exchange import exchange

    return exchange([rows[to == r] for r in range(world.world_size)])


def _gathered(value: Any, world: World) -> list[Any]:
    """Every rank's value; arrays may differ in their number of rows."""
    if world.world_size == 1:
        return [value]
    if not isinstance(value, np.ndarray):
        from xmcdist.parallel.collectives import gather_objects

        return gather_objects(value)
    import torch

    from xmcdist.parallel.collectives import all_gather_ragged

    return [part.numpy() for part in all_gather_ragged(torch.from_numpy(np.ascontiguousarray(value)))]


def _summed(values: NDArray[np.int64], world: World) -> I64:
    total: I64 = np.sum(_gathered(values.astype(np.int64), world), axis=0)
    return total
