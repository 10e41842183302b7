"""Prometheus metrics of a server, right for one process and for several that share a folder.

Several processes count into files (``PROMETHEUS_MULTIPROC_DIR``, which ``xmcdist serve``
sets); whichever of them is asked adds all up.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client import multiprocess as several

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_DOCUMENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Meters of one application."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self.requests = Counter("xmcdist_requests", "Requests answered", ["path", "status"], registry=own)
        self.seconds = Histogram(
            "xmcdist_request_seconds", "From request to answer", ["path"], buckets=_SECONDS, registry=own
        )
        self.documents = Counter("xmcdist_documents", "Documents predicted", registry=own)
        self.batch = Histogram(
            "xmcdist_batch_documents", "Documents the model was asked about at once", buckets=_DOCUMENTS, registry=own
        )
        self.batch_seconds = Histogram(
            "xmcdist_batch_seconds", "Time the model took for a batch", buckets=_SECONDS, registry=own
        )
        self.queue = self._gauge("xmcdist_queue_documents", "Documents waiting")
        self.in_flight = self._gauge("xmcdist_requests_in_flight", "Requests being answered")
        self.ready = self._gauge("xmcdist_workers_ready", "Workers that are ready")

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(name, what, multiprocess_mode="livesum", registry=self._registry)

    def text(self) -> bytes:
        """All meters in Prometheus's text format."""
        everyone = CollectorRegistry()
        try:
            collector = several.MultiProcessCollector(everyone)  # type: ignore[no-untyped-call]
        except ValueError:  # no folder is set: one process, whose own meters are all there are
            return generate_latest(self._registry)
        _forget_the_dead(Path(collector._path))
        return generate_latest(everyone)


def _forget_the_dead(folder: Path) -> None:
    """Drop gauges of workers that were killed and could not count themselves down."""
    for path in folder.glob("gauge_live*_*.db"):
        told = re.search(r"_(\d+)\.db$", path.name)
        if told and not _is_alive(int(told[1])):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
