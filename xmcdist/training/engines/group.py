"""A process group for engines that need one on a single process, too."""

from __future__ import annotations

import torch.distributed as dist

from xmcdist.parallel.launch import World

__all__ = ["ensure_group"]


def ensure_group(world: World) -> None:
    """Make a group of this process alone, unless the launch has made one of several."""
    if world.world_size == 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if world.device_type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
