"""One step of the matcher's beam: every rank scores its own nodes for all documents, tops are merged."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from xmcdist.matchers.head import ShardedHead
from xmcdist.parallel.collectives import NO_LABEL, merge_topk

__all__ = ["level_beam"]


@torch.no_grad()
def level_beam(
    embedding: NDArray[np.float32],
    head: ShardedHead,
    parent_scores: sp.csr_matrix,
    child_ptr: NDArray[np.int64],
    beam: int,
    *,
    sigmoid: bool = False,
    block: int = 1024,
) -> sp.csr_matrix:
    """The best ``beam`` nodes of a level for each document; collective.

    A node's score is its parent's times ``exp(-max(0, 1 - s)^3)`` (or the sigmoid of s);
    only children of the parents kept before are looked at.  Ties go to the smaller node,
    so the answer does not depend on how many ranks share the level.

    Args:
        embedding: all documents ``[N, d]``, may be memory-mapped.
        head: this rank's rows.
        parent_scores: ``[N, K_{t-1}]``, stored entries are the kept parents; ones ``[N, 1]`` at the top.
        child_ptr: ``[K_{t-1} + 1]``.
        beam: nodes kept.
        sigmoid: for a head trained with the logistic loss.
        block: documents scored at a time; memory is ``block * n`` scores.

    Returns:
        ``[N, K_t]`` float32, at most ``beam`` entries a row; the same on every rank.

    Cost: 2 N n d multiplications a rank.
    """
    device, nodes = head.rows.device, int(child_ptr[-1])
    own = np.arange(head.shard.start, head.shard.stop)
    parents = torch.from_numpy(np.searchsorted(child_ptr, own, side="right") - 1).to(device)
    rows, cols, values = [], [], []
    for start in range(0, embedding.shape[0], block):
        E = torch.from_numpy(np.array(embedding[start : start + block], dtype=np.float32)).to(device)
        s = E @ head.rows.t() + head.bias.reshape(1, -1)
        score = torch.sigmoid(s) if sigmoid else torch.exp(-(1 - s).clamp(min=0).pow(3))
        kept = parent_scores[start : start + block]
        above = torch.full(kept.shape, -1.0, device=device)
        row = np.repeat(np.arange(kept.shape[0]), np.diff(kept.indptr))
        above[torch.from_numpy(row).to(device), torch.from_numpy(kept.indices.astype(np.int64)).to(device)] = (
            torch.from_numpy(np.array(kept.data, dtype=np.float32)).to(device)
        )
        above = above[:, parents]
        score = torch.where(above >= 0, score * above, torch.full_like(score, float("-inf")))
        top, labels = _local_top(score, head.shard.start, min(beam, nodes))
        top, labels = merge_topk(top, labels, k=min(beam, nodes))
        found = (labels != NO_LABEL) & torch.isfinite(top)
        rows.append((found.nonzero()[:, 0] + start).cpu().numpy())
        cols.append(labels[found].cpu().numpy())
        values.append(top[found].cpu().numpy())
    out = sp.csr_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(cols))), shape=(embedding.shape[0], nodes)
    )
    out.sort_indices()
    return out


def _local_top(score: torch.Tensor, first: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of a rank's nodes ``[B, n]``, ties to the smaller; padded where it owns fewer."""
    order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    top = torch.full((score.shape[0], k), float("-inf"), device=score.device)
    labels = torch.full((score.shape[0], k), NO_LABEL, dtype=torch.int64, device=score.device)
    top[:, : order.shape[1]], labels[:, : order.shape[1]] = score.gather(1, order), order + first
    labels[~torch.isfinite(top)] = NO_LABEL
    return top, labels
