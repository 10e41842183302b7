"""From binary k-means codes to a tree of many children a node: how deep, how wide.

Letters: L labels, c = 2**depth leaf clusters, S = L slots.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from xmcdist.trees.errors import TreeError
from xmcdist.trees.label_tree import LabelTree

__all__ = ["binary_depth", "build_tree", "cluster_levels"]


def binary_depth(num_labels: int, max_leaf_size: int) -> int:
    """How often labels are halved until no leaf cluster holds more than ``max_leaf_size``; at least once.

    Raises:
        TreeError: fewer than two labels, or leaves larger than all labels together.

    Source: amzn/pecos ``ClusterChain``, depth = max(1, ceil(log2(L / max_leaf_size))).  X-Transformer's
    floor(log2(floor(L / 100) + 1)) + 1 is the same for 100, and one more from 100 (2**k - 1) to 100 * 2**k labels.
    """
    if num_labels < 2:
        raise TreeError(f"a label tree needs at least 2 labels, these are {num_labels}")
    if max_leaf_size < 1:
        raise TreeError(f"tree.max_leaf_size ({max_leaf_size}) must be at least 1")
    if max_leaf_size > num_labels:
        raise TreeError(
            f"tree.max_leaf_size ({max_leaf_size}) is larger than the {num_labels} labels; "
            f"set it to at most {num_labels}"
        )
    depth = max(1, math.ceil(math.log2(num_labels / max_leaf_size)))
    if 1 << depth > num_labels:
        largest = 1 << (num_labels.bit_length() - 1)
        raise TreeError(
            f"tree.max_leaf_size ({max_leaf_size}) asks for {1 << depth} leaf clusters of {num_labels} labels; "
            f"set it to at least {math.ceil(num_labels / largest)}"
        )
    return depth


def cluster_levels(depth: int, nr_splits: int, min_codes: int | None = None, *, flat: bool = False) -> list[int]:
    """Sizes of the cluster levels K_1..K_{T-1}, coarse to fine; the labels come below.

    The leaf clusters are joined ``nr_splits`` at a time while there are more than ``min_codes``.

    Args:
        depth: binary depth; there are 2**depth leaf clusters.
        nr_splits: most children a cluster, at least 2.
        min_codes: default ``nr_splits``.
        flat: join none; the leaf clusters are the only level.

    Raises:
        TreeError: a setting out of range.

    Source: amzn/pecos ``ClusterChain.from_partial_chain``; flat: X-Transformer (Chang et al., KDD 2020).
    """
    least = nr_splits if min_codes is None else min_codes
    if nr_splits < 2:
        raise TreeError(f"tree.nr_splits ({nr_splits}) must be at least 2")
    if least < 1:
        raise TreeError(f"tree.min_codes ({least}) must be at least 1")
    sizes = [1 << depth]
    while sizes[0] > least and not flat:
        sizes.insert(0, -(-sizes[0] // nr_splits))
    return sizes


def build_tree(
    codes: NDArray[np.int64], depth: int, *, nr_splits: int = 16, min_codes: int | None = None, flat: bool = False
) -> LabelTree:
    """A tree from the leaf cluster of every label.

    Args:
        codes: int64 ``[L]`` in ``[0, 2**depth)``; neighbouring codes share ancestors.
        depth: binary depth of the codes.
        nr_splits: see `cluster_levels`.
        min_codes: see `cluster_levels`.
        flat: see `cluster_levels`.

    Returns:
        A partition; labels of one cluster are in rising order.

    Raises:
        TreeError: a setting out of range.
    """
    leaves = 1 << depth
    if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < leaves:
        raise TreeError(f"leaf cluster codes reach from {codes.min()} to {codes.max()}, outside 0..{leaves - 1}")
    sizes = cluster_levels(depth, nr_splits, min_codes, flat=flat)
    child_ptr = [np.array([0, sizes[0]], dtype=np.int64)]
    for above, below in pairwise(sizes):
        child_ptr.append(np.minimum(np.arange(above + 1, dtype=np.int64) * nr_splits, below))
    counts = np.bincount(codes, minlength=leaves)
    child_ptr.append(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    return LabelTree(child_ptr, np.argsort(codes, kind="stable").astype(np.int64), len(codes))
