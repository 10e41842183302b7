"""The first stage: a data set in its memory-mapped form, read by rank 0, opened by all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from xmcdist.checkpoint.atomic import no_space_is_clear, to_disk
from xmcdist.checkpoint.checksums import files_to_disk
from xmcdist.config.schema import RunConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.data.errors import DataError
from xmcdist.data.manifest import MANIFEST, read_manifest, whole
from xmcdist.data.prepare import prepare
from xmcdist.parallel.collectives import broadcast_object
from xmcdist.parallel.errors import errors_together
from xmcdist.parallel.launch import World
from xmcdist.parallel.visible import wait_for

__all__ = ["prepare_data", "prepared_folder"]


def prepared_folder(cfg: RunConfig) -> Path:
    """Where the prepared form of a run's data set lies."""
    return Path(cfg.dataset.prepared) if cfg.dataset.prepared else Path(cfg.run_dir) / "prepared"


def prepare_data(
    cfg: RunConfig,
    world: World,
    say: Callable[[str], None],
    make: Callable[[Path], PreparedDataset] | None = None,
) -> PreparedDataset:
    """Read and check the data set, or open what was prepared before; collective.

    Args:
        say: told what a person should know of the data, on rank 0.
        make: writes the prepared form to the folder it is given, or opens it; None: from
            ``cfg.dataset``.

    With ``checkpoint.verify=full`` every file of it is compared with its checksum; damaged, it
    is put aside as ``<folder>.damaged`` and prepared again.

    Raises:
        UserError: on every rank: a fault of the data, with file and line, or a node does not
            see the prepared form.
    """
    folder, mark = prepared_folder(cfg), ""
    make = make or partial(prepare, cfg.dataset)
    with errors_together(), no_space_is_clear(folder):
        if world.is_main:
            data = make(folder)
            if cfg.checkpoint.verify == "full":
                data = _verified(data, make, folder, say)
            mark = data.fingerprint
            files_to_disk(folder)
            to_disk(folder.parent)
            for warning in data.warnings:
                say(f"note: {warning}")
    mark = broadcast_object(mark)
    with errors_together():
        wait_for(folder / MANIFEST, ready=lambda: _is_seen(folder, mark))
        data = PreparedDataset.open(folder)
    return data


def _verified(
    data: PreparedDataset, make: Callable[[Path], PreparedDataset], folder: Path, say: Callable[[str], None]
) -> PreparedDataset:
    try:
        data.verify()
        return data
    except DataError as error:
        aside = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        folder.replace(aside)
        to_disk(folder.parent)
        say(f"prepared data: {error}; kept as {aside}, and prepared again")
    return make(folder)


def _is_seen(folder: Path, mark: str) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and manifest.get("fingerprint") == mark and whole(folder, manifest) is None
