"""One row a node of a level, sharded: a rank holds, scores and updates only the rows it owns.

Shapes: B documents of the global batch, d width, n rows owned, P candidate pairs.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmcdist.parallel.shards import LabelShard

__all__ = ["ShardedHead"]

_BLOCK = 256  # rows drawn under one key
_PAIR_CHUNK = 1 << 16  # pairs gathered at a time
_PAIR_COST = 16
"""A gathered pair costs about as much as so many entries of a matrix product of the same
width: memory traffic of two rows against arithmetic at full speed."""


class ShardedHead(nn.Module):
    """Rows ``[n, d]`` and biases ``[n, 1]`` of one rank's range of nodes, in tree order."""

    def __init__(self, shard: LabelShard, width: int, *, seed: int, level: int, sparse: bool = False) -> None:
        """Draw rows from N(0, 0.02), the same values whatever the number of ranks.

        Args:
            shard: the owned range of the level's nodes.
            width: d.
            seed, level: key of the draw.
            sparse: gradients only for rows with a candidate, for an optimizer that moves only these.
        """
        super().__init__()
        self.shard, self.sparse = shard, sparse
        rows = np.empty((len(shard), width), dtype=np.float32)
        for block in range(shard.start // _BLOCK, -(-shard.stop // _BLOCK)):
            drawn = np.random.default_rng((seed, level, block)).standard_normal((_BLOCK, width), dtype=np.float32)
            first, last = max(block * _BLOCK, shard.start), min((block + 1) * _BLOCK, shard.stop)
            rows[first - shard.start : last - shard.start] = drawn[first - block * _BLOCK : last - block * _BLOCK]
        self.rows = nn.Parameter(torch.from_numpy(rows * np.float32(0.02)))
        self.bias = nn.Parameter(torch.zeros(len(shard), 1))

    def load_rows(self, rows: NDArray[np.float32] | Tensor, bias: NDArray[np.float32] | Tensor) -> None:
        """Take these rows ``[n, d]`` and biases ``[n]`` or ``[n, 1]`` for the owned range."""
        with torch.no_grad():
            self.rows.copy_(torch.as_tensor(np.array(rows) if isinstance(rows, np.ndarray) else rows))
            b = torch.as_tensor(np.array(bias) if isinstance(bias, np.ndarray) else bias)
            self.bias.copy_(b.reshape(-1, 1))

    def score(self, embedding: Tensor, doc: Tensor, node: Tensor, scoring: str = "auto") -> Tensor:
        """Scores of candidate pairs.

        Args:
            embedding: ``[B, d]``.
            doc: row of ``embedding`` of each pair, int64 ``[P]``.
            node: owned row of each pair, int64 ``[P]``.
            scoring: ``dense`` multiplies all documents with all rows that occur and picks the
                pairs, ``pairs`` gathers both sides of each pair, ``auto`` takes the cheaper.

        Returns:
            ``[P]`` float32.
        """
        rows: Tensor = self.rows
        bias: Tensor = self.bias
        if self.sparse:
            used, node = torch.unique(node, return_inverse=True)
            rows = nn.functional.embedding(used, rows, sparse=True)
            bias = nn.functional.embedding(used, bias, sparse=True)
        embedding = embedding.float()
        if scoring == "auto":
            scoring = "dense" if embedding.shape[0] * rows.shape[0] <= _PAIR_COST * max(node.numel(), 1) else "pairs"
        if scoring == "dense":
            return (embedding @ rows.t() + bias.reshape(1, -1))[doc, node]
        apply = cast(Any, _PairScores.apply)
        return cast(Tensor, apply(embedding, rows, doc, node)) + bias.reshape(-1)[node]


class _PairScores(torch.autograd.Function):
    """Row-wise dot products of gathered rows, in chunks: never ``[P, d]`` at once, forward or backward."""

    @staticmethod
    def forward(ctx: Any, embedding: Tensor, rows: Tensor, doc: Tensor, node: Tensor) -> Tensor:
        ctx.save_for_backward(embedding, rows, doc, node)
        out = embedding.new_empty(doc.numel())
        for i in range(0, doc.numel(), _PAIR_CHUNK):
            chunk = slice(i, i + _PAIR_CHUNK)
            out[chunk] = (embedding[doc[chunk]] * rows[node[chunk]]).sum(dim=1)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        embedding, rows, doc, node = ctx.saved_tensors
        d_embedding, d_rows = torch.zeros_like(embedding), torch.zeros_like(rows)
        for i in range(0, doc.numel(), _PAIR_CHUNK):
            chunk = slice(i, i + _PAIR_CHUNK)
            g = grads[0][chunk, None]
            d_embedding.index_add_(0, doc[chunk], g * rows[node[chunk]])
            d_rows.index_add_(0, node[chunk], g * embedding[doc[chunk]])
        return d_embedding, d_rows, None, None
