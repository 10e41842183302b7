"""The first stage: a data set in its memory-mapped form, read by rank 0, opened by all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from xmcdist.checkpoint.atomic import no_space_is_clear
from xmcdist.config.schema import RunConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.data.prepare import prepare
from xmcdist.parallel.launch import World

__all__ = ["prepare_data", "prepared_folder"]


def prepared_folder(cfg: RunConfig) -> Path:
    """Where the prepared form of a run's data set lies."""
    return Path(cfg.dataset.prepared) if cfg.dataset.prepared else Path(cfg.run_dir) / "prepared"


def prepare_data(cfg: RunConfig, world: World, say: Callable[[str], None]) -> PreparedDataset:
    """Read and check the data set, or open what was prepared before; collective.

    Raises:
        UserError: a fault of the data, with file and line.
    """
    folder = prepared_folder(cfg)
    if world.is_main:
        with no_space_is_clear(folder):
            prepare(cfg.dataset, folder)
    world.barrier()
    data = PreparedDataset.open(folder)
    if world.is_main:
        for warning in data.warnings:
            say(f"note: {warning}")
    return data
