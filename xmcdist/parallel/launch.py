"""Who this process is among its peers: the one module that reads the launcher's environment.

``accelerate launch`` and ``torchrun`` describe a rank by environment variables.  `setup`
turns them into a `World`, starts the process group (gloo without a GPU, NCCL with one),
and refuses what would otherwise be a silent wrong answer.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

__all__ = ["World", "has_bf16", "rank_from_environment", "setup", "shutdown", "slurm_job"]


@dataclass(frozen=True, slots=True)
class World:
    """One process's place in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device_type: str  # cpu | cuda

    @classmethod
    def single(cls) -> World:
        """A job of one CPU process, as a library call or a test has it."""
        return cls(rank=0, world_size=1, local_rank=0, local_world_size=1, device_type="cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> str:
        return f"cuda:{self.local_rank}" if self.device_type == "cuda" else "cpu"

    def barrier(self) -> None:
        """Wait for every rank; nothing on one process."""
        if self.world_size > 1:
            from xmcdist.parallel.collectives import barrier

            barrier()


def rank_from_environment() -> tuple[int, int]:
    """(rank, world size) without importing torch: for what must be said before set-up."""
    return _int("RANK", 0), _int("WORLD_SIZE", 1)


def slurm_job() -> tuple[str | None, int]:
    """Slurm's id of this job, None outside Slurm, and how often it was queued anew."""
    return os.environ.get("SLURM_JOB_ID"), _int("SLURM_RESTART_COUNT", 0)


def has_bf16(device_type: str) -> bool:
    """Whether this process's device multiplies bfloat16 in hardware; emulated it is slower than float32."""
    if device_type == "cuda":
        import torch

        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
            flags = next((line for line in f if line.startswith("flags")), "").split()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def setup(*, use_gpu: bool = True, timeout_s: int = 1800) -> World:
    """Join the job this process was launched into.

    Args:
        use_gpu: take CUDA devices when there are any.
        timeout_s: a collective that waits longer ends the job with an error.

    Raises:
        ValueError: the launcher's variables contradict each other, or there are more
            ranks on this machine than GPUs.
    """
    import torch
    import torch.distributed as dist

    rank, world_size = rank_from_environment()
    local_rank, local_size = _int("LOCAL_RANK", 0), _int("LOCAL_WORLD_SIZE", 1)
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK={rank} is not below WORLD_SIZE={world_size}: start through accelerate launch")
    cuda = use_gpu and torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} here): "
            f"lower --num_processes, or set engine=cpu"
        )
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or deepspeed warns that it found nothing better
    if cuda:
        torch.cuda.set_device(local_rank)
    if world_size > 1 and not dist.is_initialized():
        if not cuda and socket.gethostname() and _int("LOCAL_WORLD_SIZE", 1) == world_size:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: do not resolve its name
        _join("cpu:gloo,cuda:nccl" if cuda else "gloo", rank, world_size, timedelta(seconds=timeout_s))
    elif world_size == 1:
        from xmcdist.parallel import watch

        watch.start(None, rank, world_size, _launcher())
    return World(rank, world_size, local_rank, max(local_size, 1), "cuda" if cuda else "cpu")


def shutdown() -> None:
    """Leave the job in order: without the barrier, gloo aborts some ranks at exit."""
    import torch.distributed as dist

    from xmcdist.parallel import watch

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        watch.stop()
        dist.destroy_process_group()
    watch.stop()


def _join(backend: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Start the process group, and let the other ranks see where this one is."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from xmcdist.parallel import watch

    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    dist.init_process_group(
        backend, store=PrefixStore("group", store), rank=rank, world_size=world_size, timeout=timeout
    )
    # A handle of its own where there is one: the main thread may wait in its for long.
    own = store.clone() if hasattr(store, "clone") else store
    watch.start(PrefixStore("watch", own), rank, world_size, _launcher())


def _launcher() -> int | None:
    """The process that started this one, where that is a launcher: ranks do not outlive it."""
    return os.getppid() if "RANK" in os.environ else None


def _int(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"environment variable {name}={value!r} is not a whole number") from None
