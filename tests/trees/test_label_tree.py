from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from xmcdist.sparse.csr import as_csr
from xmcdist.trees.errors import TreeError
from xmcdist.trees.label_tree import LabelTree
from xmcdist.trees.levels import binary_depth, build_tree, cluster_levels


def _balanced(num_labels: int, depth: int, seed: int = 0, **settings: int) -> LabelTree:
    codes = np.arange(num_labels) * (1 << depth) // num_labels
    return build_tree(np.random.default_rng(seed).permutation(codes), depth, **settings)


def _overlapping() -> LabelTree:
    """Three levels, 6 labels; cluster 2 of level 2 is empty; labels 1 and 4 have two places."""
    C = [
        np.ones((2, 1)),
        np.array([[1, 0], [0, 1], [0, 1], [1, 0]]),
        np.array([[1, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]]),
    ]
    return LabelTree.from_chain([sp.csc_matrix(c) for c in C])


# Level sizes that amzn/pecos gives with the settings of the XR-Transformer paper.
PAPER = [
    (3956, 16, 16, 16, [16, 256]),
    (30938, 16, 16, 128, [128, 2048]),
    (13330, 16, 8, 128, [128, 1024]),
    (501070, 16, 8, 64, [64, 512, 4096, 32768]),
    (670091, 32, 16, 128, [128, 2048, 32768]),
    (2812281, 100, 16, 128, [128, 2048, 32768]),
    (2812281, 32, 16, 128, [32, 512, 8192, 131072]),
    (2812281, 100, 32, None, [32, 1024, 32768]),
]


@pytest.mark.parametrize(("labels", "leaf", "splits", "least", "sizes"), PAPER)
def test_level_sizes_of_the_paper(labels: int, leaf: int, splits: int, least: int | None, sizes: list[int]) -> None:
    depth = binary_depth(labels, leaf)
    assert cluster_levels(depth, splits, least) == sizes
    if labels < 40000:
        tree = _balanced(labels, depth, nr_splits=splits, min_codes=least or splits)
        assert [tree.level_size(t) for t in range(tree.depth + 1)] == [1, *sizes, labels]


@pytest.mark.parametrize("splits", [2, 3, 5, 16])
@pytest.mark.parametrize(("labels", "depth"), [(100, 5), (37, 1), (64, 6), (1000, 7)])
def test_every_label_once_and_children_are_neighbours(labels: int, depth: int, splits: int) -> None:
    tree = _balanced(labels, depth, nr_splits=splits)
    np.testing.assert_array_equal(np.sort(tree.labels), np.arange(labels))
    assert tree.is_partition
    assert tree.level_size(1) <= splits
    leaf_sizes = np.diff(tree.child_ptr[-1])
    assert leaf_sizes.max() - leaf_sizes.min() <= 1
    for t in range(1, tree.depth + 1):
        parents = tree.parents(t)
        assert np.all(np.diff(parents) >= 0)
        assert np.bincount(parents).max() <= (splits if t < tree.depth else labels)
        above = tree.slot_to_node(t - 1)
        np.testing.assert_array_equal(above, parents[tree.slot_to_node(t)])
    for p in range(tree.level_size(tree.depth - 1)):
        assert np.all(np.diff(tree.labels[tree.child_ptr[-1][p] : tree.child_ptr[-1][p + 1]]) > 0)


def test_neighbouring_codes_share_parents() -> None:
    tree = build_tree(np.arange(16), 3 + 1, nr_splits=4)
    np.testing.assert_array_equal(tree.slot_to_node(1), np.arange(16) // 4)
    np.testing.assert_array_equal(tree.slot_to_node(0), np.zeros(16))


@pytest.mark.parametrize("make", [lambda: _balanced(50, 4, nr_splits=3), _overlapping])
def test_lift_against_dense_products(make: object) -> None:
    tree: LabelTree = make()  # type: ignore[operator]
    rng = np.random.default_rng(0)
    Y = (rng.random((30, tree.num_labels)) < 0.3).astype(float) * rng.integers(1, 5, (30, tree.num_labels))
    np.testing.assert_array_equal(tree.lift(as_csr(Y, "Y"), tree.depth).toarray(), (Y > 0)[:, tree.labels])
    want = (Y > 0).astype(int)
    for t in range(tree.depth, 0, -1):
        C = tree.chain()[t - 1].toarray()
        want = want @ C
        if t > 1:
            got = tree.lift(as_csr(Y, "Y"), t - 1)
            np.testing.assert_array_equal(got.toarray(), want)
            assert got.has_canonical_format
            assert got.dtype == np.float32


@pytest.mark.parametrize("make", [lambda: _balanced(50, 4, nr_splits=3), _overlapping])
def test_chain_round_trip(make: object) -> None:
    tree: LabelTree = make()  # type: ignore[operator]
    chain = tree.chain()
    assert chain[0].shape[1] == 1
    assert chain[-1].shape == (tree.num_labels, tree.level_size(tree.depth - 1))
    assert LabelTree.from_chain(list(chain)).fingerprint == tree.fingerprint
    assert LabelTree.from_chain(list(chain[1:])).fingerprint == tree.fingerprint  # the root may be left out


def test_any_numbering_becomes_tree_order() -> None:
    """Nodes of every level permuted: the same clusters of labels come out, neighbours again."""
    tree = _balanced(60, 4, nr_splits=4)
    rng = np.random.default_rng(3)
    chain, above = [], np.arange(1)
    for t, C in enumerate(tree.chain(), start=1):
        rows = np.arange(60) if t == tree.depth else rng.permutation(C.shape[0])
        chain.append(C[rows][:, above])
        above = rows
    again = LabelTree.from_chain(chain)
    for t in range(1, tree.depth):
        want = {frozenset(tree.labels[tree.slot_to_node(t) == p].tolist()) for p in range(tree.level_size(t))}
        got = {frozenset(again.labels[again.slot_to_node(t) == p].tolist()) for p in range(again.level_size(t))}
        assert got == want


def test_overlap_and_an_empty_cluster() -> None:
    tree = _overlapping()
    assert not tree.is_partition
    assert (tree.num_labels, tree.level_size(3)) == (6, 8)
    np.testing.assert_array_equal(tree.child_ptr[1], [0, 2, 4])  # old nodes 0, 3 | 1, 2
    np.testing.assert_array_equal(tree.child_ptr[2], [0, 2, 5, 8, 8])
    np.testing.assert_array_equal(tree.labels, [0, 1, 1, 4, 5, 2, 3, 4])
    np.testing.assert_array_equal(tree.slots_of(4), [3, 7])


def test_truncate() -> None:
    tree = _balanced(50, 4, nr_splits=4)
    top = tree.truncate(2)
    assert (top.depth, top.num_labels, top.level_size(2)) == (2, 16, 16)
    np.testing.assert_array_equal(top.labels, np.arange(16))
    assert tree.truncate(1).chain()[0].shape == (4, 1)


def test_save_and_load(tmp_path: Path) -> None:
    tree = _overlapping()
    tree.save(tmp_path / "tree")
    again = LabelTree.load(tmp_path / "tree")
    assert again.fingerprint == tree.fingerprint
    for a, b in zip(again.child_ptr, tree.child_ptr, strict=True):
        np.testing.assert_array_equal(a, b)
    assert _balanced(50, 4).fingerprint != _balanced(50, 4, seed=1).fingerprint


@pytest.mark.parametrize("name", ["tree.json", "child_ptr-2.npy", "labels.npy"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_a_damaged_tree_names_the_file(tmp_path: Path, name: str, damage: str) -> None:
    _overlapping().save(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif name == "tree.json":
        path.write_text('{"format": 99}')
    else:
        np.save(path, np.load(path)[::-1])
    with pytest.raises(TreeError, match=str(tmp_path if damage == "other" else path)):
        LabelTree.load(tmp_path)


def test_chains_that_are_no_tree_are_refused() -> None:
    C1, C2 = np.ones((2, 1)), np.array([[1, 0], [0, 1], [0, 1]])
    for chain, message in (
        ([], "no cluster matrix"),
        ([C1, np.array([[1, 0], [0, 0], [0, 1]])], r"label 1 lies in no cluster"),
        ([C1, np.array([[1, 1], [0, 1]]), np.eye(2)], r"node of level 2: 0 has 2 parents"),
        ([C1, np.ones((3, 3))], r"level 2 is 3 x 3, but the level above has 2 nodes"),
        ([C1, np.array([[1, np.nan]])], r"C_2: row 0, column 1 holds nan"),
        ([np.ones((0, 1)), np.ones((3, 0))], r"label 0 lies in no cluster"),
    ):
        with pytest.raises(TreeError, match=message):
            LabelTree.from_chain([sp.csr_matrix(C) for C in chain])
    with pytest.raises(TreeError, match=r"my tree: level 3"):
        LabelTree.from_chain([sp.csr_matrix(C) for C in (C1, C2, C2)], "my tree")


def test_arrays_that_make_no_tree_are_refused() -> None:
    ptr, ids = np.array([0, 3]), np.arange(3)
    for args, message in (
        (([], ids, 3), "at least one level"),
        (([np.array([0, 3, 2])], ids, 3), "level 1 of the label tree does not hang below the 1 nodes of level 0"),
        (([np.array([0, 2])], ids, 3), "2 slots for 3 labels"),
        (([ptr], np.array([0, 1, 3]), 3), r"outside 0\.\.2"),
        (([ptr], np.array([0, 2, 2]), 3), "the first is label 1"),
    ):
        with pytest.raises(TreeError, match=message):
            LabelTree(*args)  # type: ignore[arg-type]
    tree = _overlapping()
    with pytest.raises(TreeError, match="5 labels given to a label tree of 6"):
        tree.lift(as_csr(np.ones((2, 5)), "Y"), 1)
    with pytest.raises(TreeError, match="there is no level 4: the label tree has levels 1 to 3"):
        tree.lift(as_csr(np.ones((2, 6)), "Y"), 4)


def test_settings_that_do_not_fit_the_labels_are_refused() -> None:
    assert binary_depth(37, 37) == 1
    assert binary_depth(8, 1) == 3
    for labels, leaf, message in (
        (37, 500, r"tree\.max_leaf_size \(500\) is larger than the 37 labels; set it to at most 37"),
        (5, 1, r"asks for 8 leaf clusters of 5 labels; set it to at least 2"),
        (1, 1, "at least 2 labels"),
        (9, 0, r"tree\.max_leaf_size \(0\)"),
    ):
        with pytest.raises(TreeError, match=message):
            binary_depth(labels, leaf)
    with pytest.raises(TreeError, match=r"tree\.nr_splits \(1\)"):
        cluster_levels(3, 1)
    with pytest.raises(TreeError, match=r"tree\.min_codes \(0\)"):
        cluster_levels(3, 2, 0)
    with pytest.raises(TreeError, match=r"outside 0\.\.3"):
        build_tree(np.array([0, 4]), 2)
