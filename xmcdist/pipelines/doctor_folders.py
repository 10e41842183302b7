"""Is a run folder or a model folder whole?"""

from __future__ import annotations

import json
from pathlib import Path

from xmcdist.checkpoint.checksums import DamagedError, first_damage, read_sealed
from xmcdist.config.errors import UserError
from xmcdist.data.dataset import PreparedDataset
from xmcdist.data.manifest import MANIFEST

__all__ = ["model_checks", "run_checks"]

_Row = tuple[str, str, str, str]


def run_checks(run_dir: Path, verify: bool) -> list[_Row]:
    """(name, status, text, remedy) for the data and every stage of a run.

    Args:
        verify: read every byte and compare checksums; else sizes only.
    """
    if not run_dir.exists():
        return [("run folder", "ok", f"{run_dir} is not there yet: a run will make it", "")]
    if not run_dir.is_dir():
        return [("run folder", "fail", f"run_dir={run_dir} is a file", "Give a folder")]
    out: list[_Row] = []
    prepared = run_dir / "prepared"
    if (prepared / MANIFEST).exists():
        try:
            data = PreparedDataset.open(prepared)
            if verify:
                data.verify()
        except UserError as error:
            out.append(("data", "fail", str(error), ""))
    done, unfinished = 0, []
    for place in sorted((run_dir / "stages").glob("*")) if (run_dir / "stages").is_dir() else []:
        if place.suffix == ".partial":
            unfinished.append(place.stem)
        elif (place / "stage.json").exists():
            done += 1
            damage = _stage_damage(place, verify)
            if damage is not None:
                remedy = "Start the run again: it repeats what is damaged"
                out.append(("stage", "fail", f"{place.name}: {damage}", remedy))
    out.append(("run folder", "ok", _state(run_dir, done, unfinished), ""))
    return out


def _stage_damage(place: Path, verify: bool) -> str | None:
    try:
        stage = read_sealed(place / "stage.json")
    except DamagedError as error:
        return str(error)
    return first_damage(place, stage.get("files", {}), contents=verify)


def _state(run_dir: Path, done: int, unfinished: list[str]) -> str:
    told = f"{run_dir}: {done} stages done"
    if unfinished:
        told += f", {', '.join(unfinished)} begun"
    if (run_dir / "results.json").exists():
        told += ", finished"
    preempted = run_dir / "preempted.json"
    if preempted.exists():
        try:
            mark = json.loads(preempted.read_text(encoding="utf-8"))
            told += f", stopped by {mark.get('signal')} in {mark.get('stage')}"
        except (OSError, ValueError, AttributeError):
            told += ", stopped by a signal"
    return told


def model_checks(folder: Path, verify: bool) -> list[_Row]:
    """Whether a model folder can be opened, and with ``verify`` whether every file is what was written."""
    from xmcdist.inference.ensemble import open_model

    try:
        open_model(folder, verify=verify)
    except UserError as error:
        return [("model", "fail", str(error), "" if verify else "verify=true reads every byte")]
    how = "every byte compared with its checksum" if verify else "sizes and types; verify=true reads every byte"
    return [("model", "ok", f"{folder} can be opened ({how})", "")]
