"""State in the middle of a level: written by any number of ranks, read by any other, under any engine.

On torch.distributed.checkpoint (DCP): encoder and optimizer by parameter name, whole or as
FSDP2's DTensors; head rows and their moments as row-sharded DTensors, so that rows have
global ids.  A checkpoint is a folder ``step-<n>/`` with the tensors (`checkpoint.storage`:
safetensors, no pickle) and ``state.json``.  It is written beside its place, renamed when the
data of all ranks are on disk, and older ones go only after that.  Every byte of it that counts
is covered by a checksum: parts in the index, the index in ``state.json``, which is `sealed`.
What does not match is put aside as ``step-<n>.damaged``, and the one before is taken.

Letters: W ranks, R replicas of S shards, n rows of the level, d columns.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard

from xmcdist.checkpoint.atomic import replace_folder, to_disk, write_json
from xmcdist.checkpoint.checksums import DamagedError, crc32_of, read_sealed, sealed
from xmcdist.checkpoint.storage import INDEX, SafetensorsReader, SafetensorsWriter, verify_share
from xmcdist.config.errors import UserError
from xmcdist.parallel.collectives import broadcast_object, gather_objects
from xmcdist.parallel.errors import errors_together
from xmcdist.parallel.mesh import Mesh
from xmcdist.parallel.visible import wait_for
from xmcdist.parallel.watch import collective

__all__ = ["StateStore", "load_state"]

_FORMAT = 2


class StateStore:
    """The checkpoints of one level.

    Cost of `save` for the training loop: a copy to host memory, of this rank's head rows and
    FSDP2 shards and of 1/W of what all ranks hold alike, and a wait if the save before is
    still being written.  That much host memory is taken until it is on disk.  Encoding,
    fsync, the commit and the deletion of old ones happen on a thread, whose messages have a
    gloo group of their own: on the group that trains they would meet its collectives.
    """

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        *,
        keep: int = 2,
        asynchronous: bool = True,
        say: Callable[[str], None] = warnings.warn,
    ) -> None:
        """Make a store; nothing is written yet.

        Args:
            folder: of the level's checkpoints, seen by all ranks.
            mesh: who owns which head rows.
            keep: checkpoints kept, the newest; at least 1.
            asynchronous: write on a thread; else `save` returns when the checkpoint is in its place.
            say: told, on rank 0, of a damaged checkpoint.
        """
        self.folder, self.mesh, self.keep, self.asynchronous = folder, mesh, keep, asynchronous
        self.say = say
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        _no_warning_of_one_process()

    def save(
        self,
        *,
        step: int,
        encoder: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        head: Mapping[str, Tensor],
        num_rows: int,
        extra: dict[str, Any],
    ) -> None:
        """Write one checkpoint; collective.  What is passed may be changed once this returns.

        Args:
            step: optimizer steps taken.
            encoder: parameters by name, and copies as ``best.<name>``: tensors equal on all
                ranks, or DTensors.  Same names on all ranks; also of the next two.
            optimizer: its tensors as ``<parameter>.<moment>``, likewise.
            head: this rank's rows ``[rows owned, ...]`` of arrays ``[num_rows, ...]``.
            num_rows: n.
            extra: plain JSON values; those of rank 0 are kept.

        Raises:
            UserError: the save *before* this one failed (on every rank); nothing of this one
                is written then.
            ValueError: a head tensor does not hold the rows that this rank owns.
        """
        self.finish()
        tensors = self._copies({"encoder": encoder, "optimizer": optimizer})
        owned = len(self.mesh.label_shard(num_rows))
        for name, rows in head.items():
            if rows.ndim == 0 or rows.shape[0] != owned:
                raise ValueError(f"head tensor {name} is {list(rows.shape)}, and this rank owns {owned} rows")
            tensors[f"head.{name}"] = _of_rows(rows.detach(), num_rows, self.mesh).to("cpu", copy=True)
        state = {
            "format": _FORMAT,
            "step": step,
            "num_rows": num_rows,
            "world_size": self.mesh.world.world_size,
            "shards": self.mesh.shards,
            "extra": json.loads(json.dumps(extra)),  # a copy, and what is no JSON is refused here
        }
        if self._group is None and self.mesh.world.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        self._thread = threading.Thread(target=self._run, args=(tensors, state), name="xmcdist-checkpoint", daemon=True)
        self._thread.start()
        if not self.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, if any; collective.  Then it is in its place for every rank.

        Raises:
            UserError: it failed, on whichever rank; the checkpoints before it are whole.
            CollectiveError: a rank is gone.
        """
        if self._thread is None:
            return
        with collective("checkpoint", 0):
            self._thread.join()
            self._thread = None
            error, self._error = self._error, None
            if error is not None:
                raise error

    def latest(self) -> Path | None:
        """The newest checkpoint that is what was written, the same on every rank; None when there is none; collective.

        A damaged one is put aside (``step-<n>.damaged``, one of them is kept) and said.

        Raises:
            UserError: it cannot be read for another reason: a node does not see it.

        Cost: all ranks together read it once.
        """
        while True:
            newest = max(_whole(self.folder), key=_step, default=None) if self.mesh.world.is_main else None
            place = broadcast_object(newest)
            damage = None if place is None else self._damage(place)
            if place is None or damage is None:
                return place
            with errors_together():
                if self.mesh.world.is_main:
                    self._put_aside(place, damage)

    def _damage(self, place: Path) -> str | None:
        """What is wrong with a checkpoint, the same on every rank; each looks at a share of it; collective."""
        damage: str | None = None
        with errors_together():
            wait_for(place / "state.json")
            try:
                _read_state(place)
                world = self.mesh.world
                verify_share(place, world.rank, world.world_size)
            except (DamagedError, OSError) as error:
                damage = str(error)
        return next((text for text in gather_objects(damage) if text is not None), None)

    def _put_aside(self, place: Path, damage: str) -> None:
        for old in self.folder.glob("step-*.damaged"):
            shutil.rmtree(old, ignore_errors=True)
        aside = place.with_name(place.name + ".damaged")
        place.replace(aside)
        to_disk(self.folder)
        before = max(_whole(self.folder), key=_step, default=None)
        then = "the level begins anew" if before is None else f"going back to {before.name}"
        self.say(f"checkpoint {place.name}: {damage}; kept as {aside}; {then}")

    def _copies(self, kinds: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What this rank hands to DCP, copied: every DTensor, and its share of what all ranks hold alike."""
        everything = {f"{kind}.{name}": t.detach() for kind, tensors in kinds.items() for name, t in tensors.items()}
        load = [0] * self.mesh.world.world_size
        mine: dict[str, Tensor] = {}
        for name, t in sorted(everything.items(), key=lambda item: (-item[1].nbytes, item[0])):
            if not isinstance(t, DTensor):
                writer = load.index(min(load))
                load[writer] += t.nbytes
                if writer != self.mesh.world.rank:
                    continue
            mine[name] = t.to("cpu", copy=True)
        return mine

    def _run(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """On the thread.  An error waits for the next `save` or `finish`."""
        partial = self.folder / f"step-{state['step']}.partial"
        try:
            self._on_main(lambda: self._open(partial))
            try:
                writer = SafetensorsWriter(partial)
                save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            except CheckpointException as error:  # the same on all ranks; no Exception, for torch's reasons
                raise UserError(f"{_failure(error, 'nothing was written')}; {self._safe()}") from error
            self._on_main(lambda: self._commit(partial, {**state, "index_crc32": writer.index_crc32}))
        except UserError as error:  # on all ranks, and all have ended their part of it
            if self.mesh.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            self._error = UserError(str(error))  # whose frames do not hold the copies until it is raised
        except BaseException as error:
            self._error = error

    def _safe(self) -> str:
        return f"the checkpoints in {self.folder} before it are whole"

    def _on_main(self, body: Callable[[], None]) -> None:
        """Rank 0 does something; all ranks learn whether it could.

        These are torch's own collectives: ours count and report for the thread that trains.
        """
        fault: list[str | None] = [None]
        if self.mesh.world.is_main:
            try:
                body()
            except Exception as error:
                fault = [_sentence(error, "nothing was written")]
        if self._group is not None:
            dist.broadcast_object_list(fault, src=0, group=self._group)
        if fault[0] is not None:
            raise UserError(f"{fault[0]}; {self._safe()}")

    def _open(self, partial: Path) -> None:
        """Wipe what dead runs left, and make the folder."""
        if self.folder.is_dir():
            kept = set(_whole(self.folder))
            for stale in self.folder.glob("step-*"):
                if stale not in kept and stale.suffix != ".damaged":
                    shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)

    def _commit(self, partial: Path, state: dict[str, Any]) -> None:
        write_json(partial / "state.json", sealed(state))
        to_disk(partial)
        replace_folder(partial, self.folder / f"step-{state['step']}")
        for old in sorted(_whole(self.folder), key=_step)[: -self.keep]:
            with suppress(OSError):
                (old / "state.json").unlink()  # first, so that half of it is never taken for a checkpoint
            shutil.rmtree(old, ignore_errors=True)


def load_state(
    place: Path, mesh: Mesh, *, encoder_like: Mapping[str, Tensor], num_rows: int | None = None
) -> dict[str, Any]:
    """Read a checkpoint, whoever wrote it, for this rank under this mesh and engine; collective.

    Args:
        place: what `StateStore.latest` gave.
        mesh: who owns which head rows now.
        encoder_like: the parameters as they are now, by name; only shape and placement count.
        num_rows: rows that the head has now; None: not compared.

    Returns:
        ``{"step", "extra", "encoder", "optimizer", "head"}``.  Head tensors hold the rows that
        this rank owns.  Encoder tensors, their ``best.`` copies, and moments of a parameter's
        shape are DTensors where the parameter is one (its mesh, placement and device), else
        whole.  What is no DTensor is in host memory.

    Raises:
        UserError: on every rank: a file is missing or damaged, or the checkpoint is of another
            encoder or number of rows.

    Cost: reads from disk what it returns, no more; the head is nowhere whole unless one rank owns it.
    """
    fault: str | None = None
    result: dict[str, Any] = {}
    _no_warning_of_one_process()
    try:
        result = _load(place, mesh, encoder_like, num_rows)
    except CheckpointException as error:
        fault = _failure(error, "it cannot be read")
    except (UserError, OSError) as error:
        fault = str(error)
    first = next((text for text in gather_objects(fault) if text is not None), None)
    if first is not None:
        raise UserError(
            f"checkpoint {place}: {first}. Delete this folder to go on from the one before, or else from the "
            "level's beginning"
        )
    return result


def _load(place: Path, mesh: Mesh, encoder_like: Mapping[str, Tensor], num_rows: int | None) -> dict[str, Any]:
    state = _read_state(place)
    if num_rows not in (None, state["num_rows"]):
        raise UserError(f"it holds {state['num_rows']} head rows, and the level has {num_rows}: it is of another tree")
    reader = SafetensorsReader(place)
    found = reader.tensors()
    _check_encoder({n[8:]: shape for n, (shape, _) in found.items() if n.startswith("encoder.")}, encoder_like)
    targets: dict[str, Any] = {}
    for full, (shape, dtype) in found.items():
        kind, name = full.split(".", 1)
        if kind == "head":
            owned = len(mesh.label_shard(state["num_rows"]))
            rows = torch.empty((owned, *shape[1:]), dtype=dtype, device="meta")
            targets[full] = torch.empty_like(_of_rows(rows, state["num_rows"], mesh), device="cpu")
            continue
        like = _like(name if kind == "encoder" else name.rpartition(".")[0], encoder_like)
        if isinstance(like, DTensor) and like.shape == shape:
            targets[full] = torch.empty_like(like.detach(), dtype=dtype)
        else:
            targets[full] = torch.empty(shape, dtype=dtype)
    load(targets, storage_reader=reader, no_dist=True)  # every rank by itself: plans need no talk
    kinds: dict[str, dict[str, Tensor]] = {"encoder": {}, "optimizer": {}, "head": {}}
    for full, t in targets.items():
        kind, name = full.split(".", 1)
        kinds[kind][name] = t.to_local() if kind == "head" and isinstance(t, DTensor) else t
    return {"step": state["step"], "extra": state["extra"], **kinds}


def _read_state(place: Path) -> dict[str, Any]:
    """``state.json``, and whether the index is the one that it was written with."""
    state = read_sealed(place / "state.json")
    if state.get("format") != _FORMAT:
        raise DamagedError(f"{place / 'state.json'} is of another version of xmcdist (format {state.get('format')})")
    try:
        crc = crc32_of(place / INDEX)
    except FileNotFoundError:
        raise DamagedError(f"{place / INDEX} is missing") from None
    if crc != state["index_crc32"]:
        raise DamagedError(f"{place / INDEX} is damaged: its checksum differs")
    return state


def _check_encoder(saved: Mapping[str, torch.Size], like: Mapping[str, Tensor]) -> None:
    for name, shape in saved.items():
        now = _like(name, like)
        if now is None:
            raise UserError(f"its encoder has a tensor {name}, and this one has none: it is of another encoder")
        if now.shape != shape:
            raise UserError(
                f"encoder tensor {name} is {list(shape)}, and here {list(now.shape)}: it is of another encoder"
            )
    for name in like:
        if name not in saved:
            raise UserError(f"it has no encoder tensor {name}: it is of another encoder")


def _like(name: str, encoder_like: Mapping[str, Tensor]) -> Tensor | None:
    """The parameter that a tensor is a copy of."""
    return encoder_like.get(name, encoder_like.get(name.removeprefix("best.")))


def _of_rows(rows: Tensor, num_rows: int, mesh: Mesh) -> Tensor:
    """This rank's rows as part of ``[num_rows, ...]``; nothing is copied or sent."""
    if mesh.device_mesh is None:
        return rows
    shape = torch.Size((num_rows, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    rows = rows.contiguous()
    return DTensor.from_local(
        rows, mesh.device_mesh, [Replicate(), Shard(0)], run_check=False, shape=shape, stride=stride
    )


def _whole(folder: Path) -> list[Path]:
    """Committed checkpoints, in no order."""
    if not folder.is_dir():
        return []
    return [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / "state.json").exists()]


def _step(place: Path) -> int:
    return int(place.name[5:])


def _failure(error: CheckpointException, what: str) -> str:
    """The first rank's fault, in a sentence."""
    rank, (cause, _) = min(error.failures.items())
    text = _sentence(cause, what)
    return text if len(error.failures) == 1 and rank == 0 else f"rank {rank}: {text}"


def _sentence(cause: BaseException, what: str) -> str:
    return str(cause) if isinstance(cause, UserError) else f"{what} ({type(cause).__name__}: {cause})"


def _no_warning_of_one_process() -> None:
    """DCP warns that there is no process group; on one process, and where ranks read alone, that is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
