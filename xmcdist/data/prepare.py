"""From the files people have to the prepared form: checked, streamed, whole or not at all."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xmcdist.config.schema import DatasetConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.data.errors import DataError, full_disk_is_clear
from xmcdist.data.labelled import check_labelled, write_labelled
from xmcdist.data.manifest import MANIFEST, build_manifest, read_manifest, whole, write_manifest
from xmcdist.data.source import FORMAT_VERSION, Source, locate
from xmcdist.data.text_folder import check_text_folder, write_text_folder
from xmcdist.data.written import Written
from xmcdist.data.xc import check_xc, write_xc

__all__ = ["check_source", "make_prepared", "prepare"]


def check_source(cfg: DatasetConfig) -> Source:
    """Everything about ``dataset.path`` that can be told in a moment.

    Raises:
        DataError: no such path, unknown format, a file missing, twice or empty, headers,
            shapes or columns that do not fit.
    """
    source = locate(cfg)
    for paths in source.files.values():
        for path in paths:
            if not path.stat().st_size:
                raise DataError(f"{path} is empty: it holds no documents or labels; fill it, or take it away")
    if source.format == "text":
        check_text_folder(source)
    elif source.format == "xc":
        check_xc(source)
    else:
        check_labelled(source, cfg)
    return source


def prepare(cfg: DatasetConfig, folder: Path | str) -> PreparedDataset:
    """Write the prepared form to ``folder``, or open it if it is there for the same source.

    It is written beside its place and put there at the end, so whatever goes wrong, what
    lay there stays and nothing unfinished remains.  One process does this for all ranks.

    Raises:
        DataError: the source is faulty, the disk is full, or ``folder`` is something else.

    Cost: reads the source twice (once for its checksum), or once when there is nothing to
    do; memory does not grow with the texts.
    """
    folder = Path(folder).absolute()
    source = check_source(cfg)
    about = {"fingerprint": source.fingerprint(cfg), "path": str(source.path), **source.settings(cfg)}
    return make_prepared(folder, cfg.name, about, lambda unfinished: _write(source, cfg, unfinished))


def make_prepared(folder: Path, name: str, about: dict[str, Any], write: Callable[[Path], Written]) -> PreparedDataset:
    """Open the prepared form in ``folder`` if it is of this source, else have it written.

    Args:
        about: of the source, with its ``fingerprint``.
        write: puts texts and matrices into the new folder it is given.

    Raises:
        DataError: as `prepare`, and what ``write`` raises.
    """
    fingerprint = str(about["fingerprint"])
    if _is_made(folder, fingerprint):
        return PreparedDataset.open(folder)
    _refuse_strange(folder)
    with full_disk_is_clear(folder), _beside(folder) as unfinished:
        manifest = build_manifest(unfinished, write(unfinished), name, about)
        write_manifest(unfinished, manifest)
        if not _is_made(folder, fingerprint):  # another job may have been faster
            _put(unfinished, folder)
    return PreparedDataset.open(folder)


def _write(source: Source, cfg: DatasetConfig, folder: Path) -> Written:
    writer = {"text": write_text_folder, "xc": write_xc}.get(source.format, write_labelled)
    return writer(source, cfg, folder)


def _is_made(folder: Path, fingerprint: str) -> bool:
    manifest = read_manifest(folder)
    return (
        manifest is not None
        and manifest.get("format_version") == FORMAT_VERSION
        and manifest.get("source", {}).get("fingerprint") == fingerprint
        and whole(folder, manifest) is None
    )


def _refuse_strange(folder: Path) -> None:
    """Never replace what is not ours."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"dataset.prepared={folder} is a file: give a folder that is new or empty")
    if any(folder.iterdir()) and read_manifest(folder) is None:
        raise DataError(
            f"dataset.prepared={folder} is a folder with other things in it (no {MANIFEST}): "
            "give one that is new or empty"
        )


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder on the same disk, gone at the end; those of killed runs on this machine go too."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.{socket.gethostname()}."
    for old in [*folder.parent.glob(f"{prefix}*.tmp"), *folder.parent.glob(f"{prefix}*.old")]:
        if not _runs(old.stem.removeprefix(prefix)):
            shutil.rmtree(old, ignore_errors=True)
    new = folder.parent / f"{prefix}{os.getpid()}.tmp"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _put(new: Path, folder: Path) -> None:
    """Move the finished folder to its place; an older one there is whole until then."""
    old = new.with_suffix(".old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
