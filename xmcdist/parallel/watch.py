"""Who keeps whom waiting: every rank tells the others, once a second, where it is.

A thread writes to the job's key-value store which collective the rank is in, or the last it
left, or what it reads.  When a collective fails or takes too long, the ranks that are still
there read these lines, and the error names the collective and the ranks that never came to
it.  Without this gloo says "connection closed by peer", and a time-out names nobody.

The thread also ends its rank where nobody else would: when data do not come (`reading`), and
when the launcher or the store is gone, so that no rank is left behind alone.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from xmcdist.parallel.traffic import TRAFFIC

__all__ = ["CollectiveError", "Watch", "collective", "gone", "reading", "start", "stop"]

_BEAT_S = 1.0
_MOSTLY_WORK = ("backward", "checkpoint")  # their time is no time in collectives; what they call is counted
_GONE_AFTER_S = 3.5  # without a word; a rank may miss a beat while compiled code holds the interpreter
_SURELY_GONE_AFTER_S = 60.0
_NEIGHBOURS = 32  # ranks that one looks after: asking for all of a thousand would flood the store
_OTHERS_SPEAK_S = 10.0  # the thread that trains has more to say when the store is gone, if it can
_FRAMES = 8  # of a stack, the innermost
_WITHOUT_INTERPRETER_S = 10.0  # a page that does not come may hold the interpreter, and the thread with it


_NO_STORE = "the process that holds the job's key-value store (rank 0, or its launcher) is gone"
_GOES_ON = "The same command goes on from what is saved."


class CollectiveError(RuntimeError):
    """A collective did not complete; the message names it and the ranks that are missing."""


@dataclass
class _Place:
    """Where this rank is."""

    number: int = 0  # collectives entered so far: the same on all ranks that keep step
    op: str = "start"
    inside: bool = False
    since: float = field(default_factory=time.time)
    reading: _Reading | None = None


@dataclass(frozen=True)
class _Reading:
    """Data that this rank waits for."""

    what: str
    files: Callable[[], str]
    limit_s: float
    since: float


_place = _Place()
_watch: Watch | None = None


class Watch:
    """The thread that tells the other ranks where this one is."""

    def __init__(self, store: Any, rank: int, world_size: int, launcher: int | None = None) -> None:
        """Begin to tell.

        Args:
            store: a torch.distributed store of which no other thread has this handle; None: there
                are no others to tell.
            launcher: process that started this one; without it this one ends.
        """
        self.store, self.rank, self.world_size, self.launcher = store, rank, world_size, launcher
        self._host = socket.gethostname()
        self._beat = 0
        self._moved: dict[int, tuple[int, float]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xmcdist-watch", daemon=True)
        self.tell()
        self._thread.start()

    def tell(self) -> None:
        """Write this rank's line."""
        if self.store is None:
            return
        self._beat += 1
        line = {"n": _place.number, "op": _place.op, "inside": _place.inside, "t": _place.since, "beat": self._beat}
        line |= {"host": self._host, "pid": os.getpid()}
        if _place.reading is not None:
            line |= {"reading": _place.reading.what, "t": _place.reading.since}
        self.store.set(f"beat/{self.rank}", json.dumps(line))

    def _run(self) -> None:
        while not self._end.wait(_BEAT_S):
            self._look_at_data()
            if self.launcher is not None and os.getppid() != self.launcher:
                self._leave(f"the launcher of this machine (process {self.launcher}) is gone. {_GOES_ON}")
            try:
                self.tell()
            except Exception:
                if not self._end.wait(_OTHERS_SPEAK_S):
                    self._leave(f"{_NO_STORE}. {_GOES_ON}")
                return

    def _look_at_data(self) -> None:
        """End this rank when what it reads does not come; the others would wait for it until their time-out."""
        at = _place.reading
        if at is None or time.time() - at.since < at.limit_s:
            return
        stack = sys._current_frames().get(threading.main_thread().ident or 0)
        lines = "".join(traceback.format_stack(stack, limit=_FRAMES)) if stack is not None else ""
        self._leave(
            f"{at.what}: its data have not come within {at.limit_s:g} s. It was reading {at.files()}. See whether "
            f"that disk or network folder answers on {self._host}, then start the same command again, which goes on "
            "from what is saved; where reading is merely slow, raise engine.data_timeout_s. This is where it "
            f"waits:\n{lines}"
        )

    def _leave(self, why: str) -> None:
        """Past Python's streams, whose locks another thread may hold, and past the main thread, which may hang."""
        with suppress(OSError):
            os.write(2, f"xmcdist: rank {self.rank} on {self._host}: {why}\n".encode())
        os._exit(1)

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(timeout=5)

    def gone(self) -> str:
        """Which of the next ranks are gone, in words; "" if none; to be asked again and again."""
        next_ones = [(self.rank + k) % self.world_size for k in range(1, min(self.world_size, _NEIGHBOURS + 1))]
        try:
            # To ask for a key that is not there yet would wait for it, and keep the thread that tells waiting, too.
            spoken = [r for r in next_ones if self.store.check([f"beat/{r}"])]
            heard = {r: json.loads(self.store.get(f"beat/{r}")) for r in spoken}
        except Exception:
            return _NO_STORE
        now, silent = time.monotonic(), []
        for r, line in heard.items():
            if r not in self._moved or self._moved[r][0] != line["beat"]:
                self._moved[r] = (line["beat"], now)
            # One of this machine is known to be dead; of another, silence is all there is to go by.
            dead = line.get("host") == self._host and not _is_process(line["pid"])
            if now - self._moved[r][1] > (_GONE_AFTER_S if dead else _SURELY_GONE_AFTER_S):
                silent.append(f"rank {r} is gone; it was last {_where(line)}")
        return "; ".join(silent)

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
            return f"  {_NO_STORE}"
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
    since = f"since {max(time.time() - line['t'], 0):.0f} s"
    if "host" in line:
        since += f", on {line['host']}"
    if "reading" in line:
        return f"in data loading ({line['reading']}) {since}"
    verb = "in" if line["inside"] else "past"
    return f"{verb} #{line['n']} {line['op']} {since}"


def _is_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def start(store: Any, rank: int, world_size: int, launcher: int | None = None) -> None:
    """Let this rank be watched, until `stop`; arguments as of `Watch`."""
    global _watch
    stop()
    _watch = Watch(store, rank, world_size, launcher)


def gone() -> str:
    """Which ranks are gone, in words; "" if none is, or if nobody watches."""
    return _watch.gone() if _watch is not None and _watch.store is not None else ""


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
    TRAFFIC.add(op, sent, 0.0 if op in _MOSTLY_WORK else time.perf_counter() - began)


@contextmanager
def reading(what: str, files: Callable[[], str], limit_s: float) -> Iterator[None]:
    """Around what waits for a disk: other ranks are told, and this one ends when it takes too long.

    The thread here says what hangs and ends the process.  A page of a mapped file that does not
    come can stop it, too, as the interpreter is held meanwhile; a thread of faulthandler's, which
    needs no interpreter, then writes the stacks and ends the process a little later.

    Args:
        what: for whom, such as "level 2, step 17".
        files: names them; called only when it takes too long.
        limit_s: seconds until the process ends, with status 1; where none watches, never.

    Cost: about 0.1 ms.
    """
    watch = _watch
    if watch is None:
        yield
        return
    _place.reading = _Reading(what, files, limit_s, time.time())
    with suppress(Exception):  # a store that is gone is found by the thread
        watch.tell()
    faulthandler.dump_traceback_later(limit_s + _WITHOUT_INTERPRETER_S, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        _place.reading = None


def _of_the_network(error: RuntimeError) -> bool:
    """Whether it comes from gloo, NCCL or the store, which have no type of their own in common."""
    text = str(error).lower()
    return type(error).__name__.startswith("Dist") or "gloo" in text or "nccl" in text
