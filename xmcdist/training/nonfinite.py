"""Steps whose loss or gradient is no finite number: left out, counted, described.

A step is left out on all ranks alike, since loss and norm are sums over all of them.  What a
bad document does (one that overflows bf16, say) is over with its batch; what has no end is
training that diverges, and then the steps that follow are bad, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xmcdist.config.errors import UserError
from xmcdist.matchers.head import ShardedHead
from xmcdist.parallel.collectives import gather_objects
from xmcdist.training.engine import Engine

__all__ = ["DivergedError", "NonFinite", "Skips", "Trace", "describe"]

IN_A_ROW = 3
"""Steps left out one after the other at which training stops: that is no single document's fault."""


class DivergedError(UserError):
    """Training gave losses or gradients that are no finite numbers."""


@dataclass
class Trace:
    """What this rank did in a step, kept until the step is known to be sound; nothing is copied from the device."""

    documents: list[NDArray[np.int64]] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def embedded(self, mine: NDArray[np.int64], embedding: Tensor) -> None:
        """This rank's documents ``[n]`` of a micro-batch and their vectors ``[n, d]``."""
        self.documents.append(mine)
        self.finite.append(torch.isfinite(embedding.detach()).all(dim=1))

    def scored(self, loss: Tensor) -> None:
        """The loss of this rank's rows for a micro-batch."""
        self.losses.append(loss.detach())


@dataclass(frozen=True)
class NonFinite:
    """What is known of a step that was left out; the same on every rank.

    Attributes:
        loss: over the global batch.
        norm: of the gradient of encoder and head.
        encoder_gradient: whether the encoder's part of that is finite.
        ranks: by rank: ``documents`` that it encoded, ``bad_vectors``: those of them whose vector is
            not finite, ``rows``: ``[start, stop)`` of the head, ``loss`` and ``gradient``: whether
            these rows' part is finite.
    """

    level: int
    step: int
    loss: float
    norm: float
    encoder_gradient: bool
    ranks: list[dict[str, Any]]

    def parts(self) -> list[str]:
        """What is not finite, in words."""
        out = []
        for rank, r in enumerate(self.ranks):
            rows = f"rank {rank}, rows {r['rows'][0]} to {r['rows'][1]}"
            if r["bad_vectors"]:
                out.append(f"rank {rank}: vectors of documents {', '.join(map(str, r['bad_vectors'][:8]))}")
            if not r["loss"]:
                out.append(f"{rows}: loss")
            if not r["gradient"]:
                out.append(f"{rows}: gradient of the head")
        return out if self.encoder_gradient else [*out, "gradient of the encoder"]


def describe(
    trace: Trace, engine: Engine, head: ShardedHead, *, level: int, step: int, loss: float, norm: float
) -> NonFinite:
    """Find out what was not finite, from gradients that are still there; collective."""
    documents = np.concatenate(trace.documents)
    finite = torch.cat(trace.finite).cpu().numpy()
    grads = [p.grad for p in head.parameters() if p.grad is not None]
    mine = {
        "documents": documents.tolist(),
        "bad_vectors": documents[~finite].tolist(),
        "rows": [head.shard.start, head.shard.stop],
        "loss": all(math.isfinite(float(x)) for x in trace.losses),
        "gradient": all(bool(torch.isfinite(g).all()) for g in grads),
    }
    return NonFinite(level, step, loss, norm, math.isfinite(engine.norm_squared()), gather_objects(mine))


@dataclass
class Skips:
    """How many steps of a level were left out."""

    total: int = 0
    in_a_row: int = 0

    def taken(self) -> None:
        """A step was sound."""
        self.in_a_row = 0

    def left_out(self, allowed: int) -> str:
        """Count one.

        Args:
            allowed: ``optimizer.max_skipped_steps``.

        Returns:
            Why training must stop; "" where it may go on.
        """
        self.total += 1
        self.in_a_row += 1
        if self.total > allowed:
            return f"{self.total} steps of this level could not be taken (optimizer.max_skipped_steps={allowed})"
        if self.in_a_row >= IN_A_ROW:
            return f"{self.in_a_row} steps one after the other could not be taken"
        return ""


def diverged(found: NonFinite, why: str, place: str | None) -> DivergedError:
    """The error that ends training.

    Args:
        found: in the last step.
        why: of `Skips.left_out`.
        place: the file with that step's documents.
    """
    written = f" The documents of this step are in {place}." if place else ""
    return DivergedError(
        f"level {found.level}, step {found.step}: the loss is {found.loss} and its gradient's norm {found.norm}; "
        f"not finite: {'; '.join(found.parts()) or 'only their sums'}. {why[0].upper() + why[1:]}.{written} Lower "
        "optimizer.lr or optimizer.head_lr, or set engine.precision=fp32; where always the same documents are named, "
        "look at these"
    )
