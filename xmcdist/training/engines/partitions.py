"""What each ZeRO stage holds of parameters, gradients and moments, by parameter.

The only module that knows DeepSpeed's insides; written against 0.19.  Every method is
collective unless it says otherwise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Partitions", "StageThree", "StageTwo"]


class Partitions(ABC):
    """Whole tensors out of, and into, the partitions of a DeepSpeed engine."""

    def __init__(self, engine: Any) -> None:
        self.module: nn.Module = engine.module
        self.optimizer: Any = engine.optimizer

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters with an optimizer state; not collective."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    @abstractmethod
    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole, one after the other; valid until the next."""

    @abstractmethod
    def set_parameters(self, value: Callable[[str], Tensor]) -> None:
        """Write every parameter from whole values, equal on all ranks."""

    @abstractmethod
    def gradient_norm(self) -> float:
        """Norm of the averaged gradient; nan when it is not finite."""

    @contextmanager
    def invalid_gradient(self) -> Iterator[None]:
        """Inside, DeepSpeed takes the gradient's norm for no number, whatever the gradient is."""
        name, value = self._norm_is_nan()
        setattr(self.optimizer, name, value)
        try:
            yield
        finally:
            delattr(self.optimizer, name)  # the method of its class is there again

    @abstractmethod
    def _norm_is_nan(self) -> tuple[str, Callable[..., Any]]:
        """The method that works out a step's norm, and one that finds it invalid."""

    @abstractmethod
    def moment(self, p: nn.Parameter, key: str) -> Tensor:
        """A moment of a parameter, whole."""

    @abstractmethod
    def set_moment(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        """Write this rank's part of a moment from the whole."""

    def link(self) -> None:  # noqa: B027 -- only stages 1 and 2 need it
        """Make `moment` find what the optimizer has; not collective."""

    def forget(self) -> None:  # noqa: B027 -- only stage 3 needs it
        """After the engine's end: drop what DeepSpeed still holds of the module; not collective."""

    @abstractmethod
    def _flat(self) -> list[Tensor]:
        """The flat fp32 partitions that the optimizer moves; not collective."""

    def steps(self) -> float | None:
        """Optimizer steps taken; None before the first.  Not collective."""
        states = [self.optimizer.optimizer.state.get(flat) for flat in self._flat()]
        return None if not states or not states[0] else float(states[0]["step"])

    def start_moments(self, steps: float) -> None:
        """Moments of zero after so many steps; not collective."""
        for flat in self._flat():
            self.optimizer.optimizer.state[flat] = {
                "step": torch.tensor(steps, dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }


class StageTwo(Partitions):
    """Stages 1 and 2: parameters are whole everywhere, moments (and gradients) are cut."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.module.named_parameters():
            yield name, p.detach()

    @torch.no_grad()
    def set_parameters(self, value: Callable[[str], Tensor]) -> None:
        for name, p in self.module.named_parameters():
            p.copy_(value(name))
        self.optimizer.refresh_fp32_params()

    def gradient_norm(self) -> float:
        return _finite(self.optimizer.scaled_global_norm())

    def _norm_is_nan(self) -> tuple[str, Callable[..., Any]]:
        return "scaled_global_norm", lambda *_: torch.tensor(math.nan)

    def moment(self, p: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        out: Tensor = safe_get_full_optimizer_state(p, key)
        return out

    def set_moment(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(p, value, key)

    def link(self) -> None:
        # DeepSpeed does it once, after the first group of parameters has moved and before the others have.
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat(self) -> list[Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)


class StageThree(Partitions):
    """Stage 3: parameters are cut, too."""

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.runtime.zero import GatheredParameters

        for name, p in self.module.named_parameters():
            with GatheredParameters([p]):
                yield name, p.detach().clone()

    @torch.no_grad()
    def set_parameters(self, value: Callable[[str], Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        for name, p in self.module.named_parameters():
            whole = value(name)
            with GatheredParameters([p], modifier_rank=0):
                p.copy_(whole)
        self.optimizer.refresh_fp32_params()

    def gradient_norm(self) -> float:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return _finite(combine_grad_norm_groups(self.optimizer._get_norm_groups()))

    def _norm_is_nan(self) -> tuple[str, Callable[..., Any]]:
        return "_get_norm_groups", lambda: [torch.tensor(math.nan)]

    def moment(self, p: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        out: Tensor = safe_get_full_optimizer_state(p, key)
        return out

    def set_moment(self, p: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        # Not the setter of whole values: it fails where ranks do not divide the parameter.
        width, rank = p.ds_tensor.numel(), torch.distributed.get_rank()  # type: ignore[attr-defined]
        flat = value.reshape(-1)[rank * width : (rank + 1) * width]
        safe_set_local_optimizer_state(p, F.pad(flat, (0, width - len(flat))), key)

    def forget(self) -> None:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        # Else a list and a method's cache, both global, keep every level's encoder until the process ends.
        FWD_MODULE_STACK.clear()
        for method in vars(PartitionedParameterCoordinator).values():
            for cell in getattr(method, "__closure__", None) or ():
                getattr(cell.cell_contents, "cache_clear", lambda: None)()

    def _flat(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)


def _finite(norm: Any) -> float:
    """DeepSpeed says -1 or inf of a norm that is no number."""
    value = float(norm)
    return value if 0 <= value < float("inf") else float("nan")
