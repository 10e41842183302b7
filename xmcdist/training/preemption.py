"""A signal asks the run to end: it ends in good order, and the same command goes on.

SIGTERM, SIGUSR1 and SIGUSR2 (a time limit that comes near, a pre-emption) ask every rank to
stop at the next place from which it can go on: after the step of a matcher's level, with a
checkpoint, or before the next stage.  A signal may reach one rank a step before another, so
ranks agree first: with the all-reduce of the loss, or by a collective where a stage begins.

Signals are not waited for by the main thread, which may be inside compiled code for minutes.
Python's own C handler writes each one's number to a socket, and a thread here reads it: it
sets the flag, says what is waited for, and ends the process at the second signal, at SIGINT,
or when a rank whose agreement is needed has gone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

__all__ = [
    "EXIT_STATUS",
    "SIGNALS",
    "Preempted",
    "agree",
    "begin",
    "clear_mark",
    "counts",
    "handled",
    "leaving",
    "name_of",
    "received",
    "unhandled",
    "where",
    "write_mark",
]

EXIT_STATUS = os.EX_TEMPFAIL  # 75: try again later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
MARK = "preempted.json"

_INTERRUPTED = 130  # as a shell says of a process that SIGINT has ended
# Slurm signals launcher and ranks, and the launcher passes its own on: two copies of one request.
_COPIES_WITHIN_S = 5.0
_LOOK_EVERY_S = 3.0


class Preempted(Exception):
    """All ranks have agreed to end here, because at least one was asked to."""

    def __init__(self, signal_name: str, stage: str, step: int | None = None) -> None:
        """Remember where.

        Args:
            signal_name: SIGTERM, SIGUSR1 or SIGUSR2.
            stage: that was left, or that would have begun.
            step: optimizer steps of the checkpoint; None where a stage would have begun.
        """
        super().__init__(signal_name, stage, step)
        self.signal, self.stage, self.step = signal_name, stage, step

    def __str__(self) -> str:
        place = f"before {self.stage}" if self.step is None else f"in {self.stage}, saved at step {self.step}"
        return f"ended {place}, as {self.signal} asked; the same command goes on from there"


@dataclass
class _Asked:
    """What this process has been asked for, and where it is."""

    signal: int | None = None
    at: float = 0.0
    stage: str = "start"
    until: str = "the first stage begins"
    leaving: bool = False
    run_dir: Path | None = None
    tell: Callable[[str], None] | None = None
    peers: Callable[[], str] | None = None


_asked = _Asked()


@contextmanager
def handled(rank: int = 0) -> Iterator[None]:
    """Take these signals and SIGINT as requests, and put the handlers that were there back afterwards.

    In any thread but the main one, where Python sets no handlers, it changes nothing.

    Args:
        rank: of this process: 0 speaks for all, and writes the mark.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = _Asked()
    hear, say = socket.socketpair()
    hear.setblocking(False)
    say.setblocking(False)
    before = {s: signal.signal(s, _nothing) for s in (*SIGNALS, signal.SIGINT)}
    for s in before:
        signal.siginterrupt(s, False)  # no library has to cope with a call that was cut short
    fd = signal.set_wakeup_fd(say.fileno(), warn_on_full_buffer=False)
    end = threading.Event()
    thread = threading.Thread(target=_listen, args=(hear, end, rank), name="xmcdist-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(fd)
        end.set()
        with suppress(OSError):
            say.send(b"\0")
        thread.join(timeout=5)
        hear.close()
        say.close()
        _asked = _Asked()


def _nothing(number: int, frame: FrameType | None) -> None:
    """There must be a handler for the number to be written; the thread does the rest."""


def _forget() -> None:
    """In a forked child: its signals are its own, not the run's."""
    for s in (*SIGNALS, signal.SIGINT):
        if signal.getsignal(s) is _nothing:
            signal.signal(s, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


def where(stage: str, until: str) -> None:
    """Say where this process is, for the line that answers a signal.

    Args:
        stage: that runs.
        until: what a signal waits for, such as "the end of this step".
    """
    _asked.stage, _asked.until = stage, until


def begin(run_dir: Path, tell: Callable[[str], None], peers: Callable[[], str] | None = None) -> None:
    """Say of which run this is, once it is known.

    Args:
        run_dir: where the mark goes.
        tell: says a line to a person; silent on all ranks but 0.
        peers: names ranks that are gone, "" if none is; ends a wait for an agreement that cannot come.
    """
    _asked.run_dir, _asked.tell, _asked.peers = run_dir, tell, peers


def received() -> int | None:
    """The signal that this process has got, None if none."""
    return _asked.signal


def counts() -> list[float]:
    """A one for the signal that this process has got, of `SIGNALS`: to be summed over ranks."""
    return [float(_asked.signal == s) for s in SIGNALS]


def name_of(summed: list[float]) -> str | None:
    """The signal that most ranks have got; None where none has.

    Args:
        summed: `counts`, added up over all ranks.
    """
    most = max(summed)
    return SIGNALS[summed.index(most)].name if most > 0 else None


def agree(stage: str) -> None:
    """Whether any rank was asked to end before a stage begins; collective.

    Raises:
        Preempted: on all ranks.
    """
    import numpy as np

    from xmcdist.parallel.collectives import all_reduce_array

    name = name_of(all_reduce_array(np.array(counts())).tolist())
    if name is not None:
        raise Preempted(name, stage)
    where(stage, f"stage {stage} is committed")


def leaving() -> None:
    """From here on this process is on its way out: other ranks may be gone, and signals change nothing."""
    _asked.leaving = True


def unhandled() -> bool:
    """Let signals end this process from here on, as it has nothing left to save.

    Returns:
        Whether one has come already.
    """
    for s in SIGNALS:
        if signal.getsignal(s) is _nothing:
            signal.signal(s, signal.SIG_DFL)
    return _asked.signal is not None


def write_mark(run_dir: Path, error: Preempted) -> None:
    """Leave ``preempted.json``, by which a batch script knows that the run is to be started again."""
    value = {
        "signal": error.signal,
        "stage": error.stage,
        "step": error.step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    beside = run_dir / f"{MARK}.tmp"
    beside.write_text(json.dumps(value) + "\n", encoding="utf-8")
    os.replace(beside, run_dir / MARK)


def clear_mark(run_dir: Path) -> None:
    """A run that begins is not pre-empted any more."""
    (run_dir / MARK).unlink(missing_ok=True)


def _listen(hear: socket.socket, end: threading.Event, rank: int) -> None:
    """The thread: reads signal numbers until `handled` ends."""
    import select

    while not end.is_set():
        ready, _, _ = select.select([hear], [], [], _LOOK_EVERY_S if _asked.signal else None)
        if ready:
            for number in hear.recv(64):
                _take(number, rank)
        elif _asked.signal and not _asked.leaving:
            _look_for_peers(rank)


def _take(number: int, rank: int) -> None:
    if number == signal.SIGINT:
        if rank == 0:
            _write("xmcdist: interrupted; the same command goes on from what is saved")
        _end(_INTERRUPTED)
    if number not in SIGNALS:
        return
    name = signal.Signals(number).name
    if _asked.signal is None:
        _asked.signal, _asked.at = number, time.monotonic()
        if _asked.leaving:
            return
        text = f"{name} received: the run ends when {_asked.until}; a second signal ends it at once"
        if _asked.tell is not None:
            _asked.tell(text)
        elif rank == 0:
            _write(f"xmcdist: {text}")
    elif time.monotonic() - _asked.at > _COPIES_WITHIN_S and not _asked.leaving:
        if rank == 0:
            _write(f"xmcdist: {name} received again: ended at once; the same command goes on from what is saved")
            if _asked.run_dir is not None and _asked.run_dir.is_dir():
                with suppress(OSError):
                    write_mark(_asked.run_dir, Preempted(name, _asked.stage))
        _end(EXIT_STATUS)


def _look_for_peers(rank: int) -> None:
    """A launcher asks the ranks to end when one of them has died: they must not wait for it."""
    gone = _asked.peers() if _asked.peers is not None else ""
    if gone and not _asked.leaving:
        _write(f"xmcdist: rank {rank}: asked to end, and the others cannot agree to it: {gone}")
        _end(1)


def _write(line: str) -> None:
    """Past Python's streams, whose locks the main thread may hold."""
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
    with suppress(OSError):
        os.write(2, f"{show_cursor}{line}\n".encode())


def _end(status: int) -> None:
    os._exit(status)
