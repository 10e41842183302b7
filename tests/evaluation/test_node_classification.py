"""A classifier of nodes learns what is there, and nothing where nothing is."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from xmcdist.config.errors import UserError
from xmcdist.evaluation.node_classification import Classifier, NodeSplit, classify_nodes, drawn_split

SMALL = Classifier(hidden=16, layers=2, epochs=60, patience=20, dropout=0.1)


def _data(n: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Four classes in two columns, exclusive or: no line tells them apart; eight columns of noise."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 10)).astype(np.float32)
    X[:, :2] += 3 * np.sign(X[:, :2])
    return X, (X[:, 0] * X[:, 1] > 0).astype(np.int64) + 2 * (X[:, 0] > 0)


def test_an_mlp_learns_what_a_line_cannot_and_nothing_from_shuffled_classes() -> None:
    X, y = _data()
    split = drawn_split(y % 2, 0.6, 0.2, 0)
    assert classify_nodes(X, y % 2, split, SMALL, 0)["test"] > 97
    assert classify_nodes(X, y % 2, split, Classifier(model="linear", epochs=60), 0)["test"] < 65
    shuffled = np.random.default_rng(1).permutation(y % 2)
    assert 35 < classify_nodes(X, shuffled, split, SMALL, 0)["test"] < 65


def test_a_linear_map_is_logistic_regression() -> None:
    rng = np.random.default_rng(2)
    X = rng.normal(size=(900, 6)).astype(np.float32)
    y = (X @ rng.normal(size=(6, 3)) + rng.normal(size=(900, 3))).argmax(1)
    split = drawn_split(y, 0.6, 0.2, 0)
    to_the_end = NodeSplit(split.train, split.train, split.test)
    got = classify_nodes(X, y, to_the_end, Classifier(model="linear", epochs=1000, patience=1000), 0)["test"]
    want = LogisticRegression(C=1e6).fit(X[split.train], y[split.train]).score(X[split.test], y[split.test])
    assert got == pytest.approx(100 * want, abs=1.2)


def test_the_seed_decides_all_and_columns_may_be_of_any_scale() -> None:
    X, y = _data(300)
    split = drawn_split(y, 0.5, 0.25, 0)
    first = classify_nodes(X, y, split, SMALL, 3)
    assert classify_nodes(X, y, split, SMALL, 3) == first
    assert classify_nodes(X * 1024 + 4096, y, split, SMALL, 3)["test"] == pytest.approx(first["test"], abs=3)


def test_it_stops_when_validation_does_not_improve_and_keeps_the_best() -> None:
    X, y = _data(300)
    rng = np.random.default_rng(0)
    y[:200] = rng.integers(0, 4, 200)  # learnt by heart in the end
    split = NodeSplit(np.arange(200), np.arange(200, 250), np.arange(250, 300))
    long = classify_nodes(X, y, split, Classifier(hidden=64, layers=2, dropout=0.0, epochs=200, patience=200), 0)
    short = classify_nodes(X, y, split, Classifier(hidden=64, layers=2, dropout=0.0, epochs=200, patience=5), 0)
    assert short["epoch"] <= long["epoch"] < 200
    assert long["valid"] >= short["valid"]


def test_nodes_without_a_class_are_in_no_part() -> None:
    y = np.array([0, 1, -1, 0, 1, -1, 0, 1, 0, 1])
    split = drawn_split(y, 0.5, 0.25, 0)
    parts = np.concatenate([split.train, split.valid, split.test])
    assert sorted(parts.tolist()) == [0, 1, 3, 4, 6, 7, 8, 9]
    assert (len(split.train), len(split.valid), len(split.test)) == (4, 2, 2)
    X = np.eye(10, dtype=np.float32)
    with pytest.raises(UserError, match="no valid node with a class"):
        classify_nodes(X, y, NodeSplit(np.array([0, 1]), np.array([2]), np.array([3])), SMALL, 0)


def test_graph_networks_ask_for_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    X, y = _data(40)
    with pytest.raises(UserError, match=r"pip install 'xmcdist\[graph\]'"):
        classify_nodes(X, y, drawn_split(y, 0.5, 0.2, 0), Classifier(model="sage"), 0, np.zeros((2, 1), np.int64))


def test_a_graph_network_is_handed_all_vectors_and_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch-geometric's layer, which is an own package: x W + mean of the neighbours' x V."""
    import types

    import torch

    class Conv(torch.nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.own, self.near = torch.nn.Linear(a, b), torch.nn.Linear(a, b)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
            count = torch.zeros(len(x)).index_add(0, edges[1], torch.ones(edges.shape[1])).clamp(min=1)
            return self.own(x) + self.near(total / count[:, None])

    geometric, layers = types.ModuleType("torch_geometric"), types.ModuleType("torch_geometric.nn")
    layers.SAGEConv = Conv  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_geometric", geometric)
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", layers)
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    X = rng.normal(size=(300, 4)).astype(np.float32)
    X[:, :3] += np.eye(3, dtype=np.float32)[y]  # weak alone; the mean of ten alike is not
    near = np.array([(i, j) for i in range(300) for j in rng.choice(np.flatnonzero(y == y[i]), 10)]).T
    edges = np.hstack([near, near[::-1]])
    split, how = drawn_split(y, 0.5, 0.2, 0), Classifier(model="sage", hidden=16, layers=2, epochs=60, dropout=0.0)
    alone = classify_nodes(X, y, split, SMALL, 0)["test"]
    assert classify_nodes(X, y, split, how, 0, edges)["test"] > alone + 10
    with pytest.raises(UserError, match="needs the edges"):
        classify_nodes(X, y, split, how, 0)
