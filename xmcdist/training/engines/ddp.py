"""The encoder whole on every rank: DistributedDataParallel, or nothing on a single rank."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from xmcdist.config.schema import OptimizerConfig
from xmcdist.encoders.hf import Encoder
from xmcdist.training.engine import Engine, Weights, squares
from xmcdist.training.engines.tensors import placed, put_weights, saved_tensors
from xmcdist.training.optim import encoder_optimizer, load_moments, moments, set_lr

__all__ = ["ReplicatedEngine"]


class ReplicatedEngine(Engine):
    """DDP; gradients are averaged while backward runs."""

    encoder: Any = None
    module: Any = None
    optimizer: Any = None

    def prepare(self, encoder: Encoder, cfg: OptimizerConfig) -> nn.Module:
        self.encoder = encoder.to(self.device)
        self.module = self._wrap(self.encoder)
        self.optimizer = encoder_optimizer(self.encoder, cfg)
        module: nn.Module = self.module
        return module

    def _wrap(self, encoder: Encoder) -> nn.Module:
        if self.world.world_size == 1:
            return encoder
        devices = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # torch 2.13 has a new name for broadcast_buffers, 2.11 only the old one
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            # Buffers of an encoder are constants: sending them around before every forward is traffic for nothing.
            return DistributedDataParallel(encoder, device_ids=devices, broadcast_buffers=False)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def _gradients(self) -> list[Tensor]:
        """What this rank holds of the gradient."""
        return [p.grad for p in self.encoder.parameters() if p.grad is not None]

    def norm_squared(self) -> float:
        return float(squares(self._gradients(), self.device))

    def _scale(self, factor: float) -> None:
        if factor != 1.0:
            for g in self._gradients():
                g.mul_(factor)

    def step(self, lr: float) -> None:
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip(self) -> None:
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return saved_tensors(self.encoder)

    def load_weights(self, weights: Weights) -> None:
        put_weights(self.encoder, weights)

    def moments(self) -> dict[str, Tensor]:
        return moments(self.optimizer, self.encoder)

    def load_moments(self, moments: Weights) -> None:
        load_moments(self.optimizer, self.encoder, moments, placed)

    def template(self, encoder: Encoder) -> dict[str, Tensor]:
        out = saved_tensors(encoder)
        for name, p in encoder.named_parameters():
            if p.requires_grad:
                like = out[name]
                out |= {f"{name}.exp_avg": like, f"{name}.exp_avg_sq": like, f"{name}.step": torch.zeros(1)}
        return out

    def plain(self) -> Encoder:
        encoder: Encoder = self.encoder
        return encoder

    def release(self) -> None:
        self.encoder = self.module = self.optimizer = None
