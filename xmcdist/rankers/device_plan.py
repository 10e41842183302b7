"""How the clusters of a level are cut into blocks for a device: what goes together, and what fits.

Only sizes go in, so a plan is the same wherever it is made.  Letters: C clusters; n documents,
v stored sparse values and m nodes of a cluster; D sparse features, d dense width.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["MACHINES", "Item", "Machine", "Plan", "Planned", "Sizes", "make_plan"]

I64 = NDArray[np.int64]

_TENSORS = 18  # of [S, n, m] float32 at once, at most
_ENTRY = 100  # bytes for each stored value while a block is cut out
_PRODUCTS = 60  # with K, that a block is expected to take
_PASSES = 25  # over [S, n, m] for each of these
_MOST_SLOTS = 1 << 15
_WASTE = 0.3  # share of a block's expected time that may go into padding


class Machine(NamedTuple):
    """Rough speeds: they decide how blocks are formed, not what comes out."""

    flops: float  # a second, of batched float32 products
    gather: float  # bytes a second, of rows gathered by a sparse product
    stream: float  # bytes a second
    block: float  # seconds to start the kernels of a block


MACHINES = {"cuda": Machine(4e13, 3e12, 3e12, 5e-3), "cpu": Machine(5e10, 5e9, 1e10, 2e-2)}


class Item(NamedTuple):
    """A slot of a block: nodes ``[start, stop)`` of a cluster, counted from the first of the cluster's own."""

    cluster: int
    start: int
    stop: int


class Planned(NamedTuple):
    """One block: its slots, and whether inner products of documents are kept or the documents themselves."""

    items: list[Item]
    gram: bool


class Plan(NamedTuple):
    """All blocks, and the clusters of which not one node fits."""

    blocks: list[Planned]
    too_large: list[int]


class Sizes(NamedTuple):
    """What a plan depends on: ``documents``, ``values`` and ``nodes`` are n, v and m, ``[C]`` each."""

    documents: I64
    values: I64
    nodes: I64
    num_sparse: int
    num_dense: int


def make_plan(sizes: Sizes, budget: int, machine: Machine) -> Plan:
    """Blocks that fit ``budget`` bytes, of clusters so alike that padding costs little.

    Clusters without documents or nodes are in no block.
    """
    some = np.flatnonzero((sizes.documents > 0) & (sizes.nodes > 0))
    gram = _prefers_gram(sizes, machine)
    blocks: list[Planned] = []
    too_large: list[int] = []
    whole: dict[bool, list[Item]] = {True: [], False: []}
    for c in some.tolist():
        n, v, m = int(sizes.documents[c]), int(sizes.values[c]), int(sizes.nodes[c])
        as_gram = bool(gram[c]) and _bytes(sizes, 1, n, v, 1, gram=True) <= budget
        fixed = _bytes(sizes, 1, n, v, 0, gram=as_gram)
        width = min(m, (budget - fixed) // max(_bytes(sizes, 1, n, v, 1, gram=as_gram) - fixed, 1))
        if width < 1:
            too_large.append(c)
        elif width == m:
            whole[as_gram].append(Item(c, 0, m))
        else:
            edges = np.linspace(0, m, ceil(m / width) + 1).astype(int)
            blocks += [Planned([Item(c, a, b)], as_gram) for a, b in pairwise(edges.tolist())]
    for as_gram, items in whole.items():
        blocks += [Planned(part, as_gram) for part in _grouped(items, sizes, budget, machine, gram=as_gram)]
    return Plan(blocks, too_large)


def _prefers_gram(sizes: Sizes, machine: Machine) -> NDArray[np.bool_]:
    """Where making and using ``[n, n]`` inner products is expected to be faster than X and its transpose, ``[C]``.

    Never where documents outnumber features: such inner products are singular, and rounding weighs more.
    """
    n, v, m = (a.astype(np.float64) for a in (sizes.documents, sizes.values, sizes.nodes))
    d = sizes.num_dense
    dense_bytes = 4 * n * n
    inner = 4 * v * n / machine.gather + 2 * n * n * d / machine.flops
    inner += _PRODUCTS * np.maximum(2 * n * n * m / machine.flops, dense_bytes / machine.stream)
    direct = _PRODUCTS * (8 * v * m / machine.gather + 4 * n * d * m / machine.flops)
    return np.asarray((inner <= direct) & (n <= np.minimum(v, sizes.num_sparse) + d))


def _bytes(sizes: Sizes, slots: int, n: int, values: int, m: int, *, gram: bool) -> int:
    """Memory of a block: of ``slots`` slots padded to n documents and m nodes, with so many stored values in all."""
    features = min(values, slots * sizes.num_sparse)
    state = 4 * _TENSORS * slots * n * m + 8 * features * m
    rows = slots * n * (4 * sizes.num_dense + 40)
    return state + rows + _ENTRY * values + (10 * slots * n * n if gram else 0)


def _grouped(items: list[Item], sizes: Sizes, budget: int, machine: Machine, *, gram: bool) -> list[list[Item]]:
    """Cut whole clusters into blocks: by nodes, roughly, then by documents, the largest first."""

    def octave(item: Item) -> int:
        return int(item.stop - 1).bit_length()

    def seconds(n: int, m: int) -> float:
        # Of a slot, what padding adds to: products with K and passes over its tensors.
        products = 2.0 * n * n * m / machine.flops if gram else 4.0 * n * sizes.num_dense * m / machine.flops
        return _PRODUCTS * (products + _PASSES * 4.0 * n * m / machine.stream)

    out: list[list[Item]] = []
    n = m = values = 0
    used = 0.0
    order = sorted(items, key=lambda i: (-octave(i), -int(sizes.documents[i.cluster]), -i.stop, i.cluster))
    for item in order:
        own, v = int(sizes.documents[item.cluster]), int(sizes.values[item.cluster])
        wide_n, wide_m = max(n, own), max(m, item.stop)
        slots = len(out[-1]) + 1 if out else 0
        needs = seconds(own, item.stop)
        waste = slots * seconds(wide_n, wide_m) - (used + needs)
        fits = slots <= _MOST_SLOTS and _bytes(sizes, slots, wide_n, values + v, wide_m, gram=gram) <= budget
        if out and fits and waste <= max(machine.block, _WASTE * (used + needs)):
            out[-1].append(item)
            n, m, values, used = wide_n, wide_m, values + v, used + needs
        else:
            out.append([item])
            n, m, values, used = own, item.stop, v, needs
    return out
