"""Stages: each arrow of the journey is done once, committed whole, and skipped when unchanged.

A stage is a folder ``stages/<name>/`` with its files and ``stage.json``: a fingerprint of
what it was made from.  While it runs it lives in ``stages/<name>.partial/``; the rename at
the end is the commit.  A killed run leaves a partial folder: with the same fingerprint the
stage may go on from state it saved there, with another it is wiped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xmcdist.checkpoint.atomic import no_space_is_clear, read_json, replace_folder, write_json
from xmcdist.config.errors import UserError
from xmcdist.parallel.collectives import broadcast_object
from xmcdist.parallel.launch import World

__all__ = ["StageStore", "fingerprint"]


def fingerprint(value: Any) -> str:
    """Sixteen hex digits of sha256 over the JSON of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class StageStore:
    """The stages of one run folder."""

    def __init__(self, run_dir: Path, world: World, say: Callable[[str], None]) -> None:
        self.run_dir, self.world, self.say = run_dir, world, say
        self.seconds: dict[str, float] = {}
        self.skipped: list[str] = []
        self.prints: dict[str, str] = {}

    def run(self, name: str, inputs: dict[str, Any], body: Callable[[Path], None]) -> Path:
        """Run a stage unless it is done already; collective.

        Args:
            name: also the folder's name.
            inputs: plain values that the result depends on: settings, and the fingerprints
                of the stages it reads (`prints`).  Not the number of processes.
            body: writes the stage's files into the folder it is given.  All ranks call it.

        Returns:
            The committed folder.
        """
        place = self.run_dir / "stages" / name
        mark = fingerprint({"stage": name, "inputs": inputs})
        self.prints[name] = mark
        done = broadcast_object(self._finished(place, mark) if self.world.is_main else None)
        if done is not None:
            self.seconds[name] = done
            self.skipped.append(name)
            self.say(f"{name}: done before, skipped")
            return place
        partial = place.with_name(name + ".partial")
        if self.world.is_main:
            self._open_partial(partial, mark)
        self.world.barrier()
        start = time.perf_counter()
        with no_space_is_clear(partial):
            body(partial)
        self.world.barrier()
        seconds = time.perf_counter() - start
        if self.world.is_main:
            (partial / "partial.json").unlink()
            shutil.rmtree(partial / "checkpoints", ignore_errors=True)
            write_json(
                partial / "stage.json", {"stage": name, "fingerprint": mark, "inputs": inputs, "seconds": seconds}
            )
            replace_folder(partial, place)
        self.world.barrier()
        self.seconds[name] = seconds
        self.say(f"{name}: {seconds:.1f} s")
        return place

    def check(self, config: dict[str, Any]) -> None:
        """Refuse a run folder of another configuration; writes nothing; collective.

        Args:
            config: flat ``{"group.key": value}`` of the settings that shape the result.

        Raises:
            UserError: the folder holds a run with other settings; the message shows each.
        """
        path = self.run_dir / "config.json"
        if self.world.is_main and path.exists():
            before = read_json(path)
            now = json.loads(json.dumps(config, default=str))
            changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
            if changed:
                rows = "\n".join(f"  {k}: there {before.get(k)!r}, asked {now.get(k)!r}" for k in changed)
                raise UserError(
                    f"{self.run_dir} holds a run with other settings:\n{rows}\n"
                    "Choose another run_dir=..., or delete that folder if it is not wanted any more."
                )
        self.world.barrier()

    def remember(self, config: dict[str, Any]) -> None:
        """Make the run folder this configuration's own, once its data proved sound; collective."""
        path = self.run_dir / "config.json"
        if self.world.is_main and not path.exists():
            self.run_dir.mkdir(parents=True, exist_ok=True)
            write_json(path, config)
        self.world.barrier()

    def _finished(self, place: Path, mark: str) -> float | None:
        if not (place / "stage.json").exists():
            old = place.with_name(place.name + ".old")
            if (old / "stage.json").exists() and not place.exists():
                old.replace(place)  # killed between the two renames of a commit
            else:
                return None
        stage = read_json(place / "stage.json")
        if stage["fingerprint"] != mark:
            self.say(f"{place.name}: its inputs changed, made again")
            return None
        return float(stage["seconds"])

    def _open_partial(self, partial: Path, mark: str) -> None:
        note = partial / "partial.json"
        if note.exists() and read_json(note) == {"fingerprint": mark}:
            self.say(f"{partial.stem}: going on where it was interrupted")
            return
        shutil.rmtree(partial, ignore_errors=True)
        with no_space_is_clear(partial):
            partial.mkdir(parents=True)
            write_json(note, {"fingerprint": mark})
