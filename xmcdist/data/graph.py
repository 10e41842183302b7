"""Undirected graphs as CSR patterns: made from any edge list, parted into training and held-out edges, rewired.

Letters: n nodes, E directed edges as given, m undirected edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["Cleaned", "document_nodes", "held_out_edges", "rewired", "undirected"]

I64 = NDArray[np.int64]
_ROUNDS = 200  # of repairing a rewired graph; what is left by then is dropped


@dataclass(frozen=True, slots=True)
class Cleaned:
    """Edges ``u < v`` in ascending order, each once, and what was left out on the way.

    Attributes:
        u, v: ends of the edges, int64 ``[m]``.
        nodes: n.
        self_loops: directed edges from a node to itself, dropped.
        repeated: directed edges that say what another says, in either direction; merged.
    """

    u: I64
    v: I64
    nodes: int
    self_loops: int
    repeated: int

    def adjacency(self, chosen: NDArray[np.bool_] | None = None) -> sp.csr_matrix:
        """Both directions of the edges, or of the ``chosen`` ``[m]``: ones ``[n, n]`` float32, indices ascending."""
        u, v = (self.u, self.v) if chosen is None else (self.u[chosen], self.v[chosen])
        ones = np.ones(2 * len(u), np.float32)
        A = sp.csr_matrix((ones, (np.concatenate([u, v]), np.concatenate([v, u]))), shape=(self.nodes, self.nodes))
        A.sort_indices()
        return A


def undirected(source: I64, target: I64, nodes: int) -> Cleaned:
    """Both directions merged into one edge, repeated edges into one, self-loops dropped.

    Args:
        source, target: ends of directed edges, int64 ``[E]``, in ``[0, nodes)``.
        nodes: n, at most 2**31.

    Cost: O(E log E) time, a few int64 arrays ``[E]`` of memory.
    """
    loops = source == target
    key = np.minimum(source, target)[~loops] * nodes + np.maximum(source, target)[~loops]
    once = np.unique(key)
    return Cleaned(
        u=once // nodes, v=once % nodes, nodes=nodes, self_loops=int(loops.sum()), repeated=len(key) - len(once)
    )


def held_out_edges(graph: Cleaned, share: float, seed: int) -> NDArray[np.bool_]:
    """Which edges are kept from training, ``[m]``.

    A hash of seed and ends decides on each edge alone: the order of the file, the direction in
    which an edge was given and the other edges have no say.
    """
    if not share:
        return np.zeros(len(graph.u), np.bool_)
    mixed = _mix(_mix(np.uint64(seed) + graph.u.astype(np.uint64)) ^ graph.v.astype(np.uint64))
    return np.asarray((mixed >> np.uint64(11)) < np.uint64(share * 2.0**53), np.bool_)


def document_nodes(adjacency: sp.csr_matrix, max_degree: int) -> I64:
    """Nodes that training documents are made of: with a neighbour, and fewer than ``max_degree``; ascending."""
    degree = np.diff(adjacency.indptr)
    return np.flatnonzero((degree > 0) & (degree < max_degree))


def rewired(graph: Cleaned, seed: int) -> Cleaned:
    """The negative control: every node keeps its degree and gets other neighbours at random.

    All edges exchange ends; loops and repeated edges that come of it exchange again, with edges
    drawn from all.  What cannot be mended (a node joined to nearly all others) is dropped.

    Cost: O(m log m) a round, seldom more than twenty rounds.
    """
    rng = np.random.default_rng((seed, 11))
    n, m = graph.nodes, len(graph.u)
    turned = rng.random(m) < 0.5
    u, v = np.where(turned, graph.v, graph.u), np.where(turned, graph.u, graph.v)
    v = v[rng.permutation(m)]
    bad = _faulty(u, v, n)
    for _ in range(_ROUNDS):
        if not bad.any():
            break
        mixed = bad.copy()
        mixed[rng.integers(0, m, size=2 * int(bad.sum()))] = True
        places = np.flatnonzero(mixed)
        turned = rng.random(len(places)) < 0.5
        u[places], v[places] = np.where(turned, v[places], u[places]), np.where(turned, u[places], v[places])
        v[places] = v[rng.permutation(places)]
        bad = _faulty(u, v, n)
    return undirected(u[~bad], v[~bad], n)


def _faulty(u: I64, v: I64, nodes: int) -> NDArray[np.bool_]:
    """Loops, and of edges that say the same all but one."""
    key = np.minimum(u, v) * nodes + np.maximum(u, v)
    _, first = np.unique(key, return_index=True)
    bad = np.ones(len(u), np.bool_)
    bad[first] = False
    return np.asarray(bad | (u == v))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al., OOPSLA 2014): every bit of x changes half of the result's."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
