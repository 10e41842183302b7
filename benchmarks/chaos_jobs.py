"""Jobs for `chaos.py`: all ranks of a run, started by ``accelerate launch``, or forked with everything imported.

Forked ranks are real processes in a real process group, and end as under torchrun: when one
dies, the others get SIGTERM, and SIGKILL half a minute later.  They save the imports, which on
a busy machine are nearly all of a start.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from tests.helpers.launch import kill_all, rank_pid, start

__all__ = ["Forked", "Job", "Launched", "preload"]

_GRACE_S = 30.0


class Job(Protocol):
    """All processes of one start."""

    def poll(self) -> int | None:
        """The exit status once all have ended."""

    def wait(self, timeout_s: float | None = None) -> int:
        """Until all have; `subprocess.TimeoutExpired` after some seconds."""

    def kill(self) -> None:
        """SIGKILL everything."""

    def kill_rank(self, rank: int) -> bool:
        """SIGKILL one rank; False: it has just ended by itself."""


class Launched:
    """By ``accelerate launch``."""

    def __init__(self, processes: int, args: list[str], log: Path) -> None:
        self.job = start(processes, *args, log=log)

    def poll(self) -> int | None:
        """As a `Job`; so are the others."""
        return self.job.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """Of the launcher."""
        return self.job.wait(timeout_s)

    def kill(self) -> None:
        """The launcher first."""
        kill_all(self.job)

    def kill_rank(self, rank: int) -> bool:
        """False: it has just ended by itself."""
        try:
            os.kill(rank_pid(self.job, rank), signal.SIGKILL)
        except (AssertionError, ProcessLookupError):
            return False
        return True


def preload() -> None:
    """Import what a rank imports; no thread is started by it."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    for name in (
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "transformers.models.bert.modeling_bert",
        "hydra",
        "xmcdist.__main__",
        "xmcdist.cli.train",
        "xmcdist.pipelines.train",
        "xmcdist.pipelines.matching",
        "xmcdist.pipelines.report",
    ):
        importlib.import_module(name)


class Forked:
    """Each rank a fork of this process."""

    def __init__(self, processes: int, args: list[str], log: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        log.write_bytes(b"")
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids = [_fork(rank, processes, port, args, log) for rank in range(processes)]
        self.codes: dict[int, int] = {}
        self.killed_at: float | None = None

    def poll(self) -> int | None:
        """The worst exit status once all have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = abs(os.waitstatus_to_exitcode(status))
        if len(self.codes) == len(self.pids):
            return max(self.codes.values())
        if any(self.codes.values()):
            if self.killed_at is None:
                self.killed_at = time.monotonic()
                self._send(signal.SIGTERM)
            elif time.monotonic() > self.killed_at + _GRACE_S:
                self._send(signal.SIGKILL)
        return None

    def wait(self, timeout_s: float | None = None) -> int:
        """The worst exit status."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("train", timeout_s or 0)
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        """All ranks."""
        self._send(signal.SIGKILL)
        self.wait()

    def kill_rank(self, rank: int) -> bool:
        """False: it has just ended by itself."""
        self.poll()
        if self.pids[rank] in self.codes:
            return False
        os.kill(self.pids[rank], signal.SIGKILL)
        return True

    def _send(self, number: signal.Signals) -> None:
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, number)


def _fork(rank: int, processes: int, port: int, args: list[str], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ.update(LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = ["xmcdist", *args]
        importlib.import_module("xmcdist.__main__").main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
