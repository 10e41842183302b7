"""The data-parallel engine behind few verbs, on Accelerate.

The encoder goes through Accelerate (DDP here); the label-sharded head never does: its rows
live on their owners and no gradient of them crosses ranks.  What Accelerate would otherwise
get silently wrong is an error at start-up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from xmcdist.config.errors import UserError
from xmcdist.config.schema import EngineConfig
from xmcdist.parallel.collectives import all_reduce
from xmcdist.parallel.launch import World

__all__ = ["Engine"]


class Engine:
    """Prepares the encoder, runs backward, clips by one norm over encoder and all head shards."""

    def __init__(self, cfg: EngineConfig, world: World) -> None:
        """Attach Accelerate to the process group that `xmcdist.parallel.launch.setup` started.

        Raises:
            UserError: Accelerate sees another number of processes or another kind of job.
        """
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, DistributedType

        self.cfg, self.world = cfg, world
        self.device = torch.device(world.device)
        # Buffers of an encoder are constants: sending them around before every forward is traffic for nothing.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        threads = torch.get_num_threads()
        with warnings.catch_warnings():  # of the number of threads, which it also changes
            warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
            self.accelerator = Accelerator(cpu=world.device_type == "cpu", mixed_precision="no", kwargs_handlers=[ddp])
        torch.set_num_threads(threads)
        several = DistributedType.MULTI_GPU if world.device_type == "cuda" else DistributedType.MULTI_CPU
        # A launcher of one process may call it one of several: the arithmetic is the same.
        wanted = (several,) if world.world_size > 1 else (DistributedType.NO, several)
        seen = (self.accelerator.num_processes, self.accelerator.distributed_type)
        if seen[0] != world.world_size or seen[1] not in wanted:
            raise UserError(
                f"accelerate runs {seen[0]} process(es) as {seen[1].value}, but this job has {world.world_size} as "
                f"{wanted[0].value}: on a CPU start it with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
                "--num_processes N (--cpu alone starts one process and says nothing)"
            )

    def prepare(self, encoder: nn.Module) -> nn.Module:
        """The encoder wrapped for data parallelism, on its device."""
        with warnings.catch_warnings():  # torch 2.13 has a new name for broadcast_buffers, 2.11 only the old one
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            module: nn.Module = self.accelerator.prepare_model(encoder.to(self.device))
        return module

    def unwrap(self, encoder: nn.Module) -> nn.Module:
        """The plain encoder under the wrapping."""
        module: nn.Module = self.accelerator.unwrap_model(encoder)
        return module

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 arithmetic for the encoder when asked for; weights stay fp32."""
        if self.cfg.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def accumulate(self, encoder: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Reduce encoder gradients over ranks only in the last micro-step."""
        return nullcontext() if last else self.accelerator.no_sync(encoder)

    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's part of the loss."""
        self.accelerator.backward(loss)

    def clip(self, encoder: Iterable[Tensor], head: Iterable[Tensor], limit: float) -> float:
        """Scale all gradients so that their common norm is at most ``limit``; collective.

        Args:
            encoder: parameters whose gradients are equal on every rank.
            head: this rank's rows; their squares are added up over ranks.
            limit: 0 only measures.

        Returns:
            The norm before clipping, equal on every rank.
        """
        encoder_grads = [p.grad for p in encoder if p.grad is not None]
        head_grads = [p.grad for p in head if p.grad is not None]
        own, shared = self._squares(head_grads), self._squares(encoder_grads)
        norm = math.sqrt(float(all_reduce(own)) + float(shared))
        if limit and norm > limit:
            for g in (*encoder_grads, *head_grads):
                g.mul_(limit / (norm + 1e-6))
        return norm

    def release(self) -> None:
        """Forget the prepared encoder, which Accelerate would otherwise keep alive level after level."""
        self.accelerator.free_memory()

    def _squares(self, grads: Iterable[Tensor]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return sum((g.double().square().sum() for g in grads), zero)
