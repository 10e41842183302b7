"""Stages: each arrow of the journey is done once, committed whole, and skipped when unchanged.

A stage is a folder ``stages/<name>/`` with its files and ``stage.json``: a fingerprint of
what it was made from, and size and checksum of every file.  While it runs it lives in
``stages/<name>.partial/``.  The commit: all files are flushed to disk by every node, then
``stage.json`` is written, then the folder gets its name.  A killed run leaves a partial folder:
with the same fingerprint the stage may go on from state it saved there, with another it is
wiped.  A stage whose files were damaged afterwards is put aside and made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from xmcdist.checkpoint.atomic import link_tree, no_space_is_clear, read_json, replace_folder, to_disk, write_json
from xmcdist.checkpoint.checksums import DamagedError, files_to_disk, first_damage, read_sealed, record, sealed
from xmcdist.config.errors import UserError
from xmcdist.parallel.collectives import broadcast_object
from xmcdist.parallel.errors import errors_together
from xmcdist.parallel.launch import World
from xmcdist.parallel.visible import wait_for

__all__ = ["StageStore", "fingerprint"]

_STAGE, _NOTE, _CHECKPOINTS = "stage.json", "partial.json", "checkpoints"
_UNFINISHED = ("*.tmp", "*.part-*.npy", "part-[0-9][0-9][0-9][0-9][0-9]")


def fingerprint(value: Any) -> str:
    """Sixteen hex digits of sha256 over the JSON of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class StageStore:
    """The stages of one run folder."""

    def __init__(
        self,
        run_dir: Path,
        world: World,
        say: Callable[[str], None],
        *,
        verify: str = "sizes",
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a store; nothing is written yet.

        Args:
            run_dir: seen by all ranks.
            say: told what was done, skipped or damaged.
            verify: of a stage that was done before: ``sizes`` of its files are compared with
                those written, also their contents (``full``), or nothing (``off``).
            guard: called on rank 0 before a stage begins and before it is committed; raises a
                `UserError` if this run may not write any more.
        """
        self.run_dir, self.world, self.say, self.verify, self.guard = run_dir, world, say, verify, guard
        self.lenders: Sequence[Path] = ()  # other run folders: a stage done there from the same inputs is taken over
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
            The committed folder, seen whole by every node.

        Raises:
            UserError: the disk is full, a node does not see the files, or ``guard`` refuses.

        Cost: of a commit, an fsync a file and one reading of them, just written, for their
        checksums; of a skipped stage, a stat a file (``verify=full``: one reading).
        """
        place = self.run_dir / "stages" / name
        mark = fingerprint({"stage": name, "inputs": inputs})
        self.prints[name] = mark
        partial = place.with_name(name + ".partial")
        stage: dict[str, Any] | None = None
        with errors_together():
            if self.world.is_main:
                self.guard()
                stage = self._finished(place, partial, mark) or self._borrowed(place, mark)
                if stage is None:
                    self._open_partial(partial, mark)
        stage = broadcast_object(stage)
        if stage is not None:
            self._wait_until_seen(place, stage)
            self.seconds[name] = float(stage["seconds"])
            self.skipped.append(name)
            self.say(f"{name}: done before, skipped")
            return place
        start = time.perf_counter()
        with errors_together():
            wait_for(partial)
        with no_space_is_clear(partial):
            body(partial)
        self.world.barrier()  # one that still writes may rename what another has listed
        with errors_together(), no_space_is_clear(partial):
            if self.world.local_rank == 0:  # of each node: what its processes wrote
                files_to_disk(partial)
        stage = {"stage": name, "fingerprint": mark, "inputs": inputs, "id": uuid4().hex}
        with errors_together(), no_space_is_clear(partial):
            if self.world.is_main:
                self.guard()
                stage["files"] = record(partial, leave={_NOTE, _STAGE, _CHECKPOINTS})
                stage["seconds"] = time.perf_counter() - start
                write_json(partial / _STAGE, sealed(stage))
                _commit(partial, place)
        stage = broadcast_object(stage)
        self._wait_until_seen(place, stage)
        self.seconds[name] = stage["seconds"]
        self.say(f"{name}: {stage['seconds']:.1f} s")
        return place

    def check(self, config: dict[str, Any]) -> None:
        """Refuse a run folder of another configuration; writes nothing; collective.

        Args:
            config: flat ``{"group.key": value}`` of the settings that shape the result.

        Raises:
            UserError: the folder holds a run with other settings; the message shows each.
        """
        path = self.run_dir / "config.json"
        with errors_together():
            if self.world.is_main and path.exists():
                self._refuse_other_settings(read_json(path), json.loads(json.dumps(config, default=str)))

    def remember(self, config: dict[str, Any]) -> None:
        """Make the run folder this configuration's own, once its data proved sound; collective."""
        path = self.run_dir / "config.json"
        with errors_together(), no_space_is_clear(path):
            if self.world.is_main and not path.exists():
                self.run_dir.mkdir(parents=True, exist_ok=True)
                write_json(path, config)

    def _refuse_other_settings(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if changed:
            rows = "\n".join(f"  {k}: there {before.get(k)!r}, asked {now.get(k)!r}" for k in changed)
            raise UserError(
                f"{self.run_dir} holds a run with other settings:\n{rows}\n"
                "Choose another run_dir=..., or delete that folder if it is not wanted any more."
            )

    def _finished(self, place: Path, partial: Path, mark: str) -> dict[str, Any] | None:
        """What ``stage.json`` says of a stage that is done and whole; a damaged one is put aside."""
        with suppress(OSError):
            os.listdir(place.parent)  # NFS may remember that a stage of another node's was not there
        old = place.with_name(place.name + ".old")
        if _noted(partial, _STAGE, "fingerprint") == mark and self._damage(partial) is None:
            _commit(partial, place)  # killed within a commit
        elif (old / _STAGE).exists() and not place.exists():
            old.replace(place)  # killed between the two renames of one
        shutil.rmtree(old, ignore_errors=True)
        if not place.exists():
            return None
        if _noted(place, _STAGE, "fingerprint") not in (None, mark):
            self.say(f"{place.name}: its inputs changed, made again")
            return None
        damage = self._damage(place)
        if damage is not None:
            self._put_aside(place, damage)
            return None
        return _read_stage(place)

    def _borrowed(self, place: Path, mark: str) -> dict[str, Any] | None:
        """The same stage of another run, linked to its place here; its files are whole, as far as ``verify`` looks."""
        for run_dir in self.lenders:
            there = run_dir / "stages" / place.name
            if _noted(there, _STAGE, "fingerprint") != mark or self._damage(there) is not None:
                continue
            beside = place.with_name(place.name + ".borrowed")
            shutil.rmtree(beside, ignore_errors=True)
            with no_space_is_clear(beside):
                beside.parent.mkdir(parents=True, exist_ok=True)
                link_tree(there, beside)
                files_to_disk(beside)
                replace_folder(beside, place)
            shutil.rmtree(place.with_name(place.name + ".partial"), ignore_errors=True)
            self.say(f"{place.name}: made from the same as in {run_dir}, taken from there")
            return _read_stage(place)
        return None

    def _damage(self, place: Path) -> str | None:
        """What is wrong with a committed folder's files, as far as ``verify`` looks."""
        try:
            files = _read_stage(place)["files"]
        except DamagedError as error:
            return str(error)
        if self.verify == "off":
            return None
        return first_damage(place, files, contents=self.verify == "full")

    def _put_aside(self, place: Path, damage: str) -> None:
        aside = place.with_name(place.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        place.replace(aside)
        to_disk(place.parent)
        self.say(f"{place.name}: damaged since it was finished: {damage}; kept as {aside}, and made again")

    def _open_partial(self, partial: Path, mark: str) -> None:
        note = partial / _NOTE
        if _noted(partial, _NOTE, "fingerprint") == mark:
            (partial / _STAGE).unlink(missing_ok=True)  # of a commit that cannot be taken for one
            for pattern in _UNFINISHED:  # perhaps of more ranks than now
                for left in list(partial.rglob(pattern)):
                    left.unlink(missing_ok=True) if left.is_file() else shutil.rmtree(left, ignore_errors=True)
            self.say(f"{partial.stem}: going on where it was interrupted")
            return
        shutil.rmtree(partial, ignore_errors=True)
        with no_space_is_clear(partial):
            partial.mkdir(parents=True)
            write_json(note, {"fingerprint": mark})

    def _wait_until_seen(self, place: Path, stage: dict[str, Any]) -> None:
        """Until every node sees the files as they were committed; collective."""
        with errors_together():
            if self.world.local_rank == 0:
                wait_for(place / _STAGE, ready=lambda: _noted(place, _STAGE, "id") == stage.get("id"))
                for name, said in stage["files"].items():
                    if self.verify != "off":
                        wait_for(place / name, size=said["bytes"])


def _commit(partial: Path, place: Path) -> None:
    """Give a finished folder, on disk with its ``stage.json``, its name."""
    (partial / _NOTE).unlink(missing_ok=True)
    shutil.rmtree(partial / _CHECKPOINTS, ignore_errors=True)
    replace_folder(partial, place)


def _read_stage(place: Path) -> dict[str, Any]:
    """``stage.json``; of a version before checksums it is taken at its word.

    Raises:
        DamagedError: it is missing, or not what was written.
    """
    try:
        stage = read_json(place / _STAGE)
    except UserError as error:
        raise DamagedError(str(error)) from error
    if isinstance(stage, dict) and stage.keys() == {"stage", "fingerprint", "inputs", "seconds"}:
        return {**stage, "files": {}}
    return read_sealed(place / _STAGE)


def _noted(folder: Path, name: str, key: str) -> Any:
    """One value of a folder's note, None where there is none to read."""
    try:
        return read_json(folder / name).get(key)
    except (UserError, OSError, AttributeError):
        return None
