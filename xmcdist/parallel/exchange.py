"""Collectives on sparse and ragged rows: each with one meaning, identities on one process.

They work on numpy arrays and scipy CSR in host memory, over gloo also when the job has GPUs.

Letters: W ranks of the group, n rows, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from xmcdist.parallel.collectives import all_gather_ragged, check_same, group_size
from xmcdist.parallel.watch import collective

__all__ = ["Rows", "exchange", "gather_csr", "merge_rows", "reduce_csr"]

I64 = NDArray[np.int64]
Rows = tuple[I64, I64, NDArray[np.float32]]
"""Ragged scored rows: ``ptr [n + 1]``, ``ids``, ``scores``."""


def exchange(parts: Sequence[NDArray[Any]], group: dist.ProcessGroup | None = None) -> list[NDArray[Any]]:
    """All-to-all: ``parts[r]`` goes to rank r of the group.

    Args:
        parts: W arrays ``[n_r, ...]``, n_r free (0 allowed); dtype and the other dimensions
            equal for all parts of all ranks.

    Returns:
        W arrays, the r-th from rank r.

    Raises:
        ValueError: not one part a rank.
    """
    world = group_size(group)
    if len(parts) != world:
        raise ValueError(f"{len(parts)} parts for {world} ranks")
    if world == 1:
        return [parts[0]]
    rest, dtype = parts[0].shape[1:], parts[0].dtype
    check_same("exchange", str(dtype), rest, group)
    counts = torch.tensor([len(p) for p in parts])
    incoming = torch.empty_like(counts)
    with collective("exchange.sizes", 8 * (world - 1)):
        dist.all_to_all_single(incoming, counts, group=group)
    width = int(np.prod(rest, dtype=np.int64)) * dtype.itemsize
    mine = np.concatenate([np.ascontiguousarray(p).reshape(-1) for p in parts]).view(np.uint8)
    out = torch.empty(int(incoming.sum()) * width, dtype=torch.uint8)
    here = dist.get_rank(group)
    with collective("exchange", int(mine.nbytes - parts[here].nbytes)):
        dist.all_to_all_single(
            out, torch.from_numpy(mine), (incoming * width).tolist(), (counts * width).tolist(), group=group
        )
    flat = out.numpy().view(dtype)
    cuts = np.cumsum(incoming.numpy())[:-1] * (width // dtype.itemsize)
    return [part.reshape(-1, *rest) for part in np.split(flat, cuts)]


def gather_csr(A: sp.csr_matrix, group: dist.ProcessGroup | None = None) -> sp.csr_matrix:
    """The rows of all ranks, stacked in rank order, on every rank.

    Args:
        A: this rank's rows ``[n_r, D]``, n_r free; D and dtypes equal on all.
    """
    if group_size(group) == 1:
        return A
    lengths, indices, data = (
        torch.cat(all_gather_ragged(torch.from_numpy(np.ascontiguousarray(x)), group)).numpy()
        for x in (np.diff(A.indptr).astype(np.int64), A.indices.astype(np.int32, copy=False), A.data)
    )
    return sp.csr_matrix((data, indices, _ptr(lengths)), shape=(len(lengths), A.shape[1]))


def reduce_csr(A: sp.csr_matrix, cuts: Sequence[int], group: dist.ProcessGroup | None = None) -> sp.csr_matrix:
    """Sum of sparse matrices over ranks, every rank getting the rows it owns.

    Args:
        A: ``[K, D]`` on every rank; integers are summed exactly, floats in rank order.
        cuts: ``[W + 1]``; rank r gets rows ``cuts[r] : cuts[r + 1]``.

    Returns:
        ``[own rows, D]``, indices ascending.
    """
    world = group_size(group)
    if len(cuts) != world + 1 or cuts[0] != 0 or cuts[-1] != A.shape[0]:
        raise ValueError(f"cuts {list(cuts)} do not part {A.shape[0]} rows over {world} ranks")
    spans = [(int(A.indptr[a]), int(A.indptr[b])) for a, b in pairwise(cuts)]
    lengths = np.diff(A.indptr).astype(np.int64)
    pieces = zip(
        exchange([lengths[a:b] for a, b in pairwise(cuts)], group),
        exchange([A.indices[a:b].astype(np.int32, copy=False) for a, b in spans], group),
        exchange([A.data[a:b] for a, b in spans], group),
        strict=True,
    )
    total: sp.csr_matrix | None = None
    for own, indices, data in pieces:
        one = sp.csr_matrix((data, indices, _ptr(own)), shape=(len(own), A.shape[1]))
        total = one if total is None else sp.csr_matrix(total + one)
    if total is None:
        raise AssertionError("a group has at least one rank")
    total.sum_duplicates()
    return total


def merge_rows(rows: Rows, sizes: Sequence[int], k: int, group: dist.ProcessGroup | None = None) -> Rows:
    """Best k of every document from the candidates of all ranks, sent to the rank of the document.

    Ties go to the smaller id, so the answer does not depend on how many ranks the labels
    were split over.

    Args:
        rows: this rank's candidates for all ``sum(sizes)`` documents of the group, in rank
            order; an id comes from one rank only.
        sizes: documents of each rank, ``[W]``.
        k: most kept a document.

    Returns:
        The rows of this rank's own documents, ids ascending in a row.
    """
    ptr, ids, scores = rows
    ends = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    if len(ptr) != ends[-1] + 1:
        raise ValueError(f"candidates of {len(ptr) - 1} documents, but the ranks have {ends[-1]}")
    lengths = np.diff(ptr)
    spans = [(int(ptr[a]), int(ptr[b])) for a, b in pairwise(ends)]
    counts = exchange([lengths[a:b] for a, b in pairwise(ends)], group)
    all_ids = np.concatenate(exchange([np.asarray(ids[a:b], np.int64) for a, b in spans], group))
    all_scores = np.concatenate(exchange([np.asarray(scores[a:b], np.float32) for a, b in spans], group))
    n = len(counts[0])
    doc = np.concatenate([np.repeat(np.arange(n), c) for c in counts])
    order = np.lexsort((all_ids, -all_scores, doc))
    doc = doc[order]
    place = np.arange(len(doc)) - np.searchsorted(doc, doc)  # in its document, best first
    best = order[place < k]
    doc = np.concatenate([np.repeat(np.arange(n), c) for c in counts])[best]
    best = best[np.lexsort((all_ids[best], doc))]
    return _ptr(np.bincount(doc, minlength=n).astype(np.int64)), all_ids[best], all_scores[best]


def _ptr(lengths: I64) -> I64:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
