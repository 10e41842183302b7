from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.ranks import on_ranks
from xmcdist.config.schema import TreeConfig
from xmcdist.parallel.launch import World
from xmcdist.sparse.csr import as_csr
from xmcdist.sparse.features import Features
from xmcdist.trees.build import build_label_tree
from xmcdist.trees.errors import TreeError
from xmcdist.trees.files import read_label_features, read_tree
from xmcdist.trees.label_tree import LabelTree


def _data() -> tuple[Features, sp.csr_matrix]:
    rng = np.random.default_rng(0)
    X = rng.random((80, 12)) * (rng.random((80, 12)) < 0.4)
    Y = rng.random((80, 23)) < 0.15
    Y[:, 5] = False
    return Features(as_csr(X, "X"), rng.normal(size=(80, 4)).astype(np.float32)), as_csr(Y, "Y")


def _config(**values: object) -> TreeConfig:
    return TreeConfig(**{"nr_splits": 2, "max_leaf_size": 3, **values})  # type: ignore[arg-type]


@on_ranks(1, 2, 3)
def test_the_tree_does_not_depend_on_ranks(rank: int, world_size: int, tmp_path: Path) -> None:
    world = World(rank, world_size, rank, world_size, "cpu")
    both, Y = _data()
    for features in (both, Features(both.sparse), Features(dense=both.dense)):
        want = build_label_tree(features, Y, _config(), World.single())
        tree = build_label_tree(features, Y, _config(), world, tmp_path)
        assert tree.fingerprint == want.fingerprint
        world.barrier()
    assert [tree.level_size(t) for t in range(1, tree.depth + 1)] == [2, 4, 8, 23]
    assert not list(tmp_path.iterdir())


def test_several_ranks_need_a_shared_folder() -> None:
    features, Y = _data()
    with pytest.raises(ValueError, match="needs a workdir"):
        build_label_tree(features, Y, _config(), World(0, 2, 0, 2, "cpu"))


def test_labels_that_share_documents_share_clusters() -> None:
    """Four groups of labels on disjoint documents and features come out as the four clusters."""
    group = np.arange(40) % 4
    Y = np.zeros((200, 40))
    rng = np.random.default_rng(0)
    for i in range(200):
        Y[i, rng.choice(np.flatnonzero(group == i % 4), 3, replace=False)] = 1
    X = np.eye(4)[np.arange(200) % 4] + 0.05 * rng.random((200, 4))
    tree = build_label_tree(Features(as_csr(X, "X")), as_csr(Y, "Y"), _config(max_leaf_size=10, nr_splits=4))
    found = group[tree.labels].reshape(4, 10)
    np.testing.assert_array_equal(found, found[:, :1].repeat(10, axis=1))


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_given_label_features_take_the_place_of_documents(tmp_path: Path, form: str) -> None:
    features, Y = _data()
    rng = np.random.default_rng(1)
    Z = rng.normal(size=(23, 6)) * (rng.random((23, 6)) < 0.7)
    Z[4] = 0
    path = tmp_path / ("Z.npz" if form == "sparse" else "Z.npy")
    trees = []
    for scale in (1, 2.0 ** np.arange(23)[:, None]):  # only directions count
        if form == "sparse":
            sp.save_npz(path, sp.coo_matrix(Z * scale))
        else:
            np.save(path, Z * scale)
        trees.append(build_label_tree(features, Y, _config(label_features=str(path))))
    tree, scaled = trees
    assert tree.num_labels == 23
    assert tree.fingerprint == scaled.fingerprint
    assert tree.fingerprint != build_label_tree(features, Y, _config()).fingerprint
    unit = read_label_features(path, 23)
    part = unit.dense if unit.sparse is None else unit.sparse.toarray()
    norm = np.linalg.norm(Z, axis=1, keepdims=True)
    np.testing.assert_allclose(part, Z / np.where(norm > 0, norm, 1), rtol=1e-6)


def _chain() -> list[sp.csr_matrix]:
    tree = build_label_tree(*_data(), _config())
    return [sp.csc_matrix(C) for C in tree.chain()]


@pytest.mark.parametrize("layout", ["own", "C_1", "pecos", "C", "file"])
def test_given_trees(tmp_path: Path, layout: str) -> None:
    features, Y = _data()
    chain = _chain()
    want = build_label_tree(features, Y, _config())
    path = tmp_path
    if layout == "own":
        want.save(tmp_path)
    elif layout == "C_1":
        for t, C in enumerate(chain, start=1):
            sp.save_npz(tmp_path / f"C_{t}.npz", C)
    elif layout == "pecos":
        for t, C in enumerate(chain):
            sp.save_npz(tmp_path / f"C{t}.npz", C)
        (tmp_path / "config.json").write_text(json.dumps({"len": len(chain)}))
    else:
        sp.save_npz(tmp_path / "C.npz", chain[-1])
        want = LabelTree.from_chain([chain[-1]])
        path = tmp_path / "C.npz" if layout == "file" else tmp_path
    tree = build_label_tree(features, Y, _config(path=str(path), max_leaf_size=500))
    assert tree.fingerprint == want.fingerprint


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    chain = _chain()
    with pytest.raises(TreeError, match="has no label tree"):
        read_tree(tmp_path, 23)
    sp.save_npz(tmp_path / "C_1.npz", chain[0])
    sp.save_npz(tmp_path / "C_3.npz", chain[2])
    with pytest.raises(TreeError, match=r"has C_3\.npz but no C_2\.npz"):
        read_tree(tmp_path, 23)
    (tmp_path / "C_2.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(TreeError, match=r"C_2\.npz is no sparse matrix"):
        read_tree(tmp_path, 23)
    sp.save_npz(tmp_path / "C.npz", chain[-1])
    with pytest.raises(TreeError, match="is a tree of 23 labels; the data set has 24"):
        read_tree(tmp_path, 24)
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "C.npz").unlink()
    with pytest.raises(TreeError, match=r"config\.json is damaged"):
        read_tree(tmp_path, 23)


def test_bad_label_features_are_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "Z.npy", np.ones((22, 3)))
    np.save(tmp_path / "nan.npy", np.array([[1.0, 2.0], [np.nan, 0.0]]))
    np.save(tmp_path / "flat.npy", np.ones(23))
    np.save(tmp_path / "objects.npy", np.array([[object()]]), allow_pickle=True)
    sp.save_npz(tmp_path / "inf.npz", sp.csr_matrix(np.array([[1.0], [np.inf]])))
    (tmp_path / "text.npz").write_text("no matrix")
    for name, message in (
        ("Z.npy", r"Z\.npy\) has 22 rows; the data set has 23 labels"),
        ("nan.npy", r"nan\.npy\): row 1 holds a value that is not finite"),
        ("flat.npy", r"flat\.npy\) is 1-D float64"),
        ("objects.npy", r"objects\.npy is no array"),
        ("inf.npz", r"inf\.npz\): row 1, column 0 holds inf"),
        ("text.npz", r"text\.npz is no sparse matrix"),
        ("gone.npz", r"gone\.npz does not exist"),
        ("gone.npy", r"gone\.npy does not exist"),
        ("Z.txt", r"must end in \.npz"),
    ):
        with pytest.raises(TreeError, match=message):
            read_label_features(tmp_path / name, 23)


def test_settings_are_refused_before_any_work() -> None:
    features, Y = _data()
    with pytest.raises(TreeError, match=r"tree\.max_leaf_size \(24\) is larger than the 23 labels"):
        build_label_tree(features, Y, _config(max_leaf_size=24))
    with pytest.raises(TreeError, match=r"tree\.nr_splits"):
        build_label_tree(features, Y, _config(nr_splits=1))
