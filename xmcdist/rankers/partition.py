"""Which rank solves which nodes of a level: contiguous ranges of near-equal cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.sparse.features import Features

__all__ = ["cluster_ranges", "estimate_costs", "level_costs", "member_sizes", "node_ranges"]

# A pass over documents that do not fit the caches takes longer a value, and more documents take
# more passes.  Fitted to the solver's CPU seconds on 49,000 package descriptions, three levels,
# with words, with 384 dense features and with both; see `level_costs`.
_CACHE = 1 << 24  # bytes
_SLOWEST = 5.0


def member_sizes(features: Features, M: sp.csr_matrix) -> NDArray[np.int64]:
    """How much data the documents of each cluster are.

    Whole numbers, so that ranks may each count documents of their own, and the sums over
    ranks do not depend on how many there are.

    Args:
        features: of n documents.
        M: ``[n, K]``; documents of each cluster are its stored entries.

    Returns:
        ``[K, 2]``: documents, and stored values of the sparse part.
    """
    documents = np.bincount(M.indices, minlength=M.shape[1])
    values: NDArray[Any] = np.zeros(M.shape[1])
    if features.sparse is not None:
        per_entry = np.repeat(np.diff(features.sparse.indptr), np.diff(M.indptr))
        values = np.bincount(M.indices, weights=per_entry, minlength=M.shape[1])  # float64: exact below 2**53
    return np.stack([documents, values], axis=1).astype(np.int64)


def level_costs(sizes: NDArray[np.int64], num_dense: int, child_ptr: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimated work of every cluster: values of its documents times children, more where they are many.

    Args:
        sizes: ``[K, 2]`` of `member_sizes`, over all documents.
        num_dense: width d of the dense features.
        child_ptr: ``[K+1]``.

    Returns:
        ``[K]`` float64, positive.
    """
    documents, values = sizes.T
    in_memory = 8 * values + 4 * num_dense * documents  # bytes
    slow = np.minimum(1.0 + in_memory / _CACHE, _SLOWEST)
    return np.asarray((values + (1 + num_dense) * documents) * slow * np.diff(child_ptr) + 1.0, np.float64)


def estimate_costs(features: Features, M: sp.csr_matrix, child_ptr: NDArray[np.int64]) -> NDArray[np.float64]:
    """`level_costs` where one process has all documents.

    Args:
        features: of the N documents.
        M: ``[N, K]``; documents of each cluster are its stored entries.
        child_ptr: ``[K+1]``.

    Returns:
        ``[K]`` float64, positive.
    """
    return level_costs(member_sizes(features, M), features.num_dense, child_ptr)


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
