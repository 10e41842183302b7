"""What is measured while a level trains, averaged between two log lines."""

from __future__ import annotations

import time
from typing import Any

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

    def add(self, documents: int, scored: int, active: int, waiting: float) -> None:
        """Count one micro-batch.

        Args:
            documents: of all ranks.
            scored: of this replica.
            active: candidates of these that this rank scores.
            waiting: seconds until they were there.
        """
        self.documents += documents
        self.scored += scored
        self.active += active
        self.waiting += waiting

    def flush(self, now: dict[str, Any]) -> dict[str, Any]:
        """One row of metrics, and a new window.

        Args:
            now: values of this moment, ``step`` and ``total`` (of the level) among them.
        """
        took = max(time.perf_counter() - self.started, 1e-9)
        steps, traffic = max(now["step"] - self.first, 1), TRAFFIC.since(self.traffic)
        row = now | {
            "docs_per_s": self.documents / took,
            "active_candidates": self.active / max(self.scored, 1),
            "data_wait_percent": 100 * self.waiting / took,
            "collective_percent": 100 * traffic.seconds / took,
            "sent_bytes_per_step": traffic.total / steps,
            "eta_s": (now["total"] - now["step"]) * took / steps,
        }
        self.restart(now["step"])
        return row
