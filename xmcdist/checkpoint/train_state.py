"""State inside a level: encoder by parameter name, label rows by global id, readable at any rank count.

A checkpoint is a folder ``step-<n>/``: ``encoder.safetensors`` and ``optimizer.safetensors``
from rank 0 (replicated under data parallelism), ``head-<start>-<stop>.safetensors`` from the
owner of these rows, ``state.json`` last.  It is written beside its place and renamed, and
the one before is deleted only then.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from xmcdist.checkpoint.atomic import no_space_is_clear, read_json, write_json
from xmcdist.config.errors import UserError
from xmcdist.parallel.collectives import broadcast_object
from xmcdist.parallel.launch import World

__all__ = ["latest", "load_state", "save_state"]


def save_state(
    folder: Path,
    *,
    step: int,
    encoder: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    head: dict[str, Tensor],
    rows: tuple[int, int],
    extra: dict[str, Any],
    world: World,
) -> None:
    """Write one checkpoint; collective.

    Args:
        folder: of the level's checkpoints.
        step: optimizer steps taken.
        encoder: parameters by name (equal on all ranks; rank 0 writes).
        optimizer: its tensors by ``<parameter>.<moment>``; rank 0 writes.
        head: this rank's rows, every tensor ``[rows owned, ...]``.
        rows: half-open range of global row ids that ``head`` holds.
        extra: plain values.
    """
    partial, place = folder / f"step-{step}.partial", folder / f"step-{step}"
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    with no_space_is_clear(partial):
        save_file(_plain(head), partial / f"head-{rows[0]}-{rows[1]}.safetensors")
        if world.is_main:
            save_file(_plain(encoder), partial / "encoder.safetensors")
            save_file(_plain(optimizer), partial / "optimizer.safetensors")
    world.barrier()
    if world.is_main:
        write_json(partial / "state.json", {"step": step, "extra": extra})
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
        for old in folder.glob("step-*"):
            if old != place:
                shutil.rmtree(old, ignore_errors=True)
    world.barrier()


def latest(folder: Path, world: World) -> Path | None:
    """The newest whole checkpoint, the same on every rank; None when there is none."""
    found: Path | None = None
    if world.is_main and folder.is_dir():
        whole = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / "state.json").exists()]
        found = max(whole, key=lambda p: int(p.name[5:]), default=None)
    return broadcast_object(found)


def load_state(place: Path, rows: tuple[int, int]) -> dict[str, Any]:
    """Read a checkpoint for a rank that owns ``rows``, whoever wrote them.

    Returns:
        ``{"step", "extra", "encoder", "optimizer", "head"}``; head tensors hold exactly ``rows``.

    Raises:
        UserError: a file is damaged, or rows are missing.
    """
    try:
        state: dict[str, Any] = read_json(place / "state.json")
        state["encoder"] = load_file(place / "encoder.safetensors")
        state["optimizer"] = load_file(place / "optimizer.safetensors")
        state["head"] = _rows(place, rows)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {place} is damaged ({error}): delete it to repeat the level") from error
    return state


def _rows(place: Path, rows: tuple[int, int]) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {}
    have = 0
    shards = sorted((tuple(map(int, p.stem.split("-")[1:])), p) for p in place.glob("head-*.safetensors"))
    for (start, stop), path in shards:
        first, last = max(start, rows[0]), min(stop, rows[1])
        if first >= last:
            continue
        have += last - first
        with safe_open(path, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 -- safe_open is no mapping
                pieces.setdefault(name, []).append(f.get_slice(name)[first - start : last - start])
    if have != rows[1] - rows[0]:
        raise UserError(f"checkpoint {place} holds {have} of the rows {rows[0]}..{rows[1]}: delete it")
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
