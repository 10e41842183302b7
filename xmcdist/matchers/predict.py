"""The best clusters of one level for many documents, scored where their rows are.

Every rank brings its own documents and takes their best away.  In between, documents visit
the ranks that hold the level's rows, a block of them at a time.

Letters: n own documents, K nodes of the level, d width, b documents of a block over all ranks.
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
from xmcdist.parallel.collectives import all_gather_ragged, gather_objects
from xmcdist.parallel.exchange import Rows, gather_csr, merge_rows
from xmcdist.parallel.mesh import Mesh
from xmcdist.sparse.csr import row_slice

__all__ = ["POST_PROCESSORS", "post_processor_of", "predict_level"]

_MAX_SCORES = 1 << 24  # of a block: dense scoring holds 64 MB of them
_EMPTY = -1  # a slot that a small shard cannot fill


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
    mesh: Mesh,
    block: int = 4096,
    scoring: str = "auto",
) -> sp.csr_matrix:
    """One step of a beam search, labels in parallel; collective.

    Each rank scores its own rows among the children of the kept parents, for the documents of
    all ranks of its replica, and keeps its best; these go to the rank of the document, which
    merges them, ties to the smaller id.

    Args:
        E: vectors of this rank's own documents ``[n, d]``, n free; may be memory-mapped.
        head: this rank's rows.
        parent_scores: ``[n, K_above]``; stored entries, 0 included, are the kept parents.
            None: the root, with score 1, at level 1.
        child_ptr: int64 ``[K_above + 1]``.
        beam: nodes kept a document.
        post_processor: ``l3-hinge`` or ``sigmoid``.
        mesh: who takes part.
        block: most documents at a time, over all ranks of the replica.
        scoring: as in `score_pairs`.

    Returns:
        ``[n, K]`` CSR float32 of the own documents, at most ``beam`` entries a row, indices
        ascending, scores of exactly 0 stored.

    Raises:
        ValueError: an unknown post-processor, or shapes that do not fit.

    Cost: documents of the replica x (children of a beam) / S dot products a rank; it sends
    each own document's vector to S - 1 ranks, and ``beam`` (id, score) pairs for each of theirs.
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
    step = max(1, min(block, _MAX_SCORES // head.shard.widest) // mesh.shards)
    most = max(gather_objects(len(E), mesh.shard_group))  # all take part until the last rank is through
    rows = []
    for start in range(0, most, step):
        part = row_slice(parent_scores, min(start, len(E)), min(start + step, len(E)))
        vectors = np.array(E[start : start + step], dtype=np.float32)  # a copy: torch wants writable memory
        rows.append(_predict_block(vectors, head, part, child_ptr, beam, post_processor, scoring, mesh))
    lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(r[0]) for r in rows)])
    ids = np.concatenate([np.zeros(0, np.int32), *(r[1].astype(np.int32) for r in rows)])
    scores = np.concatenate([np.zeros(0, np.float32), *(r[2] for r in rows)])
    return sp.csr_matrix((scores, ids, np.cumsum(lengths)), shape=(len(E), nodes))


@torch.no_grad()
def _predict_block(
    own: NDArray[np.float32],
    head: ShardedHead,
    parents: sp.csr_matrix,
    child_ptr: NDArray[np.int64],
    beam: int,
    post_processor: str,
    scoring: str,
    mesh: Mesh,
) -> Rows:
    """The best of a block's own documents."""
    device = head.weight.device
    visitors = all_gather_ragged(torch.from_numpy(own).to(device), mesh.shard_group)
    sizes, E = [len(v) for v in visitors], torch.cat(visitors)
    doc_ptr, row, parent = children_of(gather_csr(parents, mesh.shard_group), child_ptr, head.start, head.stop)
    doc = np.repeat(np.arange(len(E), dtype=np.int64), np.diff(doc_ptr))
    docs, rows = (torch.from_numpy(x).to(device) for x in (doc, row))
    raw = score_pairs(E, head.weight, head.bias, docs, rows, scoring)
    score = POST_PROCESSORS[post_processor](raw.cpu().numpy()) * parent
    best = np.full((len(E), beam), -np.inf, dtype=np.float32)
    node = np.full((len(E), beam), _EMPTY, dtype=np.int64)
    top_of_rows(doc_ptr, row + head.start, score, best, node)
    kept = node != _EMPTY
    ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept.sum(1), dtype=np.int64)])
    return merge_rows((ptr, node[kept], best[kept]), sizes, beam, mesh.shard_group)
