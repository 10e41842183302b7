"""What ``metrics.jsonl`` tells, of a run of any length, finished or not, of this version or an older one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["StepMetrics", "read_steps"]

_HELD_OUT = "validation_"
_KEPT = 4000  # windows held at most; of more, every so many


@dataclass
class StepMetrics:
    """Training as curves need it.

    Attributes:
        windows: rows with ``loss``, each with ``global_step``, by rising step.
        starts: by level, the global step at which it begins.
        recall: by level, the share of true clusters that its finished beam holds.
        validation: by measure, such as ``beam_recall`` and ``P@1``: global steps and values, shares of 1,
            on held-out documents.
        seconds: of the stages that were told.
        last_time: seconds since 1970 of the last row, or None.
    """

    windows: list[dict[str, Any]] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)
    recall: dict[int, float] = field(default_factory=dict)
    validation: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    last_time: float | None = None

    def series(self, key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
        """Global steps and values of one key, of the windows that have it as a finite number."""
        some = [(w["global_step"], w[key] * scale) for w in self.windows if _finite(w.get(key))]
        return [a for a, _ in some], [b for _, b in some]


def read_steps(path: Path) -> StepMetrics:
    """Read the file line by line; what is torn or no object is passed over.

    Steps that were taken again after an interruption count once, as they were taken last.
    A row without ``global_step`` gets it from the levels before.

    Cost: O(rows) time; memory for some thousands of rows at most.
    """
    found = StepMetrics()
    count = sum(1 for row in _rows(path) if _is_window(row))
    stride = max(1, math.ceil(count / _KEPT))
    kept: dict[tuple[int, int], dict[str, Any]] = {}
    evaluations: dict[tuple[int, int], dict[str, float]] = {}
    seen, last_step = 0, dict[int, int]()
    for row in _rows(path):
        if _finite(row.get("time")):
            found.last_time = float(row["time"])
        if isinstance(row.get("stage"), str) and _finite(row.get("seconds")):
            found.seconds[row["stage"]] = float(row["seconds"])
        level = row.get("level")
        if not isinstance(level, int):
            continue
        if _is_window(row):
            seen += 1
            last_step[level] = int(row["step"])
            if seen % stride == 0 or row["step"] == row.get("total"):
                kept[level, int(row["step"])] = row
        elif _finite(row.get(f"{_HELD_OUT}beam_recall")):
            step = row["step"] if isinstance(row.get("step"), int) else last_step.get(level, 0)
            measured = {k.removeprefix(_HELD_OUT): v for k, v in row.items() if k.startswith(_HELD_OUT) and _finite(v)}
            evaluations[level, step] = measured
        elif _finite(row.get("beam_recall")):
            found.recall[level] = float(row["beam_recall"])
    before = 0
    for level in sorted(last_step):
        taken = [(step, row) for (t, step), row in sorted(kept.items()) if t == level and step <= last_step[level]]
        known = [row["global_step"] - step for step, row in taken if _finite(row.get("global_step"))]
        found.starts[level] = before = int(known[-1]) if known else before
        found.windows += [{**row, "global_step": before + step} for step, row in taken]
        for (t, step), measured in sorted(evaluations.items()):
            for name, value in measured.items() if t == level else ():
                steps, values = found.validation.setdefault(name, ([], []))
                steps.append(before + step)
                values.append(float(value))
        before += last_step[level]
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
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


def _is_window(row: dict[str, Any]) -> bool:
    return _finite(row.get("loss")) and isinstance(row.get("level"), int) and isinstance(row.get("step"), int)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
