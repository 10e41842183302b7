"""``RUN/run.lock``: who is using a run folder.  Two runs in one folder would spoil each other's stages.

Rank 0 holds it, as a file that says host, process and command, and renews its time every ten
seconds.  Whether a holder still lives is read from ``/proc`` on its own machine (a process id
with another start time is another process), and elsewhere from the file's time.  No lock of the
file system is needed: on network folders those may not work, or outlive a dead node.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from xmcdist.checkpoint.atomic import no_space_is_clear
from xmcdist.config.errors import UserError
from xmcdist.parallel.errors import errors_together
from xmcdist.parallel.launch import World

__all__ = ["LOCK", "RunLock", "held"]

LOCK = "run.lock"
_BEAT_S = 10.0
_STALE_S = 60.0  # without a beat: the holder on another machine is dead
_STALE_SAME_JOB_S = 25.0
_GRACE_S = 3.0  # a process that was killed may take a moment to go
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


@contextmanager
def held(
    run_dir: Path, world: World, say: Callable[[str], None], job: tuple[str | None, int]
) -> Iterator[Callable[[], None]]:
    """Hold the run folder while the body runs; collective.

    Args:
        run_dir: made when missing, and taken away again if nothing was put into it.
        say: told of a lock that was taken over.
        job: Slurm's id of this job and how often it was queued anew.

    Yields:
        A check for rank 0 before it writes: raises `UserError` if another run has taken over.

    Raises:
        UserError: on every rank: another run is using the folder, or it cannot be written.
    """
    lock = RunLock(run_dir, say, job)
    with errors_together(), no_space_is_clear(run_dir / LOCK):
        if world.is_main:
            try:
                lock.take()
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UserError(f"run_dir={run_dir} cannot be written ({error}): choose another") from error
    try:
        yield lock.check
    finally:
        lock.release()


class RunLock:
    """The lock of one run folder, from one process."""

    def __init__(
        self, run_dir: Path, say: Callable[[str], None] = lambda _: None, job: tuple[str | None, int] = (None, 0)
    ) -> None:
        self.run_dir, self.path, self.say, self.job = run_dir, run_dir / LOCK, say, job
        self._mine: dict[str, Any] | None = None  # what the file says while this process holds it
        self._made_folder = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Hold the folder, or say who does.

        Raises:
            UserError: a living run does.

        Cost: a moment; up to a minute where the holder was on another machine and has just died.
        """
        self._made_folder = not self.run_dir.exists()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        mine = _describe(self.job)
        while not self._create(mine):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            holder = self._read()
            if holder is None:  # gone in between
                continue
            dead = self._why_dead(*holder)
            if dead is not None and self._take_away(holder[0]):
                self.say(f"run.lock of a run that has ended without a word is taken over ({_who(holder[0])}): {dead}")
        self._mine = mine
        for left in self.run_dir.glob(f"{LOCK}.*"):  # of runs that were killed in the middle of this
            left.unlink(missing_ok=True)
        self._end.clear()
        self._thread = threading.Thread(target=self._beat, name="xmcdist-run-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise a `UserError` if another run holds the folder by now; nothing where this process never took it."""
        if self._mine is None:
            return
        holder = self._read()
        if holder is None:
            self._create(self._mine)  # someone deleted it
            holder = self._read()
        if holder is None or holder[0].get("id") != self._mine["id"]:
            raise UserError(
                f"{self.run_dir} was taken over by another run ({_who(holder[0]) if holder else 'unknown'}), so this "
                "one ends here and writes nothing more"
            )

    def release(self) -> None:
        """Let go, if this process holds it; never raises."""
        if self._mine is None:
            return
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        mine, self._mine = self._mine, None
        with suppress(OSError):
            holder = self._read()
            if holder is not None and holder[0].get("id") == mine["id"]:
                self.path.unlink()
        if self._made_folder:
            with suppress(OSError):  # not empty, as a rule
                self.run_dir.rmdir()

    def _create(self, mine: dict[str, Any]) -> bool:
        """Put the file there unless there is one; whole, and by one process only, on NFS too."""
        data = (json.dumps(mine, indent=1) + "\n").encode()
        beside = self.path.with_name(f"{LOCK}.{mine['id']}")
        try:
            with open(beside, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            try:
                os.link(beside, self.path)
            except FileExistsError:
                return beside.stat().st_nlink == 2  # NFS may have done it, and lost the answer
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create_exclusive(self.path, data)
            return True
        except FileNotFoundError:  # another run, which has just taken it, tidied up
            return False
        finally:
            beside.unlink(missing_ok=True)

    def _read(self) -> tuple[dict[str, Any], float] | None:
        """What the file says, ``{}`` if it is damaged, and its time; opened anew, so that NFS asks the server."""
        try:
            with open(self.path, encoding="utf-8", errors="replace") as f:
                modified = os.fstat(f.fileno()).st_mtime
                return _parse(f.read()), modified
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:
                return None
            raise

    def _why_dead(self, holder: dict[str, Any], modified: float) -> str | None:
        """How it is known that the holder is dead; None: look again.

        Raises:
            UserError: it lives.
        """
        me = _describe(self.job)
        if holder and all(holder.get(k) == me[k] is not None for k in ("boot_id", "pid_namespace")):
            end = time.monotonic() + _GRACE_S
            while _lives(holder):
                if time.monotonic() > end:
                    self._refuse(holder)
                time.sleep(0.1)
            return f"its process {holder.get('pid')} is gone"
        same_job = self.job[0] is not None and holder.get("slurm_job_id") == self.job[0]
        if same_job and self.job[1] > int(holder.get("slurm_restart_count") or 0):
            return f"its Slurm job {self.job[0]} was queued anew, and this is that job"
        return self._listen(holder, modified, _STALE_SAME_JOB_S if same_job else _STALE_S)

    def _listen(self, holder: dict[str, Any], modified: float, stale: float) -> str | None:
        """Whether a holder on another machine renews its file; by the file server's clock, and then by ours."""
        left = stale - (self._server_time() - modified)
        if left > 0:
            self.say(f"run.lock is held by {_who(holder)}: looking for up to {left:.0f} s whether it still lives")
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(min(1.0, max(end - time.monotonic(), 0.01)))
            now = self._read()
            if now is None or now[0].get("id") != holder.get("id"):
                return None
            if now[1] != modified:
                self._refuse(holder)
        return f"no sign of life for {stale:.0f} s"

    def _refuse(self, holder: dict[str, Any]) -> None:
        raise UserError(
            f"{self.run_dir} is in use by another run: {_who(holder)}, since {holder.get('started')}, started as "
            f"`{holder.get('command')}`. Wait until it ends, end it, or choose another run_dir=..."
        )

    def _take_away(self, holder: dict[str, Any]) -> bool:
        """Remove a dead run's file, unless someone else did and put his own there."""
        aside = self.path.with_name(f"{LOCK}.{uuid4().hex}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return False
        ours = bool(_parse(aside.read_text(encoding="utf-8", errors="replace")).get("id") == holder.get("id"))
        if not ours:
            with suppress(OSError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)
        return ours

    def _server_time(self) -> float:
        probe = self.path.with_name(f"{LOCK}.{uuid4().hex}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._end.wait(_BEAT_S):
            with suppress(OSError):
                holder = self._read()
                if holder is not None and self._mine is not None and holder[0].get("id") == self._mine["id"]:
                    os.utime(self.path)


def _parse(text: str) -> dict[str, Any]:
    """What the file says; ``{}`` if it is damaged."""
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _create_exclusive(path: Path, data: bytes) -> bool:
    """For file systems without links; a reader may see the file before it is whole."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with open(fd, "wb") as f:
        f.write(data)
    return True


def _describe(job: tuple[str | None, int]) -> dict[str, Any]:
    """This process, so that another can tell whether it still runs."""
    return {
        "id": uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "slurm_job_id": job[0],
        "slurm_restart_count": job[1],
        "command": " ".join(map(shlex.quote, sys.argv))[:2000],
        "process_start": _process_start(os.getpid()),
        "boot_id": _boot_id(),
        "pid_namespace": _pid_namespace(),
    }


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "unknown: the file is damaged"
    job = f", Slurm job {holder['slurm_job_id']}" if holder.get("slurm_job_id") else ""
    return f"host {holder.get('host')}, process {holder.get('pid')}{job}"


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the very process still runs on this machine."""
    try:
        pid = int(holder["pid"])
    except (KeyError, TypeError, ValueError):
        return False
    start = _process_start(pid)
    return start is not None and start == holder.get("process_start")


def _process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None: there is none that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    state, start = fields[0], int(fields[19])
    return None if state in "ZXx" else start  # a zombie has only its entry left


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return None


def _pid_namespace() -> int | None:
    """Containers on one machine number their processes each for itself."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None
