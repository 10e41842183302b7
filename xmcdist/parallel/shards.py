"""Which rank owns which labels.

`LabelShard` is the only place in xmcdist that turns (rank, world size) into a
label range.  Everything else asks a shard; nobody else writes ``rank * L // W``.

Ranges are half-open ``[start, stop)`` of ceil(labels / ranks) labels, the last shorter or
empty: torch's own cut of a row-sharded DTensor, so that checkpoints are its, too.  No
padding label exists and no label is owned twice or by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # linear models take ranges too, and do without torch
    from torch import Tensor

__all__ = ["LabelShard", "row_range"]


def row_range(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Half-open range of ``rows`` that a rank takes; sizes differ by at most one, 0 allowed."""
    return rank * rows // world_size, (rank + 1) * rows // world_size


@dataclass(frozen=True, slots=True)
class LabelShard:
    """The contiguous slice of the label space that one rank owns."""

    rank: int
    world_size: int
    num_labels: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank ({self.rank}) must be in [0, world_size={self.world_size})")
        if self.num_labels < 1:
            raise ValueError(f"num_labels={self.num_labels} must be at least 1")

    @property
    def widest(self) -> int:
        """Rows of the largest shard."""
        return -(-self.num_labels // self.world_size)

    @property
    def start(self) -> int:
        return min(self.rank * self.widest, self.num_labels)

    @property
    def stop(self) -> int:
        return min((self.rank + 1) * self.widest, self.num_labels)

    @property
    def cuts(self) -> list[int]:
        """First row of every shard and the end, ``[world_size + 1]``."""
        return [min(r * self.widest, self.num_labels) for r in range(self.world_size + 1)]

    def __len__(self) -> int:
        return self.stop - self.start

    def owns(self, labels: Tensor) -> Tensor:
        """Mask of the global label ids, any shape, that this rank owns."""
        return (labels >= self.start) & (labels < self.stop)

    def to_local(self, labels: Tensor) -> Tensor:
        """Global ids to row numbers of this rank's weight; every id must be owned."""
        return labels - self.start

    def owner_of(self, labels: Tensor) -> Tensor:
        """The rank that owns each global label id; same shape, int64."""
        import torch

        return torch.div(labels.to(torch.int64), self.widest, rounding_mode="floor")
