"""Collectives that xmcdist calls, each with one meaning and one error.

All of them are identities on a single process, so callers hold no
``if distributed`` branches.  Launched on several processes without an
initialised group they raise instead of silently returning the local part.

Set ``XMCDIST_CHECK_COLLECTIVES=1`` to compare operation, dtype and shape over
the ranks before every call: a mismatch raises on all ranks with a table of who
sent what, where NCCL would hang until the timeout.

Shapes: W ranks, B rows, K candidates a row.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "NO_LABEL",
    "CollectiveMismatchError",
    "all_gather_embeddings",
    "all_gather_ragged",
    "all_reduce",
    "all_reduce_array",
    "any_rank",
    "barrier",
    "broadcast_object",
    "gather_objects",
    "merge_topk",
]

T = TypeVar("T")

# torch 2.13 renamed these two and warns of the old names; 2.11 has only the old ones.
_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

NO_LABEL = -1
"""Fills candidate slots that a small shard cannot fill; scored -inf, sorted last."""


class CollectiveMismatchError(RuntimeError):
    """The ranks entered a collective with different operations, dtypes or shapes."""


def _size(group: dist.ProcessGroup | None) -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(group)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} but no process group is initialised; "
            "call xmcdist.parallel.launch.setup() before the first collective."
        )
    return 1


def _check(op: str, x: Tensor, shape: tuple[int, ...], group: dist.ProcessGroup | None) -> None:
    if os.environ.get("XMCDIST_CHECK_COLLECTIVES") != "1":
        return
    mine = (op, str(x.dtype), shape)
    seen: list[tuple[str, str, tuple[int, ...]]] = [mine] * _size(group)
    dist.all_gather_object(seen, mine, group=group)
    if len(set(seen)) > 1:
        rows = "\n".join(f"  rank {r}: {o} {d} {list(s)}" for r, (o, d, s) in enumerate(seen))
        raise CollectiveMismatchError(f"ranks disagree on a collective:\n{rows}")


def all_reduce(x: Tensor, op: str = "sum", group: dist.ProcessGroup | None = None) -> Tensor:
    """Reduce ``x`` over the group; the input is left as it was.

    Args:
        x: same shape and dtype on every rank.  Pass counts as int64 and sums that
            will be divided as float64: a float32 count stops growing at 2**24.
        op: ``sum``, ``max`` or ``min``.
        group: default is the whole world.
    """
    if _size(group) == 1:
        return x.clone()
    _check(f"all_reduce.{op}", x, tuple(x.shape), group)
    out = x.clone()
    dist.all_reduce(out, op=getattr(dist.ReduceOp, op.upper()), group=group)
    return out


def all_reduce_array(x: NDArray[Any], group: dist.ProcessGroup | None = None) -> NDArray[Any]:
    """Sum of a numpy array over ranks (int64 or float64); the input is left as it was."""
    return all_reduce(torch.from_numpy(np.ascontiguousarray(x)), "sum", group).numpy()


def any_rank(flag: bool, device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """True on every rank when it is true on at least one."""
    return bool(all_reduce(torch.tensor(int(flag), device=device), "max", group).item())


def all_gather_ragged(x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Gather tensors whose first dimension differs from rank to rank.

    Args:
        x: ``[n_r, ...]``, n_r free (0 allowed), the rest equal on every rank.

    Returns:
        W tensors in rank order, the r-th of shape ``[n_r, ...]``.
    """
    world = _size(group)
    if world == 1:
        return [x]
    _check("all_gather_ragged", x, tuple(x.shape[1:]), group)
    sizes = torch.zeros(world, dtype=torch.int64, device=x.device)
    sizes[dist.get_rank(group)] = x.shape[0]
    dist.all_reduce(sizes, group=group)
    longest = int(sizes.max())
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    return [part[:n] for part, n in zip(parts, sizes.tolist(), strict=True)]


def merge_topk(
    scores_BK: Tensor, labels_BK: Tensor, k: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Top k of the union of every rank's candidates, the same on every rank.

    Ties go to the smaller label id, so the answer does not depend on how many
    ranks the labels were split over.

    Args:
        scores_BK: this rank's candidate scores, any order.
        labels_BK: their global label ids; ``NO_LABEL`` where the slot is empty.
        k: at most the number of candidates over all ranks.

    Returns:
        ``scores_Bk`` descending and ``labels_Bk``.
    """
    world = _size(group)
    if world > 1:
        _check("merge_topk", scores_BK, tuple(scores_BK.shape), group)
        all_scores = [torch.empty_like(scores_BK) for _ in range(world)]
        all_labels = [torch.empty_like(labels_BK) for _ in range(world)]
        dist.all_gather(all_scores, scores_BK.contiguous(), group=group)
        dist.all_gather(all_labels, labels_BK.contiguous(), group=group)
        scores_BK, labels_BK = torch.cat(all_scores, dim=1), torch.cat(all_labels, dim=1)
    if k > scores_BK.shape[1]:
        raise ValueError(f"k={k} exceeds the {scores_BK.shape[1]} candidates over {world} ranks")
    last = torch.iinfo(labels_BK.dtype).max
    by_label = labels_BK.masked_fill(labels_BK == NO_LABEL, last).argsort(dim=1, stable=True)
    scores, labels = scores_BK.gather(1, by_label), labels_BK.gather(1, by_label)
    top = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, top), labels.gather(1, top)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank is here."""
    if _size(group) > 1:
        dist.barrier(group=group)


def gather_objects(obj: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's picklable object, in rank order, on every rank; for small things only."""
    world = _size(group)
    if world == 1:
        return [obj]
    out: list[Any] = [None] * world
    dist.all_gather_object(out, obj, group=group)
    return cast("list[T]", out)


def broadcast_object(obj: T, source: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """The source rank's picklable object on every rank; what the others pass is ignored."""
    if _size(group) == 1:
        return obj
    box: list[Any] = [obj]
    dist.broadcast_object_list(box, src=source, group=group)
    return cast("T", box[0])


class _GatherRows(torch.autograd.Function):
    """All-gather of ragged row blocks whose backward is a reduce-scatter of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int, scale: float, group: Any) -> Tensor:
        ctx.sizes, ctx.rank, ctx.scale, ctx.group = sizes, rank, scale, group
        longest = max(sizes)
        mine = x.new_zeros((longest, x.shape[1]))
        mine[: x.shape[0]] = x
        out = x.new_empty((len(sizes) * longest, x.shape[1]))
        _gather_single(out, mine, group=group)
        if min(sizes) == longest:
            return out
        return torch.cat([out[r * longest : r * longest + n] for r, n in enumerate(sizes)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        longest = max(ctx.sizes)
        if min(ctx.sizes) < longest:
            blocks = grad.new_zeros((len(ctx.sizes), longest, grad.shape[1]))
            for r, block in enumerate(torch.split(grad, ctx.sizes)):
                blocks[r, : ctx.sizes[r]] = block
            grad = blocks.reshape(-1, grad.shape[1])
        out = grad.new_empty((longest, grad.shape[1]))
        _reduce_scatter_single(out, grad.contiguous(), group=ctx.group)
        return out[: ctx.sizes[ctx.rank]] * ctx.scale, None, None, None, None


def all_gather_embeddings(x: Tensor, sizes: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Every rank's document embeddings, for scoring against the label rows a rank owns.

    The backward sums over ranks what each rank's labels say of a document, times the
    number of ranks: the data-parallel engine *averages* encoder gradients over ranks,
    while the loss is one sum over all documents and labels.

    Args:
        x: this rank's ``[n_r, d]``.
        sizes: ``n_r`` of every rank (known from the data order, so not communicated).

    Returns:
        ``[sum(sizes), d]``, rank order.
    """
    world = _size(group)
    if world == 1:
        return x
    _check("all_gather_embeddings", x, (*sizes, *tuple(x.shape[1:])), group)
    gather = cast(Callable[..., Tensor], _GatherRows.apply)
    return gather(x, sizes, dist.get_rank(group), float(world), group)
