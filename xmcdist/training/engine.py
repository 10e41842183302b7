"""The data-parallel engine of the encoder behind one set of verbs.

An engine shares the encoder out over *all* ranks and averages its gradients over them; the
label-sharded head is never inside it: its rows live on their owners.  What differs between
DDP, FSDP2 and ZeRO stays below `Engine`; its state has no engine's form, so that what was
saved under one is loaded by any other, at any number of ranks.

Accelerate starts the processes and no more.  Its own wrapping is not used: it silently runs
DDP where FSDP or DeepSpeed was asked for and no GPU is there, and clips what it owns alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from xmcdist.config.errors import UserError
from xmcdist.config.schema import EngineConfig, OptimizerConfig
from xmcdist.encoders.hf import Encoder
from xmcdist.parallel.collectives import all_reduce, group_size
from xmcdist.parallel.mesh import Mesh
from xmcdist.parallel.watch import collective

__all__ = ["ENGINES", "Engine", "Weights", "open_engine"]

ENGINES = ("cpu", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")

_PART = 1 << 18  # elements squared at once

Weights = Mapping[str, Tensor]
"""Tensors by name: whole and equal on every rank, or DTensors over all ranks."""


class Engine(ABC):
    """Wraps the encoder, runs backward, clips, steps; see `open_engine`.

    Attributes:
        cfg: batching and precision.
        mesh: replicas and shards of the label rows.
        world: who this process is.
        device: where this process computes.
        norms: of the gradients of encoder and head that `clip` met last.
    """

    def __init__(self, cfg: EngineConfig, mesh: Mesh) -> None:
        """Check that the job is the one that was meant.

        Raises:
            UserError: the process group has another number of ranks than the launcher said.
        """
        self.cfg, self.mesh, self.world = cfg, mesh, mesh.world
        self.device = torch.device(mesh.world.device)
        self.norms = (0.0, 0.0)
        if group_size() != self.world.world_size:
            raise UserError(
                f"the process group has {group_size()} rank(s), but this job has {self.world.world_size}: on a CPU "
                "start it with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
            )

    @abstractmethod
    def prepare(self, encoder: Encoder, cfg: OptimizerConfig) -> nn.Module:
        """Share out an encoder, in place, and make its optimizer; collective.

        Args:
            encoder: equal on every rank; not to be used directly any more (see `plain`).
            cfg: AdamW's settings.

        Returns:
            The module to call in training.
        """

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 arithmetic for the encoder when asked for; weights, gradients and sums over ranks stay fp32."""
        if self.cfg.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-step; gradients are whole after the last of a step."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's part of the loss; the encoder's are averaged over all ranks."""
        with collective("backward", 0):  # DDP, FSDP2 and ours send in it
            loss.backward()  # type: ignore[no-untyped-call]

    @abstractmethod
    def norm_squared(self) -> float:
        """Sum of squares of the encoder's gradient, equal on every rank; collective."""

    def clip(self, head: Iterable[Tensor], limit: float) -> float:
        """Scale all gradients so that encoder and head together have at most this norm; collective.

        Args:
            head: this rank's rows; gradients already summed over replicas.
            limit: 0 only measures.

        Returns:
            The norm before clipping, equal on every rank.
        """
        grads = [p.grad for p in head if p.grad is not None]
        own = squares(grads, self.device)
        head_squared, encoder_squared = float(all_reduce(own, "sum", self.mesh.shard_group)), self.norm_squared()
        self.norms = (math.sqrt(encoder_squared), math.sqrt(head_squared))
        norm = math.sqrt(head_squared + encoder_squared)
        factor = limit / (norm + 1e-6) if limit and norm > limit else 1.0
        self._scale(factor)
        if factor != 1.0:
            for g in grads:
                g.mul_(factor)
        return norm

    @abstractmethod
    def _scale(self, factor: float) -> None:
        """Multiply the encoder's gradient; 1 leaves it."""

    @abstractmethod
    def step(self, lr: float) -> None:
        """Move the encoder by its gradient and forget that; collective."""

    @abstractmethod
    def skip(self) -> None:
        """Forget the gradient; weights and moments stay as they are, to the bit; collective."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by name; may be the live ones; collective."""

    @abstractmethod
    def load_weights(self, weights: Weights) -> None:
        """Take what `weights` of any engine gave; collective."""

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """Optimizer state by ``<parameter>.<moment>`` (exp_avg, exp_avg_sq, step ``[1]``); collective."""

    @abstractmethod
    def load_moments(self, moments: Weights) -> None:
        """Take what `moments` of any engine gave; collective."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """``encoder``: `weights`, ``optimizer``: `moments`; collective, before or after a step."""
        return {"encoder": self.weights(), "optimizer": self.moments()}

    def load(self, state: Mapping[str, Weights]) -> None:
        """Go on from what `state` of any engine at any number of ranks gave; collective."""
        self.load_weights(state["encoder"])
        self.load_moments(state["optimizer"])

    @abstractmethod
    def template(self, encoder: Encoder) -> dict[str, Tensor]:
        """Tensors with shape and placement of `weights` and `moments`, values unspecified.

        Args:
            encoder: plain, or already prepared by this engine.
        """

    @abstractmethod
    def plain(self) -> Encoder:
        """A whole encoder with the current weights, on every rank, for use without gradients; collective.

        The trained module itself where every rank has all of it, else a copy.
        """

    @abstractmethod
    def release(self) -> None:
        """Forget the prepared encoder and its optimizer."""


def squares(grads: Iterable[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of some tensors, a float64 scalar; takes no memory of their size."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for g in grads:
        for part in torch.split(g.reshape(-1), _PART):
            total += part.double().square().sum()
    return total


def open_engine(cfg: EngineConfig, mesh: Mesh) -> Engine:
    """The engine that a configuration names; collective.

    Args:
        cfg: ``name`` one of cpu, ddp (the same: DDP on more than one rank), fsdp2, zero1, zero2,
            zero3, zero3_offload.
        mesh: of the job.

    Raises:
        UserError: an unknown name, or a launcher that was told another kind of job.
    """
    from xmcdist.training.engines.environment import check_launch

    check_launch(cfg.precision)
    if cfg.name in ("cpu", "ddp"):
        from xmcdist.training.engines.ddp import ReplicatedEngine

        return ReplicatedEngine(cfg, mesh)
    if cfg.name == "fsdp2":
        from xmcdist.training.engines.fsdp2 import ShardedEngine

        return ShardedEngine(cfg, mesh)
    if cfg.name in ENGINES:
        from xmcdist.training.engines.zero import ZeroEngine

        return ZeroEngine(cfg, mesh)
    raise UserError(f"engine.name={cfg.name} is none of {', '.join(ENGINES)}")
