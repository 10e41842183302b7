"""TensorBoard event files; every start adds one to the same folder, and TensorBoard joins them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["TensorBoardTracker"]


class TensorBoardTracker:
    """Scalars, histograms, and tables and settings as text."""

    name = "tensorboard"
    note: str | None = None

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """Open ``folder`` for one more event file."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        is_new = not any(folder.glob("events.*"))
        self.lacks_after = -1 if is_new else None
        writer: Any = SummaryWriter
        self._writer: Any = writer(str(folder))
        if is_new:
            self._writer.add_text("config", "```json\n" + json.dumps(config, indent=1, default=str) + "\n```", 0)
            for part in hparams(_flat(config), {"test/P@1": 0.0, "train/loss": 0.0}):  # type: ignore[no-untyped-call]
                self._writer.file_writer.add_summary(part)
        self._writer.flush()

    def points(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run's dashboard ends where its metrics.jsonl does

    def facts(self, step: int, values: Mapping[str, float]) -> None:
        self.points(step, values)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(rows[0])
        lines: list[list[Any]] = [columns, ["---"] * len(columns)]
        lines += [[row.get(c) for c in columns] for row in rows]
        text = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        self._writer.add_text(name, text, step)
        self._writer.flush()

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        self._writer.add_histogram_raw(
            name,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(sum(counts)),
            sum=float(sum(c * m for c, m in zip(counts, middles, strict=True))),
            sum_squares=float(sum(c * m * m for c, m in zip(counts, middles, strict=True))),
            bucket_limits=[float(edge) for edge in edges[1:]],
            bucket_counts=[int(c) for c in counts],
            global_step=step,
        )
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        self._writer.close()


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings as TensorBoard's HPARAMS takes them: ``{"tree.nr_splits": 16}``, others than numbers as text."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{above}{key}.")
        else:
            out[above + key] = value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
    return out


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text.replace("|", "\\|")
