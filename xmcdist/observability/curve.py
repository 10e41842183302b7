"""metrics.jsonl: one JSON object a line, on one strictly increasing axis through every restart.

A killed run goes on from a checkpoint, so it repeats steps that it has told of already.
What stands in the file is not written again, and a line that a kill cut short is mended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["MetricsFile", "read_rows", "series_of"]

_PLACE = ("time", "global_step", "level", "step", "total", "stage")  # where a row belongs, not what it measures


def series_of(row: Mapping[str, Any]) -> str:
    """The series a row goes on: its first measured key, such as ``loss`` or ``validation_beam_recall``."""
    return next((key for key in row if key not in _PLACE), "")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl, oldest first; lines that are none (a kill cut them) are left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


class MetricsFile:
    """Appends rows that are not there yet; reads what is there, once, at its first row.

    Rows with a ``global_step`` grow strictly in it, series by series (`series_of`).

    Cost: one pass over the file at the first row; then one small write a row.
    """

    def __init__(self, path: Path) -> None:
        """Touch nothing yet: the folder may turn out to be another run's."""
        self.path = path
        self.step = 0  # the largest global_step so far
        self.last: dict[str, int] = {}  # by series
        self._once: set[tuple[str, ...]] = set()
        self._open = False

    def append(self, row: Mapping[str, Any], *, once: bool = False) -> bool:
        """Write a row unless it stands there already.

        Args:
            row: numbers that are not finite are written as null, which JSON has.
            once: a row without ``global_step`` that a run has one of by series, stage, level and
                name of a histogram.

        Returns:
            Whether it was written.

        Raises:
            OSError: the disk is full or the folder is gone.
        """
        if not self._open:
            self._read()
        step = row.get("global_step")
        known = self.last.get(series_of(row), -1)
        if (step is not None and step <= known) or (once and _name(row) in self._once):
            return False
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        self._remember(row)
        return True

    def _read(self) -> None:
        self._open = True
        for row in read_rows(self.path):
            self._remember(row)
        _mend(self.path)

    def _remember(self, row: Mapping[str, Any]) -> None:
        step = row.get("global_step")
        if isinstance(step, int):
            self.last[series_of(row)] = max(step, self.last.get(series_of(row), -1))
            self.step = max(self.step, step)
        else:
            self._once.add(_name(row))


def _name(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (series_of(row), *(str(row.get(key)) for key in ("stage", "level", "histogram")))


def _mend(path: Path) -> None:
    """Cut off a last line that is not whole, or end it if only its line end is missing."""
    if not path.is_file():
        return
    with open(path, "r+b") as f:
        end, tail = f.seek(0, 2), b""
        at = end
        while at > 0 and b"\n" not in tail:
            at = max(at - 65536, 0)
            f.seek(at)
            tail = f.read(end - at)
        line = tail[tail.rfind(b"\n") + 1 :]
        if not line:
            return
        try:
            json.loads(line)
        except ValueError:
            f.truncate(end - len(line))
        else:
            f.seek(end)
            f.write(b"\n")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
