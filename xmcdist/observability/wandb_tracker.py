"""Weights & Biases, offline unless asked otherwise."""

from __future__ import annotations

import importlib
import netrc
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from xmcdist.config.errors import UserError
from xmcdist.config.schema import TrackerConfig

__all__ = ["WandbTracker", "check_key"]

_FINISH_S = 60.0  # a run that is pre-empted has minutes in all; what is left can be synced from its folder


def check_key() -> None:
    """Refuse to send without a key, where wandb itself would ask on the terminal or fail in the middle.

    Raises:
        UserError: neither ``WANDB_API_KEY`` nor an identity token nor a login in ~/.netrc.
    """
    # What wandb itself reads, in its order.
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if path.is_file() and netrc.netrc(path).authenticators(server):
                return
        except (netrc.NetrcParseError, OSError):
            continue
    raise UserError(
        f"tracker.mode=online: there is no Weights & Biases key for {server} on this machine: run wandb login, or set "
        "WANDB_API_KEY, or leave tracker.mode=offline and send the run later with wandb sync"
    )


class WandbTracker:
    """One W&B run a run folder: its id is kept there, so a resumed run goes on in the same curve.

    Offline, every start writes a folder ``wandb/offline-run-<time>-<id>`` of its own; they share
    the id, and ``wandb sync`` sends them in order of time into one run.

    wandb keeps rows in memory until there are many.  Where a kill took its process too, the next
    start gives it again what came after the last orderly end; a row that it has is the same row.
    """

    name = "wandb"

    def __init__(self, cfg: TrackerConfig, run_dir: Path, config: dict[str, Any]) -> None:
        """Start or go on; online without an answer of the server it goes offline and says so."""
        id_file = run_dir / "wandb-id"
        if not id_file.exists():
            id_file.write_text(uuid4().hex[:8])
        self._told, self._step = run_dir / "wandb-step", -1  # of the last orderly end
        self.lacks_after: int = int(self._told.read_text()) if self._told.exists() else -1
        self.note: str | None = None
        if cfg.mode == "online":
            try:
                self.run = _init(cfg, run_dir, config, id_file, "online")
            except _wandb().Error as error:
                self.note = (
                    f"wandb is offline, since its server does not answer; send the run later: wandb sync ({error})"
                )
        if cfg.mode != "online" or self.note is not None:
            self.run = _init(cfg, run_dir, config, id_file, "offline")
        # The axis of every curve. Its values are given as wandb's own step as well, so that a
        # resumed run's rows come after those of before.
        self.run.define_metric("global_step", hidden=True)
        self.run.define_metric("*", step_metric="global_step")

    def points(self, step: int, values: Mapping[str, float]) -> None:
        self._step = max(step, self._step)
        self.run.log({"global_step": step, **values}, step=step)

    def facts(self, step: int, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(rows[0])
        table = _wandb().Table(columns=columns, data=[[row.get(c) for c in columns] for row in rows])
        self.run.log({"global_step": step, name: table}, step=step)

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        shown = _wandb().Histogram(np_histogram=(list(counts), list(edges)))
        self.run.log({"global_step": step, name: shown}, step=step)

    def close(self, failed: bool = False) -> None:
        try:
            self.run.finish(exit_code=int(failed))
        except Exception:
            with suppress(Exception):  # its process is gone: it would say so again at exit, at length
                _wandb().teardown()
            raise
        self._told.write_text(str(max(self._step, self.lacks_after, 0)))


def _init(cfg: TrackerConfig, run_dir: Path, config: dict[str, Any], id_file: Path, mode: Any) -> Any:
    return _wandb().init(
        project=cfg.project,
        entity=cfg.entity,
        tags=list(cfg.tags) or None,
        name=cfg.run_name or run_dir.resolve().name,
        id=id_file.read_text().strip(),
        resume="allow" if mode == "online" else None,  # offline it would only warn
        dir=str(run_dir),
        mode=mode,
        config=config,
        settings=_wandb().Settings(finish_timeout=_FINISH_S, finish_timeout_raises=True),
    )


def _wandb() -> Any:
    """Imported where it is used, and not checked by types that change from release to release."""
    return importlib.import_module("wandb")
