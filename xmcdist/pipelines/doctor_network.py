"""Real collectives over a job's ranks, their results checked, their bandwidth measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from xmcdist.parallel.collectives import all_reduce, barrier, gather_objects
from xmcdist.parallel.launch import World
from xmcdist.parallel.watch import collective

__all__ = ["network_checks"]

_SIZES = {"cpu": (1 << 12, 1 << 20, 1 << 24), "cuda": (1 << 12, 1 << 20, 1 << 24, 1 << 28)}  # bytes
_REPEATS = 3
_SLOW = {"cpu": 20e6, "cuda": 1e9}  # bytes a second, below which something is wrong with the way between ranks


def network_checks(world: World) -> list[tuple[str, str, str, str]]:
    """All-reduce and all-to-all at several sizes; collective.

    Returns:
        (name, status, text, remedy) of each, the same on every rank.

    Raises:
        CollectiveError: a rank does not answer in time.
    """
    if world.world_size == 1:
        return [("network", "ok", "one process", "")]
    return [_one("all-reduce", _reduce, world), _one("all-to-all", _exchange, world)]


def _one(name: str, run: Callable[[World, int], bool], world: World) -> tuple[str, str, str, str]:
    told, rate, wrong = [], 0.0, None
    for size in _SIZES[world.device_type]:
        right = run(world, size)  # also opens the connections, which is not timed
        seconds = []
        for _ in range(_REPEATS):
            barrier()
            started = time.perf_counter()
            right = run(world, size) and right
            seconds.append(time.perf_counter() - started)
        everyone = gather_objects((right, min(seconds)))
        if not all(r for r, _ in everyone):
            wrong = (size, [rank for rank, (r, _) in enumerate(everyone) if not r])
            break
        slowest = max(s for _, s in everyone)
        # What leaves a rank: all-reduce twice its share, all-to-all all but its own part.
        share = (world.world_size - 1) / world.world_size
        rate = (2 if run is _reduce else 1) * size * share / slowest
        told.append(f"{_size(size)} {_size(rate)}/s ({1000 * slowest:.1f} ms)")
    if wrong is not None:
        text = f"wrong result of {_size(wrong[0])} on rank {', '.join(map(str, wrong[1]))}"
        return name, "fail", text, "Network or memory corrupts data: take these machines out"
    status = "ok" if rate > _SLOW[world.device_type] else "warn"
    remedy = "" if status == "ok" else "Look at NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, and NCCL_DEBUG=INFO"
    return name, status, ", ".join(told), remedy


def _reduce(world: World, size: int) -> bool:
    """Whole numbers, so that the sum is exact whatever the order."""
    x = (torch.arange(size // 4, device=world.device) % 251 + world.rank).float()
    got = all_reduce(x)
    ranks = world.world_size
    want = (torch.arange(size // 4, device=world.device) % 251 * ranks + ranks * (ranks - 1) // 2).float()
    return bool(torch.equal(got, want))


def _exchange(world: World, size: int) -> bool:
    """Part r of every rank goes to rank r and tells where it comes from."""
    ranks = world.world_size
    each = max(size // 4 // ranks, 1)
    parts = torch.arange(ranks, device=world.device).repeat_interleave(each) + 1000 * world.rank
    out = torch.empty_like(parts, dtype=torch.int32)
    with collective("all_to_all", 4 * each * (ranks - 1)):
        dist.all_to_all_single(out, parts.int())
    want = 1000 * torch.arange(ranks, device=world.device).repeat_interleave(each) + world.rank
    return bool(torch.equal(out, want.int()))


def _size(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"
