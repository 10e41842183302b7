"""Weights & Biases, offline unless asked otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

from xmcdist.config.schema import TrackerConfig

__all__ = ["WandbTracker"]


class WandbTracker:
    """One W&B run a run folder: its id is kept there, so a resumed run goes on in the same curve."""

    def __init__(self, cfg: TrackerConfig, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        id_file = run_dir / "wandb-id"
        if not id_file.exists():
            id_file.write_text(uuid4().hex[:8])
        self.run = wandb.init(
            project=cfg.project,
            id=id_file.read_text().strip(),
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir),
            mode="online" if cfg.mode == "online" else "offline",
            config=config,
        )

    def log(self, values: dict[str, Any]) -> None:
        self.run.log(values)

    def close(self) -> None:
        self.run.finish()
