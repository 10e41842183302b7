"""Collectives that xmcdist calls, each with one meaning and one error.

All of them are identities on a single process, so callers hold no
``if distributed`` branches.  Launched on several processes without an
initialised group they raise instead of silently returning the local part.
Those on sparse rows are in `xmcdist.parallel.exchange`.

Each call counts the bytes it sends (`xmcdist.parallel.traffic`), and a failure or time-out
names the collective and the ranks that are missing (`xmcdist.parallel.watch`).

Set ``XMCDIST_CHECK_COLLECTIVES=1`` to compare operation, dtype and shape over
the ranks before every call: a mismatch raises on all ranks with a table of who
sent what, where NCCL would hang until the timeout.

Letters: W ranks, n rows, d columns.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from xmcdist.parallel.watch import collective

__all__ = [
    "CollectiveMismatchError",
    "all_gather_embeddings",
    "all_gather_ragged",
    "all_reduce",
    "all_reduce_array",
    "barrier",
    "broadcast_object",
    "check_same",
    "gather_objects",
    "group_size",
]

T = TypeVar("T")

# torch 2.13 renamed these two and warns of the old names; 2.11 has only the old ones.
_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class CollectiveMismatchError(RuntimeError):
    """The ranks entered a collective with different operations, dtypes or shapes."""


def group_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks of a group; 1 on a single process without any."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(group)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} but no process group is initialised; "
            "call xmcdist.parallel.launch.setup() before the first collective."
        )
    return 1


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def check_same(op: str, kind: str, shape: tuple[int, ...], group: dist.ProcessGroup | None) -> None:
    """In check mode: raise on all ranks unless all are about to call the same.

    Args:
        op: the collective.
        kind: dtype.
        shape: of the dimensions that must agree.

    Raises:
        CollectiveMismatchError: with a table of who sent what.
    """
    if os.environ.get("XMCDIST_CHECK_COLLECTIVES") != "1":
        return
    mine = (op, kind, shape)
    seen: list[tuple[str, str, tuple[int, ...]]] = [mine] * group_size(group)
    with collective(f"check {op}", 0):
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
    world = group_size(group)
    if world == 1:
        return x.clone()
    check_same(f"all_reduce.{op}", str(x.dtype), tuple(x.shape), group)
    out = x.clone(memory_format=torch.contiguous_format)
    with collective(f"all_reduce.{op}", 2 * _bytes(x) * (world - 1) // world):
        dist.all_reduce(out, op=getattr(dist.ReduceOp, op.upper()), group=group)
    return out


def all_reduce_array(x: NDArray[Any], group: dist.ProcessGroup | None = None) -> NDArray[Any]:
    """Sum of a numpy array over ranks (int64 or float64); the input is left as it was."""
    return all_reduce(torch.from_numpy(np.ascontiguousarray(x)), "sum", group).numpy()


def all_gather_ragged(x: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Gather tensors whose first dimension differs from rank to rank.

    Args:
        x: ``[n_r, ...]``, n_r free (0 allowed), the rest equal on every rank.

    Returns:
        W tensors in rank order, the r-th of shape ``[n_r, ...]``.
    """
    world = group_size(group)
    if world == 1:
        return [x]
    check_same("all_gather_ragged", str(x.dtype), tuple(x.shape[1:]), group)
    sizes = torch.empty(world, dtype=torch.int64, device=x.device)
    with collective("all_gather_ragged.sizes", 8 * (world - 1)):
        _gather_single(sizes, torch.tensor([x.shape[0]], device=x.device), group=group)
    longest = int(sizes.max())
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in range(world)]
    with collective("all_gather_ragged", _bytes(padded) * (world - 1)):
        dist.all_gather(parts, padded, group=group)
    return [part[:n] for part, n in zip(parts, sizes.tolist(), strict=True)]


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank is here."""
    if group_size(group) > 1:
        with collective("barrier", 0):
            dist.barrier(group=group)


def gather_objects(obj: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's picklable object, in rank order, on every rank; for small things only."""
    world = group_size(group)
    if world == 1:
        return [obj]
    out: list[Any] = [None] * world
    with collective("gather_objects", len(pickle.dumps(obj)) * (world - 1)):
        dist.all_gather_object(out, obj, group=group)
    return cast("list[T]", out)


def broadcast_object(obj: T, source: int = 0, group: dist.ProcessGroup | None = None) -> T:
    """The picklable object of a rank (counted over the whole world) on every rank of the group."""
    world = group_size(group)
    if world == 1:
        return obj
    box: list[Any] = [obj]
    sent = len(pickle.dumps(obj)) * (world - 1) if dist.get_rank() == source else 0
    with collective("broadcast_object", sent):
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
        with collective("all_gather_embeddings", _bytes(mine) * (len(sizes) - 1)):
            _gather_single(out, mine, group=group)
        if min(sizes) == longest:
            return out
        return torch.cat([out[r * longest : r * longest + n] for r, n in enumerate(sizes)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        longest, world = max(ctx.sizes), len(ctx.sizes)
        if min(ctx.sizes) < longest:
            blocks = grad.new_zeros((world, longest, grad.shape[1]))
            for r, block in enumerate(torch.split(grad, ctx.sizes)):
                blocks[r, : ctx.sizes[r]] = block
            grad = blocks.reshape(-1, grad.shape[1])
        out = grad.new_empty((longest, grad.shape[1]))
        with collective("reduce_scatter_embeddings", _bytes(out) * (world - 1)):
            _reduce_scatter_single(out, grad.contiguous(), group=ctx.group)
        return out[: ctx.sizes[ctx.rank]] * ctx.scale, None, None, None, None


def all_gather_embeddings(
    x: Tensor, sizes: list[int], group: dist.ProcessGroup | None = None, scale: float | None = None
) -> Tensor:
    """Every rank's document embeddings, for scoring against the label rows a rank owns.

    The backward sums over the group what each rank's labels say of a document, times
    ``scale``: the data-parallel engine *averages* encoder gradients over its ranks, while the
    loss is one sum over all documents and labels.

    Args:
        x: this rank's ``[n_r, d]``.
        sizes: ``n_r`` of every rank of the group (known from the data order, so not communicated).
        group: the ranks that hold one copy of the label rows; default all.
        scale: ranks that the engine averages over; default the size of the group.

    Returns:
        ``[sum(sizes), d]``, rank order.
    """
    world = group_size(group)
    if world == 1:
        return x if scale in (None, 1) else _Scaled.apply(x, scale)  # type: ignore[no-untyped-call]
    check_same("all_gather_embeddings", str(x.dtype), (*sizes, *tuple(x.shape[1:])), group)
    gather = cast(Callable[..., Tensor], _GatherRows.apply)
    return gather(x, sizes, dist.get_rank(group), float(world if scale is None else scale), group)


class _Scaled(torch.autograd.Function):
    """The identity whose gradient is multiplied: a group of one rank under an engine of several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None
