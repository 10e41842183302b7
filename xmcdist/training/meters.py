"""What is measured while a level trains, averaged between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmcdist.parallel.traffic import TRAFFIC

__all__ = ["Window"]


class Window:
    """What is averaged between two log lines, on this rank."""

    def __init__(self, step: int) -> None:
        """Begin after ``step`` optimizer steps."""
        self.restart(step)

    def restart(self, step: int) -> None:
        """Forget what was averaged."""
        self.first, self.started, self.traffic = step, time.perf_counter(), TRAFFIC.copy()
        self.documents, self.scored, self.active, self.waiting = 0, 0, 0, 0.0
        self.tokens, self.squares, self.padded = 0, 0, 0
        self.apart_s = 0.0

    def add(self, scored: int, active: int, waiting: float, lengths: ArrayLike, parts: int) -> None:
        """Count one micro-batch.

        Args:
            scored: documents of this replica.
            active: candidates of these, over all its shards.
            waiting: seconds until they were there.
            lengths: tokens of the documents of all ranks, in rank order.
            parts: ranks that part them, each padding its own to its longest.
        """
        tokens = np.asarray(lengths, dtype=np.int64)
        self.documents += len(tokens)
        self.scored += scored
        self.active += active
        self.waiting += waiting
        self.tokens += int(tokens.sum())
        self.squares += int((tokens * tokens).sum())
        self.padded += _padded(tokens, parts)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is no training, such as validation: neither its time nor its traffic is the steps'."""
        before, began = TRAFFIC.copy(), time.perf_counter()
        try:
            yield
        finally:
            self.apart_s += time.perf_counter() - began
            self.traffic.include(TRAFFIC.since(before))

    def flush(self, now: dict[str, Any]) -> dict[str, Any]:
        """One row of metrics, and a new window.

        Args:
            now: values of this moment, ``step`` and ``total`` (of the level) among them.

        Returns:
            ``now`` and the window's means; ``length_squared`` is the mean of the squares of the
            documents' tokens, which attention's cost goes by; ``eta_s`` counts validation in.
        """
        wall = time.perf_counter() - self.started
        took = max(wall - self.apart_s, 1e-9)
        steps, traffic = max(now["step"] - self.first, 1), TRAFFIC.since(self.traffic)
        row = now | {
            "docs_per_s": self.documents / took,
            "tokens_per_s": self.tokens / took,
            "padding_percent": 100 * (1 - self.tokens / max(self.padded, 1)),
            "length_squared": self.squares / max(self.documents, 1),
            "active_candidates": self.active / max(self.scored, 1),
            "data_wait_percent": 100 * self.waiting / took,
            "collective_percent": 100 * traffic.seconds / took,
            "collective_s": traffic.seconds,
            "sent_bytes_per_step": traffic.total / steps,
            "eta_s": (now["total"] - now["step"]) * wall / steps,
        }
        self.restart(now["step"])
        return row


def _padded(tokens: NDArray[np.int64], parts: int) -> int:
    """Tokens with padding, where ranks take contiguous parts of the documents and pad each to its longest."""
    cuts = np.arange(parts + 1) * len(tokens) // parts
    sizes = np.diff(cuts)
    some = sizes > 0
    longest = np.maximum.reduceat(tokens, cuts[:-1][some]) if some.any() else np.zeros(0, np.int64)
    return int((longest * sizes[some]).sum())
