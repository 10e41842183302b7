"""What every stage of one training run shares."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import scipy.sparse as sp

from xmcdist.checkpoint.stages import StageStore
from xmcdist.config.schema import RunConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.observability.log import RunLog
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.parallel.shards import row_range

__all__ = ["Run", "shaping_settings"]

# Settings that say how a run is carried out, not what comes out of it: they may change
# between two starts of the same run.
_FREE = {
    "run_dir",
    "until",
    "ensemble",
    "only_members",
    "dataset.prepared",
    "engine.name",
    "engine.label_shards",
    "engine.deepspeed_config",
    "engine.micro_batch",
    "engine.threads",
    "engine.timeout_s",
    "engine.data_timeout_s",
    "optimizer.max_skipped_steps",
    "encoder.gradient_checkpointing",
    "matcher.scoring",
    "ranker.device",
}
_FREE_GROUPS = {"tracker", "checkpoint", "evaluation", "members"}


@dataclass
class Run:
    """One run: its settings, its place among the ranks and shards, its log, its stages, its data."""

    cfg: RunConfig
    world: World
    log: RunLog
    stages: StageStore
    data: PreparedDataset
    mesh: Mesh
    member: bool = False  # of an ensemble, which reads the scores that it leaves

    def own(self, rows: int) -> tuple[int, int]:
        """This rank's contiguous share of ``rows`` documents."""
        return row_range(rows, self.world.rank, self.world.world_size)

    def own_rows(self, A: sp.csr_matrix) -> sp.csr_matrix:
        """This rank's documents of a matrix ``[N, any]``."""
        start, stop = self.own(A.shape[0])
        return A[start:stop]

    def inputs(self, *groups: str, after: tuple[str, ...] = (), **values: Any) -> dict[str, Any]:
        """What a stage is made from: settings of some groups, earlier stages, single values."""
        settings = shaping_settings(self.cfg)
        chosen = {k: v for k, v in settings.items() if k.split(".")[0] in groups}
        return {
            "settings": chosen,
            "after": {name: self.stages.prints[name] for name in after},
            "data": self.data.fingerprint,
            **values,
        }


def shaping_settings(cfg: RunConfig) -> dict[str, Any]:
    """The settings that shape the result, flat: ``{"tree.nr_splits": 16, ...}``."""
    flat: dict[str, Any] = {}
    for group, value in asdict(cfg).items():
        if isinstance(value, dict):
            flat.update({f"{group}.{key}": v for key, v in value.items()})
        else:
            flat[group] = value
    if cfg.dataset.path != "???":
        flat["dataset.path"] = str(Path(cfg.dataset.path).resolve())
    return {k: v for k, v in flat.items() if k not in _FREE and k.split(".")[0] not in _FREE_GROUPS}
