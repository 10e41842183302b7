"""The order in which documents are trained on: a pure function of the step.

A global batch is the same on any number of ranks; ranks only part it among themselves.
So the position in the data is one number, and a run may go on with another rank count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmcdist.parallel.shards import row_range

__all__ = ["GlobalBatches", "local", "sizes"]

_MEGA = 64  # global batches whose documents are sorted by length together


class GlobalBatches:
    """Global batches of documents of similar length, in an order that the seed fixes.

    Epoch e permutes the documents, cuts mega-batches of 64 global batches, sorts each by
    length (so that little is padded) and visits its batches, and all others, in random
    order.  Every document comes once an epoch; what is left over makes a last, smaller batch.

    Args:
        lengths: tokens of every document, ``[N]``.
        global_batch: documents a step, over all ranks.
        seed: fixes the order.

    Raises:
        ValueError: no documents, or a batch below 1.

    Cost: O(N log N) an epoch, 8 bytes a document for the current epoch's order.
    """

    def __init__(self, lengths: ArrayLike, global_batch: int, seed: int) -> None:
        self.lengths = np.asanyarray(lengths)
        if self.lengths.ndim != 1 or not len(self.lengths):
            raise ValueError(f"lengths has shape {self.lengths.shape}: it must be one number a document, at least one")
        if global_batch < 1:
            raise ValueError(f"global_batch={global_batch} must be at least 1")
        self.global_batch = int(global_batch)
        self.seed = int(seed)
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    @property
    def num_docs(self) -> int:
        return len(self.lengths)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_docs // self.global_batch)

    def epoch(self, step: int) -> int:
        """The epoch a step lies in, from 0."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> NDArray[np.int64]:
        """Document ids of a step, counted from 0 over all epochs, ``[<= global_batch]``."""
        if step < 0:
            raise ValueError(f"step={step} must not be negative")
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._epoch_order(epoch), epoch
        return self._order[at * self.global_batch : (at + 1) * self.global_batch].copy()

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.num_docs).astype(np.int64, copy=False)
        span = _MEGA * self.global_batch
        for start in range(0, self.num_docs, span):
            ids = order[start : start + span]
            order[start : start + span] = ids[np.argsort(self.lengths[ids], kind="stable")]
        full = self.num_docs // self.global_batch
        whole = order[: full * self.global_batch].reshape(full, self.global_batch)
        order[: full * self.global_batch] = whole[rng.permutation(full)].reshape(-1)
        return order


def local(ids: NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """The part of a global batch that one rank takes: contiguous, possibly empty."""
    start, stop = row_range(len(ids), rank, world)
    return ids[start:stop]


def sizes(n: int, world: int) -> list[int]:
    """How many of n documents each rank takes, ``[world]``; sums to n."""
    return [stop - start for start, stop in (row_range(n, rank, world) for rank in range(world))]
