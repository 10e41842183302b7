"""The encoder's parameters, gradients and moments cut over all ranks: torch's fully_shard.

Parameters stay fp32 and bf16 is autocast, not FSDP's own mixed precision, so the arithmetic
is DDP's; what FSDP2 gathers is fp32 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from xmcdist.config.schema import EngineConfig, OptimizerConfig
from xmcdist.encoders.hf import Encoder
from xmcdist.parallel.collectives import all_reduce
from xmcdist.parallel.mesh import Mesh
from xmcdist.training.engine import squares
from xmcdist.training.engines.ddp import ReplicatedEngine
from xmcdist.training.engines.group import ensure_group
from xmcdist.training.engines.plain import Skeleton
from xmcdist.training.engines.tensors import saved_tensors, shared_out, whole

__all__ = ["ShardedEngine"]


class ShardedEngine(ReplicatedEngine):
    """FSDP2: layers are gathered for their forward and backward, one at a time."""

    skeleton: Any = None

    def __init__(self, cfg: EngineConfig, mesh: Mesh) -> None:
        ensure_group(mesh.world)
        super().__init__(cfg, mesh)
        self.flat: DeviceMesh = init_device_mesh(self.device.type, (self.world.world_size,), mesh_dim_names=("all",))

    def prepare(self, encoder: Encoder, cfg: OptimizerConfig) -> nn.Module:
        self.skeleton = Skeleton(encoder)
        return super().prepare(encoder, cfg)

    def _wrap(self, encoder: Encoder) -> nn.Module:
        for layer in _layers(encoder):
            fully_shard(layer, mesh=self.flat)
        fully_shard(encoder, mesh=self.flat)
        return encoder

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def _gradients(self) -> list[Tensor]:
        return [g.to_local() for g in super()._gradients()]  # type: ignore[attr-defined]

    def norm_squared(self) -> float:
        return float(all_reduce(squares(self._gradients(), self.device)))

    def template(self, encoder: Encoder) -> dict[str, Tensor]:
        if encoder is self.encoder:
            return super().template(encoder)
        trained = {name: p.requires_grad for name, p in encoder.named_parameters()}
        out = saved_tensors(encoder)
        for name in trained:
            out[name] = shared_out(out[name].to(self.device), self.flat)
        for name in (n for n, needs in trained.items() if needs):
            like = out[name]
            out |= {f"{name}.exp_avg": like, f"{name}.exp_avg_sq": like, f"{name}.step": torch.zeros(1)}
        return out

    def plain(self) -> Encoder:
        skeleton: Skeleton = self.skeleton
        return skeleton.filled((name, whole(p.detach())) for name, p in self.encoder.named_parameters())

    def release(self) -> None:
        super().release()
        self.skeleton = None


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The transformer layers: what stands in the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if next(layer.parameters(), None) is not None)
        else:
            yield from _layers(child)
