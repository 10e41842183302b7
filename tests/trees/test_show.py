from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from xmcdist.trees.errors import TreeError
from xmcdist.trees.label_tree import LabelTree
from xmcdist.trees.levels import build_tree
from xmcdist.trees.show import cluster_text, describe_cluster, describe_label, describe_tree, find_label

TREE = build_tree(np.repeat(np.arange(8), 3), 3, nr_splits=2)
TEXTS = [f"name-{i} : says what {i} is" for i in range(24)]


def test_tree() -> None:
    text = describe_tree(TREE, TEXTS)
    assert text.startswith("label tree: 24 labels, 4 levels")
    assert "7 of" not in text
    assert "1 of 0..1 (12 labels)  12: name-12 : says what 12 is" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["2", "4", "2", "2", "2", "6", "6", "6", "6", "6", "0"] in rows
    assert ["3", "8", "3", "3", "3", "3", "3", "3", "3", "3", "0"] in rows
    assert describe_tree(TREE).endswith("level 4 holds the labels themselves")


def test_label_by_id_and_by_text() -> None:
    text = describe_label(TREE, 10, TEXTS)
    assert text == describe_label(TREE, "name-10", TEXTS) == describe_label(TREE, TEXTS[10], TEXTS)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "label 10: name-10 : says what 10 is"
    assert "level 3: cluster 3 of 0..7 (3 labels)" in lines
    assert "level 1: cluster 0 of 0..1 (12 labels)" in lines
    at = lines.index("in the same leaf cluster, 2 labels:")
    assert lines[at + 1 : at + 3] == ["9: name-9 : says what 9 is", "11: name-11 : says what 11 is"]
    assert lines[-1] == "2 of 0..7 (3 labels)  6: name-6 : says what 6 is"
    assert "10" in describe_label(TREE, 10)


def test_cluster() -> None:
    lines = [line.strip() for line in describe_cluster(TREE, 2, 1, TEXTS).splitlines()]
    assert lines[0] == "cluster 1 of 0..3 (6 labels), level 2 of 4"
    assert "level 1: cluster 0 of 0..1 (12 labels)" in lines
    assert "3 of 0..7 (3 labels)  9: name-9 : says what 9 is" in lines
    assert lines[-6:] == [f"{i}: name-{i} : says what {i} is" for i in range(6, 12)]
    assert "children" not in describe_cluster(TREE, 3, 7)
    assert "and 4 more labels" in describe_cluster(TREE, 0, 0, TEXTS)


def test_overlap_and_empty_clusters_are_shown() -> None:
    C = sp.csr_matrix(np.array([[1, 0, 0], [1, 0, 1], [0, 0, 1]]))
    tree = LabelTree.from_chain([C])
    assert describe_tree(tree, ["a", "b", "c"]).startswith("label tree: 3 labels, 4 places, 2 levels")
    assert "1 of 0..2 (0 labels)" in describe_tree(tree, ["a", "b", "c"])
    text = describe_label(tree, "b", ["a", "b", "c"])
    assert "place 2 of 2" in text
    one_level = tree.truncate(1)
    assert "nearest" not in describe_label(one_level, 0)
    assert "level 1 holds the labels themselves" in describe_tree(one_level, ["x", "y", "z"])


def test_what_does_not_exist_is_refused() -> None:
    for call, message in (
        (lambda: describe_label(TREE, 24, TEXTS), "there is no label 24: the tree's labels are 0 to 23"),
        (lambda: describe_label(TREE, -1, TEXTS), "there is no label -1"),
        (lambda: describe_label(TREE, "x"), "the labels have no texts"),
        (lambda: describe_cluster(TREE, 4, 0), "levels 0 to 3, level 4 holds the labels"),
        (lambda: describe_cluster(TREE, 3, 8), "no cluster 8 at level 3: its clusters are 0 to 7"),
        (lambda: describe_tree(TREE, TEXTS[:-1]), "23 label texts for a tree of 24 labels"),
    ):
        with pytest.raises(TreeError, match=message):
            call()


def test_labels_are_found_or_near_ones_named() -> None:
    assert find_label("NAME-7 ", TEXTS) == 7
    assert find_label("name-1", TEXTS) == 1
    with pytest.raises(TreeError, match=r"no label reads 'says what 3'; near it: 'name-3 : says what 3 is'"):
        find_label("says what 3", TEXTS)
    with pytest.raises(TreeError, match=r"no label reads 'nmae-13'; near it: 'name-13'"):
        find_label("nmae-13", TEXTS)
    with pytest.raises(TreeError, match=r"no label reads 'zzzz'$"):
        find_label("zzzz", TEXTS)


def test_a_label_in_several_clusters_is_counted_once_and_named_with_all_of_them() -> None:
    tree = LabelTree([np.array([0, 2]), np.array([0, 2, 3]), np.array([0, 2, 4, 5])], np.array([0, 1, 1, 2, 0]), 3)
    text = describe_tree(tree, ["a", "b", "c"])
    assert "places a node" in text
    assert "0 of 0..1 (3 labels)  0: a" in text
    assert "labels, 3:\n  0: a\n  1: b\n  2: c" in describe_cluster(tree, 1, 0, ["a", "b", "c"])
    assert describe_label(tree, 0).startswith("label 0\nin 2 clusters of level 2: 0, 2\n")
    assert describe_label(tree, 2).splitlines()[1].startswith("  level 0")
    assert cluster_text(tree, 1, 0, ["a", "b", "c"], most=2) == "a; b; and 1 more"
