"""Trackio: a local dashboard over a SQLite file in the run folder, written by a process of its own.

Trackio reads its folder from the environment, once, when it is imported, and would ask the
HuggingFace hub who the user is.  A child process has that environment to itself: a run's
folder holds that run's database, several runs of one process do not meet, nothing goes over
the network, and a disk that hangs does not stop training.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TrackioTracker", "local_environment"]

_STALLED_S = 10.0  # the child takes nothing for so long: its disk hangs
_FINISH_S = 30.0


def local_environment(folder: Path) -> dict[str, str]:
    """The environment in which trackio keeps to a folder and off the network."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRACKIO_", "GRADIO_"))}
    return env | {"TRACKIO_DIR": str(folder.resolve()), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class TrackioTracker:
    """One Trackio run a run folder; a resumed run goes on under the same name."""

    name = "trackio"
    note: str | None = None

    def __init__(self, folder: Path, project: str, run_name: str, config: dict[str, Any]) -> None:
        """Start the writer.

        Args:
            folder: of the database; `xmcdist board` shows it.
        """
        self.lacks_after = None if folder.exists() else -1
        folder.mkdir(parents=True, exist_ok=True)
        env = local_environment(folder)
        package = str(Path(__file__).parents[2])  # where a checkout is run from without being installed
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [package, env.get("PYTHONPATH", "")]))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "xmcdist.observability.trackio_writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # it greets; what it warns of goes to our standard error
            env=env,
            start_new_session=True,  # Ctrl-C is for the run, which then closes the writer
        )
        if self._child.stdin is None:
            raise AssertionError("a pipe was asked for")
        self._pipe = self._child.stdin.fileno()
        os.set_blocking(self._pipe, False)
        self._send({"project": project, "run": run_name, "config": config})

    def points(self, step: int, values: Mapping[str, float]) -> None:
        self._send({"step": step, "values": dict(values)})

    def facts(self, step: int, values: Mapping[str, float]) -> None:
        self.points(step, values)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._send({"step": step, "table": name, "rows": [dict(row) for row in rows]})

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        self._send({"step": step, "histogram": name, "counts": list(counts), "edges": list(edges)})

    def close(self, failed: bool = False) -> None:
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            status = self._child.wait(_FINISH_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            raise OSError(f"its writer did not finish within {_FINISH_S:.0f} s") from None
        if status != 0:
            raise OSError(f"its writer ended with status {status}")

    def _send(self, message: dict[str, Any]) -> None:
        data = memoryview((json.dumps(message, default=str) + "\n").encode())
        deadline = time.monotonic() + _STALLED_S
        while data:
            ready = select.select([], [self._pipe], [], max(deadline - time.monotonic(), 0))[1]
            if not ready:
                raise OSError(f"its writer has taken nothing for {_STALLED_S:.0f} s")
            try:
                data = data[os.write(self._pipe, data) :]
            except BlockingIOError:
                time.sleep(0.01)
            except BrokenPipeError:
                raise OSError("its writer has ended; what it said is above") from None
