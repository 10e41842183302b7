"""A plain encoder made from shared-out weights, for the while that one is needed."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from xmcdist.encoders.hf import Encoder

__all__ = ["Skeleton"]


class Skeleton:
    """An encoder without its parameters' values; costs no memory to keep."""

    def __init__(self, encoder: Encoder) -> None:
        """Remember the form of an encoder that is not yet wrapped."""
        hollow = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in encoder.parameters()
        }
        # As if these had been copied already: deepcopy puts them where the parameters are.
        self.hollow: Encoder = copy.deepcopy(encoder, dict(hollow))

    def filled(self, values: Iterable[tuple[str, Tensor]]) -> Encoder:
        """A whole encoder with buffers of its own.

        Args:
            values: every parameter by name, whole; copied one after the other.
        """
        form = dict(self.hollow.named_parameters())
        made = {
            id(form[name]): nn.Parameter(x.detach().clone(), requires_grad=form[name].requires_grad)
            for name, x in values
        }
        return copy.deepcopy(self.hollow, dict(made))
