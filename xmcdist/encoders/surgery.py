"""Changes to a loaded HuggingFace model that do not depend on its family.

Keep the first layers, set every dropout, freeze what the pooled output does not use, and
find out whether documents of the asked length fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xmcdist.encoders.errors import EncoderError

__all__ = ["freeze_unused", "keep_layers", "set_config_dropout", "set_dropout"]

_STACKS = ("encoder.layer", "encoder.layers", "transformer.layer", "layers", "layer", "model.layers", "h")


def keep_layers(model: nn.Module, count: int) -> None:
    """Cut the stack of transformer layers to its first ``count``, in place.

    Raises:
        EncoderError: there is no such stack, or it has fewer layers.
    """
    for path in _STACKS:
        owner, _, name = path.rpartition(".")
        parent: Any = model
        for part in owner.split(".") if owner else []:
            parent = getattr(parent, part, None)
        stack = getattr(parent, name, None)
        if isinstance(stack, nn.ModuleList):
            break
    else:
        raise EncoderError(
            f"encoder.layers={count}: {type(model).__name__} keeps its layers in none of the known places "
            f"({', '.join(_STACKS)}); leave encoder.layers null"
        )
    if not 1 <= count <= len(stack):
        raise EncoderError(f"encoder.layers={count}: {type(model).__name__} has {len(stack)} layers")
    setattr(parent, name, stack[:count])
    config: Any = model.config
    config.num_hidden_layers = count
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list):  # families with a kind of attention per layer check the two against each other
        config.layer_types = kinds[:count]


def set_config_dropout(config: Any, p: float) -> None:
    """Every dropout that a model's config knows, before the model is built from it."""
    for key, value in list(vars(config).items()):
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, int | float):
            setattr(config, key, float(p))


def set_dropout(model: nn.Module, p: float) -> None:
    """Every dropout module, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = float(p)


def freeze_unused(model: nn.Module, forward: Callable[[], Tensor]) -> list[str]:
    """Freeze the parameters that the output does not depend on, such as an unused pooler.

    Data-parallel engines wait for the gradient of every trainable parameter; one that never
    comes is an error.

    Args:
        model: in any mode.
        forward: gives an output of the model; called once.

    Returns:
        Names of the frozen parameters.

    Cost: one forward pass; the graph is walked, no gradient is computed.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    used: set[int] = set()
    with torch.enable_grad():
        stack: list[Any] = [forward().grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            used.add(id(variable))
        for below, _ in node.next_functions:
            if below not in seen:
                seen.add(below)
                stack.append(below)
    unused = [name for key, name in names.items() if key not in used]
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    return unused
