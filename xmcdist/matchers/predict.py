"""The best clusters of one level for many documents, scored where their rows are.

Letters: N documents, K nodes of the level, d width, b documents of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from xmcdist.matchers.candidates import children_of
from xmcdist.matchers.head import ShardedHead, score_pairs
from xmcdist.matchers.pair_kernels import top_of_rows
from xmcdist.parallel.collectives import NO_LABEL, merge_topk
from xmcdist.parallel.launch import World
from xmcdist.sparse.csr import row_slice

__all__ = ["POST_PROCESSORS", "post_processor_of", "predict_level"]

_MAX_SCORES = 1 << 24  # of a block: dense scoring holds 64 MB of them


def _l3_hinge(v: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.exp(-(np.maximum(0.0, 1.0 - v) ** 3)), np.float32)


def _sigmoid(v: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(np.exp(-np.logaddexp(0.0, -v)), np.float32)


POST_PROCESSORS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "l3-hinge": _l3_hinge,
    "sigmoid": _sigmoid,
}
"""From a raw score to one in [0, 1] that is multiplied down the tree."""


def post_processor_of(loss: str) -> str:
    """The post-processor that belongs to a loss of `xmcdist.matchers.losses`."""
    return "sigmoid" if loss == "bce" else "l3-hinge"


def predict_level(
    E: NDArray[np.float32],
    head: ShardedHead,
    parent_scores: sp.csr_matrix | None,
    child_ptr: NDArray[np.int64],
    beam: int,
    post_processor: str,
    world: World,
    block: int = 1024,
    scoring: str = "auto",
) -> sp.csr_matrix:
    """One step of a beam search, labels in parallel; collective.

    Each rank scores its own rows among the children of the kept parents, for every
    document, and keeps its best; the best of all ranks are merged, ties to the smaller id.

    Args:
        E: document vectors ``[N, d]``, the same on every rank; may be memory-mapped.
        head: this rank's rows.
        parent_scores: ``[N, K_above]``; stored entries, 0 included, are the kept parents.
            None: the root, with score 1, at level 1.
        child_ptr: int64 ``[K_above + 1]``.
        beam: nodes kept a document.
        post_processor: ``l3-hinge`` or ``sigmoid``.
        world: who takes part.
        block: most documents at a time.
        scoring: as in `score_pairs`.

    Returns:
        ``[N, K]`` CSR float32, at most ``beam`` entries a row, indices ascending, scores of
        exactly 0 stored; the same on every rank.

    Raises:
        ValueError: an unknown post-processor, or shapes that do not fit.

    Cost: N x (children of a beam) / W dot products a rank, and N x beam x W gathered pairs.
    """
    if post_processor not in POST_PROCESSORS:
        raise ValueError(f"post_processor={post_processor!r} is none of {', '.join(POST_PROCESSORS)}")
    nodes = int(child_ptr[-1])
    if parent_scores is None:
        parent_scores = sp.csr_matrix(np.ones((len(E), 1), dtype=np.float32))
    if parent_scores.shape != (len(E), len(child_ptr) - 1) or nodes != head.shard.num_labels:
        raise ValueError(
            f"parent scores {parent_scores.shape} do not fit {len(E)} documents and {len(child_ptr) - 1} parents, "
            f"or the head's {head.shard.num_labels} nodes are not the level's {nodes}"
        )
    beam = min(beam, nodes)
    widest = -(-nodes // world.world_size)  # not the own share: ranks must take the same blocks
    block = max(1, min(block, _MAX_SCORES // widest))
    rows = []
    for start in range(0, len(E), block):
        stop = min(start + block, len(E))
        part = row_slice(parent_scores, start, stop)
        vectors = np.array(E[start:stop], dtype=np.float32)  # a copy: torch wants writable memory
        rows.append(_predict_block(vectors, head, part, child_ptr, beam, post_processor, scoring))
    lengths = np.concatenate([np.zeros(1, np.int64), *(r[0] for r in rows)])
    ids = np.concatenate([np.zeros(0, np.int32), *(r[1].astype(np.int32) for r in rows)])
    scores = np.concatenate([np.zeros(0, np.float32), *(r[2] for r in rows)])
    return sp.csr_matrix((scores, ids, np.cumsum(lengths)), shape=(len(E), nodes))


@torch.no_grad()
def _predict_block(
    E: NDArray[np.float32],
    head: ShardedHead,
    parents: sp.csr_matrix,
    child_ptr: NDArray[np.int64],
    beam: int,
    post_processor: str,
    scoring: str,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Row lengths, node ids (ascending in a row) and scores of a block's best."""
    device = head.weight.device
    doc_ptr, row, parent = children_of(parents, child_ptr, head.start, head.stop)
    doc = np.repeat(np.arange(len(E), dtype=np.int64), np.diff(doc_ptr))
    vectors, docs, rows = (torch.from_numpy(x).to(device) for x in (E, doc, row))
    raw = score_pairs(vectors, head.weight, head.bias, docs, rows, scoring)
    score = POST_PROCESSORS[post_processor](raw.cpu().numpy()) * parent
    best = np.full((len(E), beam), -np.inf, dtype=np.float32)
    node = np.full((len(E), beam), NO_LABEL, dtype=np.int64)
    top_of_rows(doc_ptr, row + head.start, score, best, node)
    merged = merge_topk(torch.from_numpy(best).to(device), torch.from_numpy(node).to(device), k=beam)
    best, node = merged[0].cpu().numpy(), merged[1].cpu().numpy()
    order = np.argsort(np.where(node == NO_LABEL, np.iinfo(np.int64).max, node), axis=1, kind="stable")
    best, node = np.take_along_axis(best, order, 1), np.take_along_axis(node, order, 1)
    kept = node != NO_LABEL
    return kept.sum(1).astype(np.int64), node[kept], best[kept]
