"""Documents as token ids on disk: written once by all ranks, read memory-mapped by each.

Shard i holds documents ``i * docs_per_shard`` and on, whatever the number of ranks, as
``shard-<i>.tokens.npy`` int32 (the ids of all its documents, without padding) and
``shard-<i>.offsets.npy`` int64 (where each document begins).  ``lengths.npy`` int32 ``[N]``
and ``manifest.json`` are written last.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xmcdist.data.arrays import ArrayWriter, load_array
from xmcdist.data.errors import DataError, full_disk_is_clear
from xmcdist.data.manifest import MANIFEST, read_manifest, whole, write_manifest
from xmcdist.data.texts import TextStore
from xmcdist.parallel.launch import World
from xmcdist.parallel.visible import seen_by_all

__all__ = ["TokenShards", "write_tokens"]

TOKENS_VERSION = 1
_ENCODE_DOCS = 1024  # documents encoded, and held, at once


class TokenShards:
    """Token ids of N documents, memory-mapped.

    Attributes:
        lengths: tokens of every document, int32 ``[N]``, at least 1.
        fingerprint: of the texts and the tokenizer that they were made with.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.fingerprint = str(manifest["fingerprint"])
        self.pad_id = int(manifest["pad_id"])
        self.lengths: NDArray[np.int32] = load_array(folder / "lengths.npy", "int32")
        self._per_shard = int(manifest["docs_per_shard"])
        self._shards: dict[int, tuple[NDArray[np.int32], NDArray[np.int64]]] = {}
        if len(self.lengths) != manifest["documents"]:
            raise DataError(f"{folder / 'lengths.npy'} has {len(self.lengths)} documents, not {manifest['documents']}")

    @classmethod
    def open(cls, folder: Path | str) -> TokenShards:
        """Open finished shards.

        Raises:
            DataError: unfinished, of another version, or a file is missing or cut off.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None or manifest.get("tokens_version") != TOKENS_VERSION:
            raise DataError(f"{folder} holds no finished token shards of version {TOKENS_VERSION}: delete it")
        damaged = whole(folder, manifest)
        if damaged:
            raise DataError(f"{damaged} is missing or was cut off: delete {folder} to have it made again")
        return cls(folder, manifest)

    @property
    def num_docs(self) -> int:
        return len(self.lengths)

    def batch(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids and attention mask of some documents.

        Args:
            ids: document ids ``[b]``, any order, repeats allowed.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 ``[b, l]``, padded on the right to
            the longest of these documents.

        Raises:
            IndexError: an id is out of range.

        Cost: O(b * l).
        """
        wanted = np.asarray(ids, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.num_docs):
            raise IndexError(f"document ids {wanted.min()}..{wanted.max()} of {self.num_docs} documents")
        lengths = self.lengths[wanted]
        longest = int(lengths.max(initial=1))
        input_ids = np.full((len(wanted), longest), self.pad_id, dtype=np.int64)
        for row, (doc, length) in enumerate(zip(wanted.tolist(), lengths.tolist(), strict=True)):
            shard, at = divmod(doc, self._per_shard)
            tokens, offsets = self._shard(shard)
            begin = int(offsets[at])
            input_ids[row, :length] = tokens[begin : begin + length]
        mask = np.arange(longest)[None, :] < lengths[:, None]
        return input_ids, mask.astype(np.int64)

    def files(self, ids: ArrayLike) -> list[Path]:
        """Where the tokens of some documents lie."""
        shards = np.unique(np.asarray(ids, dtype=np.int64) // self._per_shard)
        return [_shard_paths(self.folder, int(shard))[0] for shard in shards]

    def _shard(self, shard: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        if shard not in self._shards:
            tokens, offsets = _shard_paths(self.folder, shard)
            self._shards[shard] = load_array(tokens, "int32"), load_array(offsets, "int64")
        return self._shards[shard]


def write_tokens(
    folder: Path | str,
    texts: TextStore,
    encode: Callable[[list[str]], list[list[int]]],
    *,
    pad_id: int,
    fingerprint: str,
    world: World,
    docs_per_shard: int = 50_000,
) -> TokenShards:
    """Encode all documents, each shard by the rank whose turn it is; every rank calls this.

    Finished shards with the same fingerprint are opened and nothing is written.

    Args:
        encode: texts to token ids, special tokens included, already cut to length.
        pad_id: also stands for a document that encodes to nothing, so that none is without tokens.
        fingerprint: names texts and tokenizer; other shards than those so named are replaced.

    Raises:
        DataError: the disk of a rank is full.
        RuntimeError: another rank failed.

    Cost: one pass over the texts; a thousand documents are in memory.
    """
    folder = Path(folder)
    if docs_per_shard < 1:
        raise ValueError(f"docs_per_shard={docs_per_shard} must be at least 1")
    wanted = {
        "tokens_version": TOKENS_VERSION,
        "fingerprint": fingerprint,
        "documents": len(texts),
        "docs_per_shard": docs_per_shard,
        "pad_id": pad_id,
    }
    if _agree(_is_made(folder, wanted) if world.is_main else None, world):
        return TokenShards.open(folder)
    _together(lambda: _clear(folder) if world.is_main else None, world)
    shards = -(-len(texts) // docs_per_shard)

    def write_mine() -> None:
        for shard in range(world.rank, shards, world.world_size):
            start = shard * docs_per_shard
            _write_shard(folder, shard, texts, start, min(start + docs_per_shard, len(texts)), encode, pad_id)

    _together(write_mine, world)
    seen_by_all(folder, world)
    _together(lambda: _finish(folder, shards, wanted) if world.is_main else None, world)
    seen_by_all(folder, world)
    return TokenShards.open(folder)


def _write_shard(
    folder: Path,
    shard: int,
    texts: TextStore,
    start: int,
    stop: int,
    encode: Callable[[list[str]], list[list[int]]],
    pad_id: int,
) -> None:
    tokens_path, offsets_path = _shard_paths(folder, shard)
    with (
        full_disk_is_clear(tokens_path),
        ArrayWriter(tokens_path, np.int32) as tokens,
        ArrayWriter(offsets_path, np.int64) as offsets,
    ):
        offsets.append([0])
        documents = texts.iterate(start, stop)
        while some := list(islice(documents, _ENCODE_DOCS)):
            rows = [row or [pad_id] for row in encode(some)]
            if len(rows) != len(some):
                raise ValueError(f"encode gave {len(rows)} rows for {len(some)} texts")
            ends = np.cumsum([len(row) for row in rows], dtype=np.int64) + tokens.length
            tokens.append(np.fromiter(chain.from_iterable(rows), np.int32, int(ends[-1]) - tokens.length))
            offsets.append(ends)


def _finish(folder: Path, shards: int, manifest: dict[str, Any]) -> None:
    """On rank 0, when every shard is written: all lengths in one file, then the manifest."""
    with full_disk_is_clear(folder), ArrayWriter(folder / "lengths.npy", np.int32) as lengths:
        for shard in range(shards):
            lengths.append(np.diff(load_array(_shard_paths(folder, shard)[1], "int64")))
    places = [p for shard in range(shards) for p in _shard_paths(folder, shard)]
    files = {p.name: {"bytes": p.stat().st_size} for p in [*places, folder / "lengths.npy"]}
    write_manifest(folder, {**manifest, "files": files})


def _is_made(folder: Path, wanted: dict[str, Any]) -> bool:
    manifest = read_manifest(folder)
    return (
        manifest is not None
        and all(manifest.get(key) == value for key, value in wanted.items())
        and whole(folder, manifest) is None
    )


def _clear(folder: Path) -> None:
    """The manifest goes first: whatever happens next, the folder is known to be unfinished."""
    if folder.is_dir():
        (folder / MANIFEST).unlink(missing_ok=True)
        for old in folder.glob("shard-*.npy"):
            old.unlink()
    elif folder.exists():
        raise DataError(f"{folder} is a file: token shards need a folder")
    folder.mkdir(parents=True, exist_ok=True)


def _shard_paths(folder: Path, shard: int) -> tuple[Path, Path]:
    return folder / f"shard-{shard:05d}.tokens.npy", folder / f"shard-{shard:05d}.offsets.npy"


def _agree(value: Any, world: World) -> Any:
    """Rank 0's value; asked once, as ranks may see a shared disk differently."""
    if world.world_size == 1:
        return value
    from xmcdist.parallel.collectives import broadcast_object

    return broadcast_object(value)


def _together(work: Callable[[], None], world: World) -> None:
    """Do the work on each rank and wait; a rank's failure ends all, instead of leaving them waiting."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    if world.world_size > 1:
        from xmcdist.parallel.collectives import gather_objects

        told = gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is None:
            for rank, text in enumerate(told):
                if text is not None:
                    raise RuntimeError(f"rank {rank} could not write token shards: {text}")
    if failure is not None:
        raise failure
