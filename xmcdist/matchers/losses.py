"""Losses of scored (document, candidate) pairs.

A document's loss is the mean over its candidates, the batch's the mean over its documents:

    loss = 1/B sum_i 1/|A_i| sum_{l in A_i} w_il f(y_il, s_il)

Every rank adds up the pairs that it owns; the sum over ranks is the loss, so |A_i| counts
the candidates of all ranks and B the documents of all.  w_il is the label count of a positive
in the weighted loss, times the candidate's own weight when there is one; |A_i| counts
candidates whatever they weigh, so light negatives make a document's loss smaller and leave
the pull of its positives as it was.

Source: Zhang et al., XR-Transformer (NeurIPS 2021), ``weighted-squared-hinge`` of amzn/pecos.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LOSSES", "ragged_loss"]

LOSSES = ("weighted_squared_hinge", "squared_hinge", "bce")


def ragged_loss(
    name: str,
    scores: Tensor,
    values: Tensor,
    doc: Tensor,
    counts: Tensor,
    batch: int,
    weights: Tensor | None = None,
) -> Tensor:
    """This rank's share of the loss.

    Args:
        name: ``weighted_squared_hinge``: max(0, 1 - y s)^2 with y in {-1, 1}, a positive
            weighs its label count; ``squared_hinge``: weight 1; ``bce``: log(1 + exp(-y s)).
        scores: s, ``[p]``.
        values: ``[p]``, label count of a positive, 0 for a negative.
        doc: int64 ``[p]``, place of the document in ``counts``.
        counts: int64 ``[b]``, candidates of a document over all ranks.
        batch: B, documents of the optimizer step over all ranks and micro-batches.
        weights: ``[p]``, what each pair's term is multiplied by; default 1.  The mean over a
            document's candidates still divides by their number, not by the sum of weights.

    Returns:
        A scalar of the dtype of ``scores``; 0, with a gradient, when there are no pairs.

    Raises:
        ValueError: an unknown name.
    """
    if name not in LOSSES:
        raise ValueError(f"matcher.loss={name!r} is none of {', '.join(LOSSES)}")
    positive = values > 0
    sign = torch.where(positive, 1.0, -1.0).to(scores.dtype)
    each = F.softplus(-sign * scores) if name == "bce" else F.relu(1 - sign * scores).square()
    if name == "weighted_squared_hinge":
        each = each * torch.where(positive, values, 1.0).to(scores.dtype)
    if weights is not None:
        each = each * weights.to(scores.dtype)
    share = 1.0 / (counts.clamp(min=1).to(scores.dtype) * batch)
    return (each * share[doc]).sum()
