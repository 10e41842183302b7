"""Optimizers of encoder and head, with state by parameter name and by label row.

State is kept outside any engine's own format, so that a checkpoint written by W ranks is
read by any other number: encoder moments by parameter name, head moments row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xmcdist.config.schema import OptimizerConfig

__all__ = ["RowAdam", "encoder_optimizer", "head_optimizer", "load_moments", "moments", "set_lr"]


def encoder_optimizer(encoder: nn.Module, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; biases and one-dimensional weights (layer norms) are not decayed."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # Fused: one pass over the word embeddings, most of a small encoder's parameters, not a dozen.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, eps=cfg.eps, fused=True)


def head_optimizer(head: nn.Module, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over all owned rows, Adam that moves only rows with a gradient, or gradient descent without a state."""
    lr = cfg.lr if cfg.head_lr is None else cfg.head_lr
    if cfg.head == "sgd":
        return torch.optim.SGD(head.parameters(), lr=lr)
    if cfg.head == "sparse_adam":
        return RowAdam(list(head.parameters()), lr=lr, eps=cfg.eps)
    return torch.optim.AdamW(head.parameters(), lr=lr, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True)


class RowAdam(torch.optim.Optimizer):
    """Adam that moves only the rows with a gradient; every row counts its own steps.

    A cluster that was no candidate in a step keeps its row and its moments, where Adam
    would let them drift and fade.  Source: Kingma & Ba, 2015; lazy as in PyTorch's SparseAdam,
    but with the bias correction of each row's own number of steps.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the rows ``[n, d]`` (or entries ``[n]``) whose gradient is not all zero."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                moved = (p.grad != 0).reshape(len(p), -1).any(dim=1).nonzero()[:, 0]
                state = self.state[p]
                if not state:
                    state["steps"] = torch.zeros(len(p), dtype=torch.float32, device=p.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                g = p.grad[moved]
                state["steps"][moved] += 1
                m = state["exp_avg"][moved].lerp_(g, 1 - beta1)
                v = state["exp_avg_sq"][moved].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                state["exp_avg"][moved], state["exp_avg_sq"][moved] = m, v
                steps = state["steps"][moved].reshape(-1, *[1] * (p.ndim - 1))
                size = group["lr"] / (1 - beta1**steps)
                p[moved] -= size * m / ((v / (1 - beta2**steps)).sqrt() + group["eps"])


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


def load_moments(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    saved: Mapping[str, Tensor],
    place: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Put back what `moments` gave; parameters without saved state start fresh.

    Args:
        place: gives the first tensor the device and placement of the second; default: the device.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, _, moment = key.rpartition(".")
        by_name.setdefault(name, {})[moment] = value
    for name, p in module.named_parameters():
        state: dict[str, Any] = {}
        for moment, value in by_name.get(name, {}).items():
            if moment == "step":
                state[moment] = value.reshape(()).to(p.device).clone()
            else:
                state[moment] = (value.to(p.device) if place is None else place(value, p)).detach().clone()
        if state:
            optimizer.state[p] = state
