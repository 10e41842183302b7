"""Classes of a graph's nodes from their vectors: a small network, the accuracy that says how good vectors are.

Letters: n nodes, d width, C classes, m directed edges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, relu

from xmcdist.config.errors import UserError

__all__ = ["MODELS", "Classifier", "NodeSplit", "classify_nodes", "drawn_split"]

MODELS = ("mlp", "linear", "sage")
_WITHOUT_CLASS = -1


@dataclass(frozen=True, slots=True)
class NodeSplit:
    """Nodes by what they are for, int64 arrays: trained on, when to stop, and measured."""

    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Classifier:
    """How a classifier is made and trained.

    Attributes:
        model: ``mlp``: linear maps with batch normalisation, ReLU and dropout between them, as
            the Open Graph Benchmark has it; ``linear``: one map; ``sage``: GraphSAGE (Hamilton
            et al., NeurIPS 2017) with mean aggregation, by torch-geometric.
        hidden, layers: width of the hidden ones; number of maps.
        lr, weight_decay: of Adam.
        epochs: most passes over the training nodes.
        patience: epochs in which the validation nodes get no better before it stops.
        batch: nodes a step; ``sage`` takes the whole graph at once.
    """

    model: str = "mlp"
    hidden: int = 256
    layers: int = 3
    dropout: float = 0.5
    lr: float = 0.01
    weight_decay: float = 0.0
    epochs: int = 300
    patience: int = 50
    batch: int = 65536


def drawn_split(classes: ArrayLike, train_share: float, valid_share: float, seed: int) -> NodeSplit:
    """Nodes that have a class, shuffled by ``seed`` and parted; the rest is for the test."""
    known = np.flatnonzero(np.asarray(classes) != _WITHOUT_CLASS)
    known = known[np.random.default_rng((seed, 13)).permutation(len(known))]
    a, b = int(len(known) * train_share), int(len(known) * (train_share + valid_share))
    return NodeSplit(*(np.sort(part).astype(np.int64) for part in (known[:a], known[a:b], known[b:])))


def classify_nodes(
    X: NDArray[np.float32],
    classes: ArrayLike,
    split: NodeSplit,
    how: Classifier,
    seed: int,
    edges: NDArray[np.int64] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Train on some nodes, measure on others.

    Columns are brought to mean 0 and variance 1 over the training nodes.  Of all epochs the
    weights with the best accuracy of the validation nodes count, of equals those of the lowest loss.

    Args:
        X: ``[n, d]``, one vector a node.
        classes: ``[n]`` integers from 0, or -1 where a node has none; such nodes are left out
            of the split.
        edges: of ``sage``: int64 ``[2, m]``, each edge in both directions.
        seed: of initial weights, order and dropout.

    Returns:
        ``train``, ``valid`` and ``test`` accuracy in percent, and the ``epoch`` they are of.

    Raises:
        UserError: a part of the split is empty, or torch-geometric is missing.

    Cost: of an epoch, forward and backward over the training nodes, forward over all others.
    """
    y = np.asarray(classes, np.int64)
    parts = {name: nodes[y[nodes] >= 0] for name, nodes in zip(("train", "valid", "test"), _parts(split), strict=True)}
    for name, nodes in parts.items():
        if not len(nodes):
            raise UserError(f"the split has no {name} node with a class: look at split and classes")
    mean, spread = X[parts["train"]].mean(0), X[parts["train"]].std(0)
    device = torch.device(device)
    inputs = torch.from_numpy((X - mean) / np.where(spread > 0, spread, 1.0)).float().to(device)
    target = torch.from_numpy(y).to(device)
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        net = _network(how, inputs.shape[1], int(y.max()) + 1).to(device)
        if how.model == "sage":
            if edges is None:
                raise UserError("model=sage needs the edges of the graph: give edges=FILE")
            whole = torch.from_numpy(np.asarray(edges, np.int64)).to(device)
            run: Callable[[Tensor], Tensor] = lambda nodes: net(inputs, whole)[nodes]  # noqa: E731
            batch = len(parts["train"])
        else:
            run = lambda nodes: net(inputs[nodes])  # noqa: E731
            batch = how.batch
        there = {name: torch.from_numpy(nodes).to(device) for name, nodes in parts.items()}
        return _fit(net, run, target, there, how, batch)


def _parts(split: NodeSplit) -> tuple[NDArray[np.int64], ...]:
    return split.train, split.valid, split.test


def _fit(
    net: nn.Module,
    run: Callable[[Tensor], Tensor],
    target: Tensor,
    parts: dict[str, Tensor],
    how: Classifier,
    batch: int,
) -> dict[str, float]:
    optimizer = torch.optim.Adam(net.parameters(), lr=how.lr, weight_decay=how.weight_decay)
    best, best_epoch, state = (-1.0, 0.0), 0, copy.deepcopy(net.state_dict())
    train = parts["train"]
    for epoch in range(1, how.epochs + 1):
        net.train()
        order = train[torch.randperm(len(train)).to(train.device)]
        for nodes in torch.split(order, batch):
            if len(nodes) < 2 <= len(train):
                continue  # batch normalisation of one node is no normalisation
            optimizer.zero_grad()
            loss = cross_entropy(run(nodes), target[nodes])
            torch.autograd.backward(loss)
            optimizer.step()
        reached = _quality(net, run, target, parts["valid"], how.batch)
        if reached > best:
            best, best_epoch, state = reached, epoch, copy.deepcopy(net.state_dict())
        elif epoch - best_epoch >= how.patience:
            break
    net.load_state_dict(state)
    found = {name: _quality(net, run, target, nodes, how.batch)[0] for name, nodes in parts.items()}
    return {**found, "epoch": float(best_epoch)}


@torch.no_grad()
def _quality(
    net: nn.Module, run: Callable[[Tensor], Tensor], target: Tensor, nodes: Tensor, batch: int
) -> tuple[float, float]:
    """Accuracy in percent, and the mean loss below zero: of both the greater is the better."""
    net.eval()
    right, loss = 0, 0.0
    for some in torch.split(nodes, batch):
        scores, wanted = run(some), target[some]
        right += int((scores.argmax(1) == wanted).sum().item())
        loss += float(cross_entropy(scores, wanted, reduction="sum"))
    return 100.0 * right / len(nodes), -loss / len(nodes)


def _network(how: Classifier, width: int, num_classes: int) -> nn.Module:
    if how.model not in MODELS:
        raise UserError(f"model={how.model} is none of {', '.join(MODELS)}")
    if how.model == "sage":
        return _GraphSage(_sage_conv(), _widths(how, width, num_classes), how.dropout)
    if how.model == "linear":
        return nn.Linear(width, num_classes)
    maps: list[nn.Module] = []
    widths = _widths(how, width, num_classes)
    for i, (a, b) in enumerate(pairwise(widths)):
        maps.append(nn.Linear(a, b))
        if i < len(widths) - 2:
            maps += [nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(how.dropout)]
    return nn.Sequential(*maps)


def _widths(how: Classifier, width: int, num_classes: int) -> list[int]:
    return [width, *[how.hidden] * (how.layers - 1), num_classes]


def _sage_conv() -> Any:
    try:
        from torch_geometric.nn import SAGEConv
    except ImportError:
        raise UserError(
            "model=sage needs torch-geometric: pip install 'xmcdist[graph]', or take model=mlp, which needs no graph"
        ) from None
    return SAGEConv


class _GraphSage(nn.Module):
    """A node's vector and the mean of its neighbours', mapped, layer after layer."""

    def __init__(self, conv: Any, widths: list[int], share: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for b in widths[1:-1])
        self.share = share

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """``[n, C]`` of all nodes."""
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = dropout(relu(norm(conv(x, edges))), self.share, self.training)
        out: Tensor = self.convs[-1](x, edges)
        return out
