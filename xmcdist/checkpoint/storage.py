"""Where torch.distributed.checkpoint puts tensors: safetensors files and a JSON index, without a pickle.

torch plans who writes and reads which part of which tensor; here the parts become files.
A folder holds ``rank-<r>.safetensors``, the parts rank r wrote by tensor name, and
``index.json``: dtype, shape and parts (offset, shape, file, CRC-32) of every tensor, and the
CRC-32 of every file's header.  The checksum of a part is that of the memory it was written from.

Why not torch's own storages (2.13, 400 MB a rank, *measured* on 2 cores): `FileSystemWriter`
is fast, but leaves a pickle, and its reader loads whole parts: of what one process wrote,
every one of eight would read all.  `HuggingFaceStorageWriter` makes two copies of the file in
memory first and holds the interpreter for 1.2 s, in which no training step begins.
safetensors' `save_file` (0.8; older ones copy) streams: 0.01 s, no copy; its reader takes slices.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from xmcdist.checkpoint.atomic import no_space_is_clear, read_json, to_disk, write_json
from xmcdist.checkpoint.checksums import DamagedError, crc32_of
from xmcdist.config.errors import UserError

__all__ = ["INDEX", "SafetensorsReader", "SafetensorsWriter", "verify_share"]

INDEX = "index.json"


class SafetensorsWriter(StorageWriter):
    """Writes this rank's part of a checkpoint; the coordinator adds the index when all parts are on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index_crc32 = 0  # of the index; the coordinator's is set when it is written

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All ranks write alike."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank its file."""
        return [replace(p, storage_data=f"rank-{r:05d}.safetensors") for r, p in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's parts, fsync'd; parts without an element leave nothing.

        Raises:
            UserError: no space is left.
        """
        name: str = plan.storage_data
        parts: dict[str, torch.Tensor] = {}
        written: list[tuple[MetadataIndex, int, int]] = []
        header = 0
        for item in plan.items:
            part = planner.resolve_data(item)
            assert isinstance(part, torch.Tensor)
            if part.numel():
                parts[item.index.fqn] = part = part.detach().contiguous()
                written.append((item.index, part.nbytes, zlib.crc32(part.reshape(-1).view(torch.uint8).numpy().data)))
        if parts:
            path = self.folder / name
            self.folder.mkdir(parents=True, exist_ok=True)  # another node may not see it yet
            with no_space_is_clear(path):
                _save_file(parts, path)
                to_disk(path)
                header = crc32_of(path, 0, _end_of_header(path))
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index, size, (name, crc, header)) for index, size, crc in written])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index."""
        files = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for part in results for r in part}
        index: dict[str, Any] = {}
        headers: dict[str, int] = {}
        for name, tensor in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(tensor, TensorStorageMetadata)
            parts = [
                {"offset": list(c.offsets), "shape": list(c.sizes), "file": file, "crc32": crc}
                for c in tensor.chunks
                if math.prod(c.sizes)
                for file, crc, _ in [files[name, tuple(c.offsets)]]
            ]
            headers |= {file: header for file, _, header in (files[name, tuple(c["offset"])] for c in parts)}
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            index[name] = {"dtype": dtype, "shape": list(tensor.size), "parts": parts}
        self.index_crc32 = write_json(self.folder / INDEX, {"tensors": index, "headers": headers})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any folder."""
        return True


def _end_of_header(path: Path) -> int:
    with open(path, "rb") as f:
        return 8 + int.from_bytes(f.read(8), "little")


def _save_file(parts: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(parts, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))  # all that is left of the system's answer
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


class SafetensorsReader(StorageReader):
    """Reads the parts a rank needs: of each file only the slices, so never a whole tensor for some rows."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            UserError: it is missing or damaged.
        """
        self.folder = folder
        self._files: dict[tuple[str, tuple[int, ...]], str] = {}
        self._metadata = Metadata(state_dict_metadata={})
        index = read_json(folder / INDEX)
        try:
            for name, tensor in index["tensors"].items():
                self._add(name, tensor)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} is damaged ({error!r})") from error

    def _add(self, name: str, tensor: dict[str, Any]) -> None:
        chunks = []
        for part in tensor["parts"]:
            chunks.append(ChunkStorageMetadata(torch.Size(part["offset"]), torch.Size(part["shape"])))
            self._files[name, tuple(part["offset"])] = part["file"]
        properties = TensorProperties(dtype=getattr(torch, tensor["dtype"]))
        self._metadata.state_dict_metadata[name] = TensorStorageMetadata(
            properties, torch.Size(tensor["shape"]), chunks
        )

    def tensors(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every tensor there is, by name."""
        found = self._metadata.state_dict_metadata.items()
        return {n: (t.size, t.properties.dtype) for n, t in found if isinstance(t, TensorStorageMetadata)}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader is of one folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the index says."""
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All ranks read alike."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the planned slices to where they belong.

        Raises:
            UserError: a file is missing or damaged; names it and a tensor in it.
        """
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            index = item.storage_index
            by_file.setdefault(self._files[index.fqn, tuple(index.offset or ())], []).append(item)
        for name, items in by_file.items():
            fqn = items[0].storage_index.fqn
            try:
                with safe_open(self.folder / name, framework="pt") as f:
                    for item in items:
                        fqn = item.storage_index.fqn
                        ranges = zip(item.storage_offsets, item.lengths, strict=True)
                        part = f.get_slice(fqn)[tuple(slice(a, a + n) for a, n in ranges)]
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(part)
                        planner.commit_tensor(item, target)
            except FileNotFoundError:
                raise UserError(f"{self.folder / name} is missing, with {fqn} in it") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / name} is damaged at {fqn} ({error})") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any folder."""
        return True


def verify_share(folder: Path, share: int, shares: int) -> None:
    """Compare one of several shares of a checkpoint's parts with their checksums; together they are all of it.

    Args:
        share: whose turn it is; parts are dealt out by size.

    Raises:
        DamagedError: names the file and the tensor.

    Cost: reads the bytes of the share, in pieces.
    """
    load = [0] * shares
    mine: dict[str, list[tuple[str, int]]] = {}
    parts, headers = _parts(folder)
    for nbytes, file, fqn, crc in sorted(parts, reverse=True):
        to = load.index(min(load))
        load[to] += nbytes
        if to == share:
            mine.setdefault(file, []).append((fqn, crc))
    for file, of_it in mine.items():
        _verify_file(folder / file, of_it, headers[file])


def _parts(folder: Path) -> tuple[list[tuple[int, str, str, int]], dict[str, int]]:
    """(elements, file, tensor, CRC-32) of every part, and the CRC-32 of the files' headers."""
    index = read_json(folder / INDEX)
    try:
        parts = [
            (math.prod(part["shape"]), part["file"], name, part["crc32"])
            for name, tensor in index["tensors"].items()
            for part in tensor["parts"]
        ]
        return parts, {file: index["headers"][file] for _, file, _, _ in parts}
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / INDEX} is damaged ({error!r})") from error


def _verify_file(path: Path, parts: list[tuple[str, int]], header_crc: int) -> None:
    """Compare a file's header, and some (tensor, CRC-32) of it."""
    fqn = parts[0][0]
    try:
        end = _end_of_header(path)
        if end > path.stat().st_size or crc32_of(path, 0, end) != header_crc:
            raise DamagedError(f"{path} is damaged at its header, with {fqn} in it (its checksum differs)")
        with open(path, "rb") as f:
            header = json.loads(f.read(end)[8:])
        for fqn, crc in parts:
            start, stop = (end + int(n) for n in header[fqn]["data_offsets"])
            if crc32_of(path, start, stop) != crc:
                raise DamagedError(f"{path} is damaged at {fqn} (its checksum differs, or it is cut off)")
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing, with {fqn} in it") from None
    except OSError as error:
        raise DamagedError(f"{path} is damaged at {fqn} ({error})") from error
