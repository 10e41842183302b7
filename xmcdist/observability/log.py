"""What a run says: rank 0 alone, to the terminal, ``run.log`` and ``metrics.jsonl``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from xmcdist.parallel.launch import World

__all__ = ["RunLog"]


class Tracker(Protocol):
    """Takes the metrics of a step beside metrics.jsonl."""

    def log(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Says lines and keeps metrics; silent on every rank but 0, except for warnings."""

    def __init__(self, run_dir: Path | None, world: World) -> None:
        self.run_dir, self.quiet = run_dir, not world.is_main
        self.who = f"rank {world.rank}: " if world.world_size > 1 else ""
        self.trackers: list[Tracker] = []

    def say(self, text: str) -> None:
        """One line for a person."""
        if self.quiet:
            return
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, file=sys.stderr, flush=True)
        self._append("run.log", line)

    def warn(self, text: str) -> None:
        """One line that a person must see, from whichever rank it concerns; rank 0's are also in ``run.log``."""
        line = f"{time.strftime('%H:%M:%S')} warning: {self.who}{text}"
        print(line, file=sys.stderr, flush=True)
        if not self.quiet:
            self._append("run.log", line)

    def metrics(self, values: dict[str, Any]) -> None:
        """One line for a program; numbers as they are."""
        if self.quiet:
            return
        stamped = {"time": round(time.time(), 3), **values}
        self._append("metrics.jsonl", json.dumps(stamped))
        for tracker in self.trackers:
            tracker.log(stamped)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Any]:
        """A bar on a terminal, nothing elsewhere; call the result with the units done."""
        if self.quiet or not sys.stderr.isatty() or total <= 1:
            yield lambda done: None
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task(what, total=total)
            yield lambda done: bars.update(bar, completed=done)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    def _append(self, name: str, line: str) -> None:
        if self.run_dir is not None and self.run_dir.is_dir():
            with open(self.run_dir / name, "a", encoding="utf-8") as f:
                f.write(line + "\n")
