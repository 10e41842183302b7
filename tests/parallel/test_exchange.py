"""Sparse collectives against the same in plain Python on everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from tests.helpers.ranks import on_ranks
from xmcdist.parallel.collectives import CollectiveMismatchError, all_gather_embeddings
from xmcdist.parallel.exchange import exchange, gather_csr, merge_rows, reduce_csr
from xmcdist.parallel.shards import LabelShard
from xmcdist.parallel.traffic import TRAFFIC

K, D = 11, 7


def _matrix(rank: int, dtype: type = np.int64) -> sp.csr_matrix:
    """Another sparse matrix on each rank; rank 1 has none of its entries."""
    rng = np.random.default_rng(rank)
    dense = rng.integers(1, 2**40, (K, D)) * (rng.random((K, D)) < 0.4) * (rank != 1)
    return sp.csr_matrix(dense.astype(dtype))


@on_ranks(1, 2, 3, 4)
def test_exchange_delivers_each_part_to_its_rank(rank: int, world_size: int) -> None:
    for shape in ((), (3,)):
        parts = [np.full((r * rank, *shape), 10 * rank + r, np.int32) for r in range(world_size)]
        before = TRAFFIC.copy()
        got = exchange(parts)
        assert [g.tolist() for g in got] == [
            np.full((rank * r, *shape), 10 * r + rank, np.int32).tolist() for r in range(world_size)
        ]
        assert all(g.dtype == np.int32 and g.shape[1:] == shape for g in got)
        away = sum(p.nbytes for r, p in enumerate(parts) if r != rank)
        assert TRAFFIC.since(before).sent["exchange"] == away


@on_ranks(1, 2, 3, 4)
def test_reduce_csr_sums_exactly_on_the_owner_and_gather_csr_stacks(rank: int, world_size: int) -> None:
    shard = LabelShard(rank, world_size, K)
    whole = sum(_matrix(r).toarray() for r in range(world_size))
    own = reduce_csr(_matrix(rank), shard.cuts)
    assert own.dtype == np.int64  # 2**40 and more: float32, even float64 sums of many would round
    assert own.has_sorted_indices
    np.testing.assert_array_equal(own.toarray(), whole[shard.start : shard.stop])
    np.testing.assert_array_equal(gather_csr(own).toarray(), whole)
    zeros = sp.csr_matrix((np.zeros(1, np.float32), [2], [0, 1]), shape=(1, D))
    assert gather_csr(zeros).nnz == world_size  # a stored 0 stays stored
    with pytest.raises(ValueError, match="do not part"):
        reduce_csr(_matrix(rank), [0] * (world_size + 2))


def _candidates(labels: int = K, docs: int = 9) -> np.ndarray:
    """Scores with many exact ties."""
    return np.random.default_rng(5).integers(0, 4, (docs, labels)).astype(np.float32)


@on_ranks(1, 2, 3, 4)
def test_merged_rows_are_each_documents_best_on_its_own_rank(rank: int, world_size: int) -> None:
    scores = _candidates()
    shard = LabelShard(rank, world_size, K)
    sizes = [[9], [9, 0], [2, 0, 7], [0, 4, 4, 1]][world_size - 1]
    first = sum(sizes[:rank])
    keep = np.random.default_rng(6).random(scores.shape) < 0.7
    keep[3] = False  # a document without a candidate
    ids = np.arange(K)
    mine = [ids[(keep[i]) & (ids >= shard.start) & (ids < shard.stop)] for i in range(9)]
    ptr = np.concatenate([[0], np.cumsum([len(m) for m in mine])]).astype(np.int64)
    flat = np.concatenate(mine).astype(np.int64)
    values = np.concatenate([scores[i, m] for i, m in enumerate(mine)])
    for k in (1, 3, 50):
        out_ptr, out_ids, out_scores = merge_rows((ptr, flat, values), sizes, k)
        assert len(out_ptr) == sizes[rank] + 1
        for i in range(sizes[rank]):
            doc = first + i
            want = sorted((-float(scores[doc, j]), int(j)) for j in ids[keep[doc]])[:k]
            a, z = out_ptr[i], out_ptr[i + 1]
            assert list(zip(out_ids[a:z].tolist(), out_scores[a:z].tolist(), strict=True)) == sorted(
                (j, -s) for s, j in want
            )
    with pytest.raises(ValueError, match="candidates of 9 documents"):
        merge_rows((ptr, flat, values), [*sizes[:-1], sizes[-1] + 1], 1)


@on_ranks(2)
def test_parts_of_other_types_raise_on_every_rank(rank: int) -> None:
    with pytest.raises(CollectiveMismatchError, match=r"rank 0: exchange int32 \[\]\n  rank 1: exchange int64 \[\]"):
        exchange([np.zeros(1, np.int32 if rank == 0 else np.int64)] * 2)


@on_ranks(1, 2, 3)
def test_gathered_embeddings_and_their_gradient(rank: int, world_size: int) -> None:
    sizes = [[3], [0, 3], [2, 0, 1]][world_size - 1]
    whole = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    first = sum(sizes[:rank])
    x = whole[first : first + sizes[rank]].clone().requires_grad_()
    before = TRAFFIC.copy()
    out = all_gather_embeddings(x, sizes, scale=5.0)
    assert torch.equal(out, whole)
    # Rank r's loss weighs document i by (r + 1)(i + 1); the gradient sums over ranks, times 5.
    (out * torch.arange(1.0, 4.0)[:, None] * (rank + 1)).sum().backward()
    ranks = world_size * (world_size + 1) / 2
    want = 5 * ranks * torch.arange(1.0, 4.0)[first : first + sizes[rank], None].expand(-1, 4)
    assert x.grad is not None
    assert torch.equal(x.grad, want)
    padded = max(sizes) * 4 * 4
    sent = TRAFFIC.since(before).sent
    assert sent["all_gather_embeddings"] == padded * (world_size - 1)
    assert sent["reduce_scatter_embeddings"] == padded * (world_size - 1)
