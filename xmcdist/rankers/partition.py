"""Which rank solves which nodes of a level: contiguous ranges of near-equal cost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.sparse.features import Features

__all__ = ["cluster_ranges", "estimate_costs", "node_ranges"]


def estimate_costs(features: Features, M: sp.csr_matrix, child_ptr: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimated work of every cluster: stored values of its documents, times children.

    Args:
        features: of the N documents.
        M: ``[N, K]``; documents of each cluster are its stored entries.
        child_ptr: ``[K+1]``.

    Returns:
        ``[K]`` float64, positive.
    """
    length = np.full(M.shape[0], 1.0 + features.num_dense)
    if features.sparse is not None:
        length += np.diff(features.sparse.indptr)
    per_entry = np.repeat(length, np.diff(M.indptr))
    documents = np.bincount(M.indices, weights=per_entry, minlength=M.shape[1])
    return np.asarray(documents * np.diff(child_ptr) + 1.0, np.float64)


def cluster_ranges(costs: NDArray[np.float64], world_size: int) -> list[tuple[int, int]]:
    """Cut the clusters into ``world_size`` contiguous ranges whose costliest is as cheap as can be.

    Args:
        costs: ``[K]``, not negative.
        world_size: number of ranges; some are empty when there are fewer clusters.

    Returns:
        half-open ranges in order, together all of ``[0, K)``.
    """
    total = np.concatenate([[0.0], np.cumsum(costs, dtype=np.float64)])
    low, high = float(np.max(costs, initial=0.0)), float(total[-1])
    for _ in range(60):  # halving: the least capacity that world_size greedy ranges can hold
        middle = (low + high) / 2
        if _greedy(total, middle, world_size)[-1] == costs.size:
            high = middle
        else:
            low = middle
    cuts = _greedy(total, high, world_size)
    cuts[-1] = costs.size
    return list(pairwise(cuts))


def node_ranges(costs: NDArray[np.float64], child_ptr: NDArray[np.int64], world_size: int) -> list[tuple[int, int]]:
    """Like `cluster_ranges`, but ranges of nodes, which may cut a cluster: the first level has only one.

    Args:
        costs: ``[K]`` of the clusters.
        child_ptr: ``[K+1]``.
        world_size: number of ranges.

    Returns:
        half-open node ranges in order, together all of ``[0, child_ptr[K])``.
    """
    children = np.diff(child_ptr)
    return cluster_ranges(np.repeat(costs / np.maximum(children, 1), children), world_size)


def _greedy(total: NDArray[np.float64], capacity: float, world_size: int) -> list[int]:
    """Cut points when each range takes as many clusters as fit the capacity."""
    cuts = [0]
    for _ in range(world_size):
        cuts.append(int(np.searchsorted(total, total[cuts[-1]] + capacity, side="right")) - 1)
    return cuts
