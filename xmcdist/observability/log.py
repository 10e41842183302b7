"""What a run says: rank 0 alone, to the terminal, ``run.log`` and ``metrics.jsonl``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from xmcdist.observability.curve import MetricsFile, read_rows
from xmcdist.observability.trackers import Tracker, tell
from xmcdist.parallel.launch import World

__all__ = ["RunLog"]


class RunLog:
    """Says lines and keeps metrics; silent on every rank but 0, except for warnings."""

    def __init__(self, run_dir: Path | None, world: World) -> None:
        self.run_dir, self.quiet = run_dir, not world.is_main
        self.who = f"rank {world.rank}: " if world.world_size > 1 else ""
        self.trackers: list[Tracker] = []
        self._curve = None if run_dir is None else MetricsFile(run_dir / "metrics.jsonl")
        self._full = self._log_full = self._repeats = False

    def say(self, text: str) -> None:
        """One line for a person."""
        if self.quiet:
            return
        line = f"{time.strftime('%H:%M:%S')} {text}"
        _to_terminal(line)
        self._append("run.log", line)

    def warn(self, text: str) -> None:
        """One line that a person must see, from whichever rank it concerns; rank 0's are also in ``run.log``."""
        line = f"{time.strftime('%H:%M:%S')} warning: {self.who}{text}"
        _to_terminal(line)
        if not self.quiet:
            self._append("run.log", line)

    def metrics(self, values: dict[str, Any], *, once: bool = False) -> None:
        """One row of metrics.jsonl, and of the trackers; what stands there from before a restart is not repeated.

        Args:
            values: numbers as they are; ``global_step`` places a row on the axis of the run.
            once: the run has one such row (see `MetricsFile.append`).
        """
        if self.quiet or self._curve is None or not self._curve.path.parent.is_dir():
            return
        row = {"time": round(time.time(), 3), **values}
        try:
            if not self._curve.append(row, once=once):
                self._tell_repeats(values)
                return
        except OSError as error:
            if not self._full:
                self.warn(f"{self._curve.path} cannot be written, so rows of it are missing: {error.strerror or error}")
            self._full = True
        self._to_trackers(lambda tracker, step: tell(tracker, row, step))

    def histogram(self, name: str, counts: Sequence[int], edges: Sequence[float], **place: Any) -> None:
        """A row with ``counts`` ``[n]`` between ``edges`` ``[n + 1]``, once a run."""
        self.metrics({**place, "histogram": name, "edges": list(edges), "counts": list(counts)}, once=True)

    def track(self, open_one: Callable[[], Tracker], name: str) -> None:
        """Add a tracker; one that lacks rows of before is first given them.

        One that cannot be opened is told and left out, as one that fails later is: the run is
        worth more than its dashboard, and metrics.jsonl has everything.
        """
        if self.quiet or self._curve is None:
            return
        try:
            tracker = open_one()
        except Exception as error:
            self.warn(f"{name} does not start, so this run goes without it: {error}")
            return
        if tracker.note is not None:
            self.warn(tracker.note)
        self.trackers.append(tracker)
        if tracker.lacks_after is not None:
            step = 0
            for row in read_rows(self._curve.path):
                step = max(step, int(row.get("global_step", 0)))
                if row.get("global_step", step) <= tracker.lacks_after:
                    continue
                self._to_trackers(lambda t, _, row=row, step=step: tell(t, row, step), only=tracker)  # type: ignore[misc]

    def _to_trackers(self, call: Callable[[Tracker, int], None], only: Tracker | None = None) -> None:
        step = 0 if self._curve is None else self._curve.step
        for tracker in list(self.trackers) if only is None else [t for t in self.trackers if t is only]:
            try:
                call(tracker, step)
            except Exception as error:  # whatever a dashboard's client raises
                self.trackers.remove(tracker)
                self.warn(f"{tracker.name} failed and is given nothing more; the run goes on: {error}")
                with suppress(Exception):
                    tracker.close(failed=True)

    def _tell_repeats(self, values: dict[str, Any]) -> None:
        if "global_step" in values and not self._repeats and self._curve is not None:
            self._repeats = True
            self.say(f"metrics.jsonl goes on after step {self._curve.step} of the whole run, which it has already")

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

    def close(self, failed: bool = False) -> None:
        """Let go of the trackers.

        Args:
            failed: the run ends with an error, or is stopped to go on later.
        """
        self._to_trackers(lambda tracker, _: tracker.close(failed))
        self.trackers.clear()

    def _append(self, name: str, line: str) -> None:
        if self.run_dir is None or not self.run_dir.is_dir():
            return
        try:
            with open(self.run_dir / name, "a", encoding="utf-8") as f:
                f.write(line + "\n")
        except OSError as error:  # a full disk: what is said is no reason to end a run
            if not self._log_full:
                self._log_full = True
                self.warn(f"{self.run_dir / name} cannot be written, so lines of it are missing: {error.strerror}")


def _to_terminal(line: str) -> None:
    """Or to the file that stands for it, whose disk may be full."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass
