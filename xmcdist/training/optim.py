"""Optimizers of encoder and head, with state by parameter name and by label row.

State is kept outside any engine's own format, so that a checkpoint written by W ranks is
read by any other number: encoder moments by parameter name, head moments row by row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xmcdist.config.schema import OptimizerConfig

__all__ = ["encoder_optimizer", "head_optimizer", "load_moments", "moments", "set_lr"]


def encoder_optimizer(encoder: nn.Module, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; biases and one-dimensional weights (layer norms) are not decayed."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, eps=cfg.eps)


def head_optimizer(head: nn.Module, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over all owned rows, or Adam that moves only rows with a gradient."""
    lr = cfg.lr if cfg.head_lr is None else cfg.head_lr
    if cfg.head == "sparse_adam":
        return torch.optim.SparseAdam(list(head.parameters()), lr=lr, eps=cfg.eps)
    return torch.optim.AdamW(head.parameters(), lr=lr, eps=cfg.eps, weight_decay=cfg.weight_decay)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def moments(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Optimizer state as ``{"<parameter>.<moment>": tensor}``; steps become one-element tensors."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    out: dict[str, Tensor] = {}
    for p, state in optimizer.state.items():
        for moment, value in state.items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
            out[f"{names[p]}.{moment}"] = tensor.reshape(1) if tensor.ndim == 0 else tensor
    return out


def load_moments(optimizer: torch.optim.Optimizer, module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put back what `moments` gave; parameters without saved state start fresh."""
    for name, p in module.named_parameters():
        state: dict[str, Any] = {}
        for key, value in saved.items():
            if key.rpartition(".")[0] != name:
                continue
            moment = key.rpartition(".")[2]
            if moment == "step":
                is_tensor = not isinstance(optimizer, torch.optim.SparseAdam)
                state[moment] = value.reshape(()).clone() if is_tensor else int(value.item())
            else:
                state[moment] = value.to(p.device).clone()
        if state:
            optimizer.state[p] = state
