"""Who keeps whom waiting: every rank tells the others, once a second, where it is.

A thread writes to the job's key-value store which collective the rank is in, or the last it
left.  When a collective fails or takes too long, the ranks that are still there read these
lines, and the error names the collective and the ranks that never came to it.  Without this
gloo says "connection closed by peer", and a time-out names nobody.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from xmcdist.parallel.traffic import TRAFFIC

__all__ = ["CollectiveError", "Watch", "collective", "start", "stop"]

_BEAT_S = 1.0
_GONE_AFTER_S = 3.5  # without a word; a rank may miss a beat while compiled code holds the interpreter


class CollectiveError(RuntimeError):
    """A collective did not complete; the message names it and the ranks that are missing."""


@dataclass
class _Place:
    """Where this rank is."""

    number: int = 0  # collectives entered so far: the same on all ranks that keep step
    op: str = "start"
    inside: bool = False
    since: float = field(default_factory=time.time)


_place = _Place()
_watch: Watch | None = None


class Watch:
    """The thread that tells the other ranks where this one is."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        """Begin to tell.

        Args:
            store: a torch.distributed store of which no other thread has this handle.
        """
        self.store, self.rank, self.world_size = store, rank, world_size
        self._beat = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xmcdist-watch", daemon=True)
        self.tell()
        self._thread.start()

    def tell(self) -> None:
        """Write this rank's line."""
        self._beat += 1
        line = {"n": _place.number, "op": _place.op, "inside": _place.inside, "t": _place.since, "beat": self._beat}
        self.store.set(f"beat/{self.rank}", json.dumps(line))

    def _run(self) -> None:
        while not self._end.wait(_BEAT_S):
            try:
                self.tell()
            except Exception:  # the store is gone, and with it the job
                return

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(timeout=5)

    def lines(self) -> list[dict[str, Any] | None]:
        """What every rank said last; None of one that has said nothing."""
        keys = [f"beat/{r}" for r in range(self.world_size)]
        there = [key if self.store.check([key]) else None for key in keys]
        return [json.loads(self.store.get(key)) if key else None for key in there]

    def report(self) -> str:
        """Which ranks are missing from the collective that this rank is in, and where they are."""
        try:
            before = self.lines()
            time.sleep(_GONE_AFTER_S)
            after = self.lines()
        except Exception:
            return "  the process that holds the job's key-value store (rank 0, or its launcher) is gone"
        rows = []
        for rank, (then, now) in enumerate(zip(before, after, strict=True)):
            if rank == self.rank:
                continue
            if now is None:
                rows.append(f"  rank {rank}: never heard of")
            elif then is not None and then["beat"] == now["beat"]:
                rows.append(f"  rank {rank}: gone; it was last {_where(now)}")
            elif now["n"] < _place.number:
                rows.append(f"  rank {rank}: alive, but {_where(now)}, and has not come to #{_place.number}")
        return "\n".join(rows) or "  no rank is missing: the network between them has failed"


def _where(line: dict[str, Any]) -> str:
    verb = "in" if line["inside"] else "past"
    return f"{verb} #{line['n']} {line['op']} since {max(time.time() - line['t'], 0):.0f} s"


def start(store: Any, rank: int, world_size: int) -> None:
    """Let this rank be watched, until `stop`."""
    global _watch
    stop()
    _watch = Watch(store, rank, world_size)


def stop() -> None:
    """No longer."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


@contextmanager
def collective(op: str, sent: int) -> Iterator[None]:
    """Around one collective: counts its bytes, says where this rank is, and explains a failure.

    Collectives inside it, as in a backward pass, are counted on their own.

    Args:
        op: its name.
        sent: bytes that leave this rank, see `xmcdist.parallel.traffic`.

    Raises:
        CollectiveError: instead of the backend's own error; other errors, such as memory that
            has run out in a backward pass, pass through.
    """
    around = (_place.op, _place.inside, _place.since)
    _place.number += 1
    _place.op, _place.inside, _place.since = op, True, time.time()
    began = time.perf_counter()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, CollectiveError) or not _of_the_network(error):
            raise
        waited = time.perf_counter() - began
        table = _watch.report() if _watch is not None else "  (the ranks are not watched)"
        raise CollectiveError(
            f"collective #{_place.number} {_place.op} did not complete after {waited:.0f} s; missing from it:\n"
            f"{table}\n  the backend says: {str(error).strip().splitlines()[0][:300]}"
        ) from error
    finally:
        if around[1]:  # a backward pass, say, with collectives of its own
            _place.op, _place.inside, _place.since = around
        else:
            _place.inside, _place.since = False, time.time()
    TRAFFIC.add(op, sent, time.perf_counter() - began)


def _of_the_network(error: RuntimeError) -> bool:
    """Whether it comes from gloo, NCCL or the store, which have no type of their own in common."""
    text = str(error).lower()
    return type(error).__name__.startswith("Dist") or "gloo" in text or "nccl" in text
