"""Labels given to the clusters that are retrieved for them, against plain loops; and whether senses come apart."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.ranks import on_ranks
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range
from xmcdist.trees.errors import TreeError
from xmcdist.trees.label_tree import LabelTree
from xmcdist.trees.overlap import Assignment, assign, count_matches

DOCS, LABELS, LEAVES = 70, 29, 6
PTR = [np.array([0, 2]), np.array([0, 3, 6])]


def _tree(seed: int = 0) -> LabelTree:
    """Two clusters of three leaf clusters, labels at random."""
    codes = np.random.default_rng(seed).integers(0, LEAVES, LABELS)
    ptr = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=LEAVES))])
    return LabelTree([*PTR, ptr], np.argsort(codes, kind="stable"), LABELS)


def _problem(seed: int = 0) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Labels of documents, two of which none has, and what is retrieved, scores of 0 among it."""
    rng = np.random.default_rng(seed)
    Y = rng.random((DOCS, LABELS)) < 0.12
    Y[:, [4, 17]] = False
    M = rng.random((DOCS, LEAVES)) < 0.3
    M[Y[:, 9], :] = False  # nothing is retrieved for label 9
    M[3] = False
    found = sp.csr_matrix(M.astype(np.float32))
    found.data[::3] = 0.0
    return sp.csr_matrix(Y.astype(np.float32)), found


def _slow_counts(Y: sp.csr_matrix, M: sp.csr_matrix) -> np.ndarray:
    counts = np.zeros((Y.shape[1], M.shape[1]), int)
    for i in range(Y.shape[0]):
        for label in Y[[i]].indices:
            for cluster in M.indices[M.indptr[i] : M.indptr[i + 1]]:
                counts[label, cluster] += 1
    return counts


def _slow_assign(tree: LabelTree, counts: np.ndarray, copies: int, cap: int | None) -> list[tuple[int, int]]:
    """(cluster, label) of every slot, by one greedy walk over all pairs."""
    leaf = tree.slot_to_node(tree.depth - 1)
    before = [(int(c), int(label)) for c, label in zip(leaf, tree.labels, strict=True)]
    slots = [(c, label) for c, label in before if not counts[label].any()]
    size = np.bincount([c for c, _ in slots], minlength=LEAVES)
    given = np.zeros(LABELS, int)
    pairs = sorted((-counts[j, c], j, c) for j in range(LABELS) for c in range(LEAVES) if counts[j, c])
    for _, label, c in pairs:
        if given[label] < copies and (cap is None or size[c] < cap):
            slots.append((c, label))
            given[label] += 1
            size[c] += 1
    slots += [(c, label) for c, label in before if counts[label].any() and not given[label]]
    return sorted(slots)


def _slots(tree: LabelTree) -> list[tuple[int, int]]:
    return list(zip(tree.slot_to_node(tree.depth - 1).tolist(), tree.labels.tolist(), strict=True))


def _assigned(tree: LabelTree, Y: sp.csr_matrix, M: sp.csr_matrix, copies: int, cap: int | None) -> Assignment:
    return assign(tree, count_matches(Y, M, keep=None if cap else copies), copies, cap)


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_plain_loops(seed: int) -> None:
    Y, M = _problem(seed)
    want = _slow_counts(Y, M)
    for room in (1, 40, 1 << 20):
        np.testing.assert_array_equal(count_matches(Y, M, room=room).toarray(), want)
    for keep in (1, 2, 5):
        got = count_matches(Y, M, keep=keep, room=25).toarray()
        for label in range(LABELS):
            best = sorted(range(LEAVES), key=lambda c: (-want[label, c], c))[:keep]
            assert got[label].tolist() == [want[label, c] if c in best else 0 for c in range(LEAVES)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("copies", [1, 2, 3, 6])
@pytest.mark.parametrize("cap", [None, 1, 4, 7, 12])
def test_clusters_are_those_of_a_greedy_walk(seed: int, copies: int, cap: int | None) -> None:
    tree, (Y, M) = _tree(seed), _problem(seed)
    counts = _slow_counts(Y, M)
    made = _assigned(tree, Y, M, copies, cap)
    assert _slots(made.tree) == _slow_assign(tree, counts, copies, cap)
    for a, b in zip(made.tree.child_ptr[:-1], tree.child_ptr[:-1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert made.unmatched == np.sum(~counts.any(axis=1)) >= 3
    assert np.bincount(made.tree.labels).max() <= copies


def test_a_second_round_starts_from_what_the_first_made() -> None:
    Y, M = _problem()
    once = _assigned(_tree(), Y, M, 3, None).tree
    rng = np.random.default_rng(9)
    Y2, M2 = _problem(1)
    keeps = rng.random(LABELS) < 0.3
    Y2 = sp.csr_matrix(Y2.toarray() * ~keeps)
    again = _assigned(once, Y2, M2, 2, None).tree
    counts = _slow_counts(Y2, M2)
    assert _slots(again) == _slow_assign(once, counts, 2, None)
    kept = next(j for j in range(LABELS) if not counts[j].any() and len(once.slots_of(j)) == 3)
    assert len(again.slots_of(kept)) == 3


def test_full_clusters_send_labels_to_their_next_one() -> None:
    tree = LabelTree([np.array([0, 3]), np.array([0, 3, 4, 4])], np.arange(4), 4)
    counts = sp.csr_matrix(np.array([[5, 3, 0], [5, 4, 1], [6, 0, 0], [0, 0, 0]]))
    assert _slots(assign(tree, counts, 1).tree) == [(0, 0), (0, 1), (0, 2), (1, 3)]
    made = assign(tree, counts, 1, max_cluster_size=2)
    assert _slots(made.tree) == [(0, 0), (0, 2), (1, 1), (1, 3)]
    made = assign(tree, counts, 1, max_cluster_size=1)  # label 3 has the place in cluster 1
    assert _slots(made.tree) == [(0, 0), (0, 2), (1, 3), (2, 1)]
    assert (made.unmatched, made.crowded_out) == (1, 1)


@on_ranks(1, 2, 3)
def test_the_number_of_ranks_changes_nothing(rank: int, world_size: int) -> None:
    world = World(rank, world_size, rank, world_size, "cpu")
    Y, M = _problem()
    a, b = row_range(DOCS, rank, world_size)
    if world_size == 3:  # one of them without documents
        a, b = ((0, 50), (50, 50), (50, DOCS))[rank]
    first, stop = row_range(LABELS, rank, world_size)
    want = _slow_counts(Y, M)
    for room in (1 << 20, 13):
        counts = count_matches(Y[a:b], M[a:b], world, room=room)
        np.testing.assert_array_equal(counts.toarray(), want[first:stop])
    for copies in (1, 2, 6):
        for cap in (None, 1, 4, 7):
            kept = count_matches(Y[a:b], M[a:b], world, keep=None if cap else copies)
            made = assign(_tree(), kept, copies, cap, world)
            assert made.tree.fingerprint == _assigned(_tree(), Y, M, copies, cap).tree.fingerprint
            assert _slots(made.tree) == _slow_assign(_tree(), want, copies, cap)


def test_what_does_not_fit_is_refused() -> None:
    Y, M = _problem()
    counts = count_matches(Y, M)
    with pytest.raises(TreeError, match="no clusters between its root and its labels"):
        assign(LabelTree([np.array([0, LABELS])], np.arange(LABELS), LABELS), counts, 2)
    with pytest.raises(TreeError, match="must be 29 labels x 6 clusters"):
        assign(_tree(), counts[:5], 2)
    with pytest.raises(TreeError, match=r"overlap.max_cluster_size \(0\) must be at least 1"):
        assign(_tree(), counts, 2, 0)
    with pytest.raises(ValueError, match="labels of 69 documents and clusters of 70"):
        count_matches(Y[:-1], M)
