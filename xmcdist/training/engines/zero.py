"""DeepSpeed ZeRO 1, 2 and 3: moments, gradients, parameters cut over all ranks.

`deepspeed.initialize` is called directly.  Of DeepSpeed only the partitioning is used: the
step is taken when the loop says, the norm that gradients are clipped by is that of encoder and
head together, and state is read and written by parameter name, never as DeepSpeed's files.
"""

from __future__ import annotations

import gc
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from xmcdist.config.errors import UserError
from xmcdist.config.schema import EngineConfig, OptimizerConfig
from xmcdist.encoders.hf import Encoder
from xmcdist.parallel.mesh import Mesh
from xmcdist.parallel.watch import collective
from xmcdist.training.engine import Engine, Weights
from xmcdist.training.engines.deepspeed_config import load_settings, open_deepspeed
from xmcdist.training.engines.group import ensure_group
from xmcdist.training.engines.partitions import StageThree, StageTwo
from xmcdist.training.engines.plain import Skeleton
from xmcdist.training.engines.tensors import placed, shared_out, whole
from xmcdist.training.optim import encoder_optimizer, set_lr

__all__ = ["ZeroEngine"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(Engine):
    """The encoder under DeepSpeed; the head is outside."""

    encoder: Any = None
    module: Any = None
    skeleton: Any = None
    parts: Any = None
    norm = math.nan

    def __init__(self, cfg: EngineConfig, mesh: Mesh) -> None:
        """Read the DeepSpeed settings and start DeepSpeed on the job's process group.

        Raises:
            UserError: DeepSpeed is not installed, or its settings contradict the run's.
        """
        ensure_group(mesh.world)
        super().__init__(cfg, mesh)
        self.settings = load_settings(cfg)
        self.stage = int(self.settings["zero_optimization"]["stage"])
        self.deepspeed: Any = open_deepspeed(mesh.world)
        self.flat: DeviceMesh = init_device_mesh(self.device.type, (self.world.world_size,), mesh_dim_names=("all",))

    def prepare(self, encoder: Encoder, cfg: OptimizerConfig) -> nn.Module:
        # DeepSpeed's objects of the level before point at one another, so they would go only when Python
        # next looks for cycles, and their buffers would lie beside this level's: half as much memory again.
        gc.collect()
        self.encoder = encoder.to(self.device)
        self.skeleton = Skeleton(encoder)
        self.module, *_ = self.deepspeed.initialize(
            model=self.encoder, optimizer=encoder_optimizer(self.encoder, cfg), config=self.settings
        )
        if self.module.dp_world_size != self.world.world_size:
            raise UserError(
                f"DeepSpeed takes this job of {self.world.world_size} ranks for one of {self.module.dp_world_size}: "
                "start it through accelerate launch or torchrun"
            )
        kind = StageThree if self.stage == 3 else StageTwo
        self.parts = kind(self.module)
        module: nn.Module = self.module
        return module

    def autocast(self) -> AbstractContextManager[Any]:
        """DeepSpeed enters autocast by itself, around forward, and turns off one from outside."""
        return nullcontext()

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        self.module.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        with collective("backward", 0):
            self.module.backward(loss, scale_wrt_gas=False)

    def norm_squared(self) -> float:
        self.norm = self.parts.gradient_norm()
        return self.norm**2

    def _scale(self, factor: float) -> None:
        # DeepSpeed multiplies by clip_grad / (its own norm + 1e-6) when that is below 1.
        self.parts.optimizer.clip_grad = 0.0 if factor == 1.0 else factor * (self.norm + 1e-6)

    def step(self, lr: float) -> None:
        set_lr(self.parts.optimizer, lr)
        self.module.step()
        if self.parts.optimizer.overflow:
            raise AssertionError("DeepSpeed has left a step out, though the gradient's norm is finite")

    def skip(self) -> None:
        # A step of a gradient that it finds invalid: DeepSpeed then clears all that it has gathered of it.
        with self.parts.invalid_gradient():
            self.module.step()
        if not self.parts.optimizer.overflow:
            raise AssertionError("DeepSpeed has taken a step that was to be left out")

    def weights(self) -> dict[str, Tensor]:
        out = {name: shared_out(x, self.flat) for name, x in self.parts.parameters()}
        return out | self._buffers()

    def _buffers(self) -> dict[str, Tensor]:
        buffers = dict(self.encoder.named_buffers())
        return {name: buffers[name] for name in self.skeleton.hollow.state_dict() if name in buffers}

    def load_weights(self, weights: Weights) -> None:
        self.parts.set_parameters(lambda name: whole(weights[name]))
        for name, own in self._buffers().items():
            own.copy_(placed(weights[name], own))

    def moments(self) -> dict[str, Tensor]:
        steps = self.parts.steps()
        if steps is None:
            return {}
        self.parts.link()
        out: dict[str, Tensor] = {}
        for name, p in self.parts.trained():
            for key in _MOMENTS:
                out[f"{name}.{key}"] = shared_out(self.parts.moment(p, key), self.flat)
            out[f"{name}.step"] = torch.tensor([steps])
        return out

    def load_moments(self, moments: Weights) -> None:
        steps = {float(moments[f"{name}.step"]) for name, _ in self.parts.trained() if f"{name}.step" in moments}
        if not steps:
            return
        if len(steps) > 1:
            raise UserError(
                f"parameters of this checkpoint have taken {sorted(steps)} steps, and engine={self.cfg.name} counts "
                "them together: go on with engine=ddp or engine=fsdp2"
            )
        self.parts.start_moments(steps.pop())
        self.parts.link()
        for name, p in self.parts.trained():
            for key in _MOMENTS:
                self.parts.set_moment(p, key, whole(moments[f"{name}.{key}"]))

    def template(self, encoder: Encoder) -> dict[str, Tensor]:
        skeleton = Skeleton(encoder) if self.skeleton is None else self.skeleton
        form: Encoder = skeleton.hollow
        out = {}
        for name, p in form.named_parameters():
            out[name] = shared_out(torch.empty_like(p, device=self.device), self.flat)
            if p.requires_grad:
                like = out[name]
                out |= {f"{name}.exp_avg": like, f"{name}.exp_avg_sq": like, f"{name}.step": torch.zeros(1)}
        buffers = dict(form.named_buffers())
        return out | {name: buffers[name] for name in form.state_dict() if name in buffers}

    def plain(self) -> Encoder:
        skeleton: Skeleton = self.skeleton
        return skeleton.filled(self.parts.parameters())

    def release(self) -> None:
        if self.module is not None:
            self.module.destroy()
            self.parts.forget()
        self.encoder = self.module = self.skeleton = self.parts = None
