"""Named tensors of a module, whole or shared out by rows over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from xmcdist.training.engine import Weights

__all__ = ["placed", "put_weights", "saved_tensors", "shared_out", "whole"]


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once; the live ones, without gradient."""
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    # A state_dict leaves out buffers that are derived, and lists what is shared under every name.
    return {name: own[name].detach() for name in module.state_dict() if name in own}


@torch.no_grad()
def put_weights(module: nn.Module, weights: Weights) -> None:
    """Copy named tensors into a module's; collective where either side is a DTensor.

    Raises:
        KeyError: one is missing.
    """
    for name, own in saved_tensors(module).items():
        own.copy_(placed(weights[name], own))


def whole(x: Tensor) -> Tensor:
    """All of a tensor on every rank; collective for a DTensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shared_out(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of a whole tensor, copied, as a DTensor over a 1-D mesh.

    Rows are cut as FSDP2 cuts them: ceil(rows / ranks), the last parts shorter or empty.
    """
    rows, widest = len(x), -(-len(x) // mesh.size())
    start = min(mesh.get_local_rank() * widest, rows)
    local = x.detach()[start : min(start + widest, rows)].clone()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=x.shape, stride=x.stride())


def placed(x: Tensor, like: Tensor) -> Tensor:
    """The values of ``x`` with device, dtype and placement of ``like``; may share memory with ``x``."""
    if isinstance(like, DTensor):
        if isinstance(x, DTensor) and x.placements == like.placements and x.device_mesh == like.device_mesh:
            return x.to(like.device, like.dtype)
        return shared_out(whole(x).to(like.device, like.dtype).contiguous(), like.device_mesh)
    return whole(x).to(like.device, like.dtype)
