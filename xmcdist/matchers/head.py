"""The classifier over one level's clusters, its rows shared out over the ranks.

Rank r holds the rows of a contiguous range of nodes in tree order and nothing of the
others; documents' vectors travel to the rows, never rows to documents.

Letters: K nodes of the level, n rows owned, b documents, p pairs, d width, W ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmcdist.matchers.pair_kernels import dot_pairs, spread_to_docs, spread_to_rows
from xmcdist.parallel.shards import LabelShard

__all__ = ["PAIR_COST", "SCORINGS", "ShardedHead", "score_pairs"]

SCORINGS = ("auto", "dense", "pairs")

PAIR_COST = {"cpu": 4.0, "cuda": 32.0}
"""Cost of one multiply-add of a gathered pair in those of a matrix product.

CPU: between 0.4 and 6.8 on two EPYC cores, forward and backward, d = 384 and 768.  CUDA:
assumed, from the ratio of arithmetic to memory speed; not measured.
"""

_INIT_STD = 0.02
_INIT_ROWS = 256  # rows drawn from one key
_CHUNK = 1 << 22  # gathered elements held at once without a compiled kernel


class ShardedHead(nn.Module):
    """Rows ``weight [n, d]`` and ``bias [n]`` of the nodes that a rank owns.

    Args:
        shard: which nodes.
        dim: width d.
        seed: with ``level`` and the block of 256 rows, what initial values are drawn by, so
            they do not depend on the number of ranks.
        level: number of the level.
    """

    def __init__(self, shard: LabelShard, dim: int, *, seed: int = 0, level: int = 1) -> None:
        super().__init__()
        self.shard, self.dim = shard, dim
        self.weight = nn.Parameter(torch.from_numpy(_initial_rows(shard.start, shard.stop, dim, seed, level)))
        self.bias = nn.Parameter(torch.zeros(len(shard)))

    @property
    def start(self) -> int:
        """First node owned."""
        return self.shard.start

    @property
    def stop(self) -> int:
        """The node after the last one owned."""
        return self.shard.stop

    def load_rows(self, weight: Any, bias: Any) -> None:
        """Take the owned rows from arrays ``[n, d]`` and ``[n]``, such as a bootstrap's.

        Raises:
            ValueError: another shape.
        """
        W, b = (torch.from_numpy(np.array(x, dtype=np.float32)) for x in (weight, bias))  # copies: may be a map
        if W.shape != self.weight.shape or b.shape != self.bias.shape:
            raise ValueError(
                f"rows {list(W.shape)} and biases {list(b.shape)} given to a head that owns "
                f"{list(self.weight.shape)} (nodes {self.start} to {self.stop})"
            )
        with torch.no_grad():
            self.weight.copy_(W)
            self.bias.copy_(b)

    def forward(self, E: Tensor, doc: Tensor, row: Tensor, scoring: str = "auto") -> Tensor:
        """`score_pairs` with the owned rows."""
        return score_pairs(E, self.weight, self.bias, doc, row, scoring)


def score_pairs(E: Tensor, weight: Tensor, bias: Tensor, doc: Tensor, row: Tensor, scoring: str = "auto") -> Tensor:
    """``E[doc] . weight[row] + bias[row]`` of some pairs, differentiable in E, weight and bias.

    Args:
        E: document vectors ``[b, d]``.
        weight: ``[n, d]``, of the dtype of E.
        bias: ``[n]``.
        doc: int64 ``[p]``.
        row: int64 ``[p]``.
        scoring: ``dense`` multiplies all b x n and picks, ``pairs`` gathers what is wanted,
            ``auto`` takes the cheaper by `PAIR_COST`.  All give the same but for rounding.

    Returns:
        ``[p]``.

    Raises:
        ValueError: an unknown scoring.

    Cost: dense b n d multiply-adds and 2 b n floats; pairs p d and p floats.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"matcher.scoring={scoring!r} is none of {', '.join(SCORINGS)}")
    if len(row) == 0:  # keeps the graph: every rank must take part in the backward pass
        return E[:0].sum(1) + weight[:0].sum() + bias[:0].sum()
    if scoring == "auto":
        cost = PAIR_COST.get(E.device.type, PAIR_COST["cuda"])
        scoring = "pairs" if len(row) * cost < len(E) * len(weight) else "dense"
    if scoring == "pairs":
        dots: Tensor = _PairDots.apply(E, weight, doc, row)  # type: ignore[no-untyped-call]
        return dots + bias[row]
    return (E @ weight.T).view(-1).gather(0, doc * len(weight) + row) + bias[row]


class _PairDots(torch.autograd.Function):
    """Dot products of pairs, with memory for the pairs alone."""

    @staticmethod
    def forward(ctx: Any, E: Tensor, W: Tensor, doc: Tensor, row: Tensor) -> Tensor:
        ctx.save_for_backward(E, W, doc, row)
        out = E.new_empty(len(row))
        if _compiled(E):
            dot_pairs(_array(E), _array(W), _array(doc), _array(row), _array(out))
            return out
        for part in _chunks(len(row), E.shape[1]):
            out[part] = (E[doc[part]] * W[row[part]]).sum(1)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        E, W, doc, row = ctx.saved_tensors
        (grad,) = grads
        dE = torch.zeros_like(E) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        if _compiled(E):
            g, docs, rows = _array(grad), _array(doc), _array(row)
            if dE is not None:
                spread_to_docs(g, _array(W), docs, rows, _array(dE))
            if dW is not None:
                spread_to_rows(g, _array(E), docs, rows, _array(dW))
            return dE, dW, None, None
        for part in _chunks(len(row), E.shape[1]):
            one = grad[part].unsqueeze(1)
            if dE is not None:
                dE.index_add_(0, doc[part], one * W[row[part]])
            if dW is not None:
                dW.index_add_(0, row[part], one * E[doc[part]])
        return dE, dW, None, None


def _compiled(x: Tensor) -> bool:
    """Whether the compiled CPU loops can take it."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _array(x: Tensor) -> NDArray[Any]:
    """A tensor's memory as numpy sees it, contiguous."""
    return x.detach().contiguous().numpy()


def _chunks(pairs: int, dim: int) -> list[slice]:
    step = max(1, _CHUNK // max(dim, 1))
    return [slice(at, at + step) for at in range(0, pairs, step)]


def _initial_rows(start: int, stop: int, dim: int, seed: int, level: int) -> NDArray[np.float32]:
    """Rows ``[start, stop)`` of a N(0, 0.02) matrix whose values no rank count changes."""
    out = np.empty((stop - start, dim), dtype=np.float32)
    for block in range(start // _INIT_ROWS, -(-stop // _INIT_ROWS)):
        first = block * _INIT_ROWS
        rows = np.random.default_rng((seed, level, block)).normal(0.0, _INIT_STD, (_INIT_ROWS, dim))
        a, b = max(first, start), min(first + _INIT_ROWS, stop)
        out[a - start : b - start] = rows[a - first : b - first]
    return out
