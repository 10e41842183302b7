"""What commands on several processes share: one error for all, the cores, the parts of a model."""

from __future__ import annotations

import os
import sys

from xmcdist.config.errors import UserError
from xmcdist.parallel.errors import errors_together
from xmcdist.parallel.launch import World

__all__ = ["PARALLEL", "errors_together", "model_part", "share_cores"]

PARALLEL = ("documents", "labels")


def share_cores(world: World, threads: int | None = None) -> None:
    """Give each process of this machine its share of the cores, for the compiled kernels and torch.

    Args:
        threads: of this process; None: cores divided by the processes of this machine.
    """
    import numba

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads or max(1, cores // world.local_world_size)
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    if "torch" in sys.modules:  # the linear path of one process goes without it
        import torch

        torch.set_num_threads(threads)


def model_part(parallel: str, world: World) -> tuple[int, int]:
    """(part, parts) of the model that this rank holds: the whole of it where documents are shared out.

    Raises:
        UserError: ``parallel`` is none of `PARALLEL`.
    """
    if parallel not in PARALLEL:
        raise UserError(f"parallel={parallel} is none of {', '.join(PARALLEL)}")
    return (world.rank, world.world_size) if parallel == "labels" else (0, 1)
