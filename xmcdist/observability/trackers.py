"""Weights & Biases, TensorBoard and Trackio behind one interface, fed from the rows of metrics.jsonl.

Only rank 0 has trackers.  Each is written beside metrics.jsonl and never instead of it, so a
run without any can be given to one afterwards (`tell` with the rows of the file).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from xmcdist.config.checks import TRACKERS
from xmcdist.config.errors import UserError
from xmcdist.config.schema import TrackerConfig
from xmcdist.observability.curve import series_of

__all__ = ["TRACKERS", "Tracker", "check_trackers", "open_tracker", "tell"]

_INSTALL = {"wandb": "wandb", "tensorboard": "xmcdist[tensorboard]", "trackio": "xmcdist[trackio]"}
_PLACE = ("time", "global_step", "level", "step", "total", "stage", "histogram")


class Tracker(Protocol):
    """Takes what a row holds, in the dashboard's own forms.

    Attributes:
        name: as in ``tracker.use``.
        lacks_after: ``global_step`` after which it may hold nothing, though metrics.jsonl does; -1:
            it is new to this run; None: it holds all that it was given.
        note: what a person should know of how it started.
    """

    name: str
    note: str | None

    @property
    def lacks_after(self) -> int | None: ...

    def points(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each of some curves over ``global_step``."""

    def facts(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers that a run has one of, such as a stage's seconds or P@1 in the end."""

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with the same keys."""

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """``counts`` ``[n]`` between ``edges`` ``[n + 1]``."""

    def close(self, failed: bool = False) -> None:
        """Write what is left and let go."""


def check_trackers(cfg: TrackerConfig) -> None:
    """Refuse what cannot work, before anything runs.

    Raises:
        UserError: a tracker is not installed, or wandb is to send and has no key.
    """
    missing = [name for name in cfg.use if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join(f"'{_INSTALL[name]}'" for name in missing)
        raise UserError(
            f"tracker.use={cfg.use}: {', '.join(missing)} is not installed here: run pip install {wanted}, or leave it "
            "out (metrics.jsonl is always written, and xmcdist board shows it afterwards)"
        )
    if "wandb" in cfg.use and cfg.mode == "online":
        from xmcdist.observability.wandb_tracker import check_key

        check_key()


def open_tracker(name: str, cfg: TrackerConfig, run_dir: Path, config: dict[str, Any]) -> Tracker:
    """Start one tracker; a run folder that was tracked before goes on in the same run of it.

    Args:
        name: of `TRACKERS`.
        cfg: project, names, mode.
        run_dir: where its files and its id go.
        config: the settings of the run, nested, to show beside the curves.
    """
    if name == "wandb":
        from xmcdist.observability.wandb_tracker import WandbTracker

        return WandbTracker(cfg, run_dir, config)
    if name == "tensorboard":
        from xmcdist.observability.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker(run_dir / "tensorboard", config)
    from xmcdist.observability.trackio_tracker import TrackioTracker

    return TrackioTracker(run_dir / "trackio", cfg.project, cfg.run_name or run_dir.resolve().name, config)


def tell(tracker: Tracker, row: Mapping[str, Any], step: int) -> None:
    """Give one row of metrics.jsonl to a tracker, under the names that dashboards group by.

    ==========================  ===============================================
    row has                     becomes
    ==========================  ===============================================
    ``loss``                    ``train/loss``, .., and ``loss/level-<t>``
    ``validation_x``            ``validation/x``
    ``beam_recall``             ``train/level_beam_recall``, and tables
    ``stage``                   facts ``stages/<stage>/<name>``: ``stages/tree/seconds``
    ``histogram``               a histogram ``shapes/<name>``
    nested numbers              facts ``<key>/<name>``: ``test/P@1``
    ==========================  ===============================================

    Dashboards sort groups by name, so that losses come first.

    Args:
        step: x of rows that have no ``global_step``.
    """
    at, level, stage = int(row.get("global_step", step)), row.get("level"), row.get("stage")
    if "histogram" in row:
        tracker.histogram(at, f"shapes/{row['histogram']}", row["counts"], row["edges"])
        return
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            tracker.table(at, f"{key}/level-{level}", value)
        elif isinstance(value, dict):
            tracker.facts(at, {f"{key}/{name}": float(x) for name, x in value.items() if _is_number(x)})
    numbers = {key: float(x) for key, x in row.items() if key not in _PLACE and _is_number(x)}
    if not numbers:
        return
    if stage is not None:
        tracker.facts(at, {f"stages/{stage}/{key}": x for key, x in numbers.items()})
        return
    series = series_of(row)
    if series.startswith("validation_"):
        tracker.points(at, {"validation/" + key.removeprefix("validation_"): x for key, x in numbers.items()})
    elif "loss" in numbers:
        extra = {} if level is None else {"train/level": float(level), f"loss/level-{level}": numbers["loss"]}
        tracker.points(at, {f"train/{key}": x for key, x in numbers.items()} | extra)
    else:
        tracker.points(at, {f"train/level_{key}": x for key, x in numbers.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
