"""Token shards: the same files from any number of ranks, padded rows as plain lists would be."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.ranks import on_ranks
from xmcdist.data.errors import DataError
from xmcdist.data.texts import TextStore, TextWriter
from xmcdist.data.tokens import TokenShards, write_tokens
from xmcdist.parallel.launch import World

PAD = 9


def store(folder: Path, texts: list[str]) -> TextStore:
    with TextWriter(folder, "t") as writer:
        for text in texts:
            writer.append(text)
    return TextStore(folder, "t")


def encode(texts: list[str]) -> list[list[int]]:
    """A word is its length, between a beginning and an end."""
    return [[101, *(len(word) for word in text.split()), 102] for text in texts]


def bare(texts: list[str]) -> list[list[int]]:
    return [row[1:-1] for row in encode(texts)]


def documents(n: int) -> list[str]:
    return [" ".join("x" * (1 + (i * j) % 5) for j in range(i % 7)) for i in range(n)]


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("per_shard", [1, 7, 50, 51, 1000])
@pytest.mark.parametrize("coder", [encode, bare])
def test_batches_are_what_plain_lists_give(tmp_path: Path, per_shard: int, coder: type) -> None:
    texts = documents(50)
    tokens = write_tokens(
        tmp_path / "k", store(tmp_path, texts), coder, pad_id=PAD, fingerprint="f", world=World.single(),
        docs_per_shard=per_shard,
    )  # fmt: skip
    rows = [row or [PAD] for row in coder(texts)]
    assert tokens.num_docs == 50
    assert tokens.lengths.dtype == np.int32
    assert tokens.lengths.tolist() == [len(row) for row in rows]
    for ids in ([3], [0, 7, 14], [49, 0, 25, 25], list(range(50))):
        input_ids, mask = TokenShards.open(tmp_path / "k").batch(ids)
        longest = max(len(rows[i]) for i in ids)
        assert input_ids.dtype == mask.dtype == np.int64
        assert input_ids.tolist() == [rows[i] + [PAD] * (longest - len(rows[i])) for i in ids]
        assert mask.tolist() == [[1] * len(rows[i]) + [0] * (longest - len(rows[i])) for i in ids]
        assert (mask.sum(1) >= 1).all()


def test_more_documents_than_are_encoded_at_once(tmp_path: Path) -> None:
    texts = documents(2500)
    seen: list[int] = []

    def watched(some: list[str]) -> list[list[int]]:
        seen.append(len(some))
        return encode(some)

    tokens = write_tokens(
        tmp_path / "k", store(tmp_path, texts), watched, pad_id=PAD, fingerprint="f", world=World.single()
    )
    assert max(seen) <= 2048
    assert tokens.lengths.tolist() == [len(row) for row in encode(texts)]
    assert tokens.batch([2499])[0].tolist() == encode(texts[2499:])


@on_ranks(1, 2, 3)
def _write(folder: str, rank: int, world_size: int) -> None:
    texts = store_of(folder)
    encoded: list[str] = []

    def watched(some: list[str]) -> list[list[int]]:
        encoded.extend(some)
        return encode(some)

    world = World(rank, world_size, rank, world_size, "cpu")
    write_tokens(Path(folder, "k"), texts, watched, pad_id=PAD, fingerprint="f", world=world, docs_per_shard=7)
    assert encoded == [text for i, text in enumerate(texts) if i // 7 % world_size == rank], "a shard is written once"


def store_of(folder: str) -> TextStore:
    return TextStore(Path(folder), "t")


@pytest.mark.distributed
def test_files_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    seen = []
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        store(folder, documents(50))
        _write(world=world, folder=str(folder))
        seen.append(digest(folder / "k"))
    assert seen[0] == seen[1] == seen[2]
    assert len([name for name in seen[0] if name.startswith("shard-")]) == 2 * 8


@on_ranks(2)
def test_failure_of_one_rank_ends_all(rank: int, world_size: int, tmp_path: Path) -> None:
    if rank == 0:
        store(tmp_path, documents(20))
    world = World(rank, world_size, rank, world_size, "cpu")
    world.barrier()

    def failing(texts: list[str]) -> list[list[int]]:
        if rank == 1:
            raise OSError(errno.ENOSPC, "full")
        return encode(texts)

    wanted = "no space left" if rank == 1 else "rank 1 could not write token shards: DataError: no space left"
    with pytest.raises((DataError, RuntimeError), match=wanted):
        write_tokens(
            tmp_path / "k", TextStore(tmp_path, "t"), failing, pad_id=0, fingerprint="f", world=world, docs_per_shard=5
        )
    with pytest.raises(DataError, match="no finished token shards"):
        TokenShards.open(tmp_path / "k")


def test_finished_shards_are_kept_and_others_replaced(tmp_path: Path) -> None:
    texts = store(tmp_path, documents(20))
    calls = []

    def counted(some: list[str]) -> list[list[int]]:
        calls.append(len(some))
        return encode(some)

    def write(fingerprint: str, per_shard: int = 5) -> TokenShards:
        return write_tokens(
            tmp_path / "k", texts, counted, pad_id=0, fingerprint=fingerprint, world=World.single(),
            docs_per_shard=per_shard,
        )  # fmt: skip

    assert write("a").fingerprint == "a"
    done = len(calls)
    write("a")
    assert len(calls) == done
    write("b", 10)
    assert len(calls) > done
    assert len(list((tmp_path / "k").glob("shard-*"))) == 4
    (tmp_path / "k" / "shard-00000.tokens.npy").write_bytes(b"")
    with pytest.raises(DataError, match="missing or was cut off"):
        TokenShards.open(tmp_path / "k")
    assert write("b", 10).batch([0])[0].tolist() == encode([texts[0]])


def test_interrupted_writing_is_not_taken_for_finished(tmp_path: Path) -> None:
    texts = store(tmp_path, documents(20))

    def dies(some: list[str]) -> list[list[int]]:
        raise KeyboardInterrupt

    write_tokens(tmp_path / "k", texts, encode, pad_id=0, fingerprint="a", world=World.single())
    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "k", texts, dies, pad_id=0, fingerprint="b", world=World.single())
    with pytest.raises(DataError, match="no finished token shards"):
        TokenShards.open(tmp_path / "k")


def test_no_ids_and_wrong_ids(tmp_path: Path) -> None:
    tokens = write_tokens(
        tmp_path / "k", store(tmp_path, ["a"]), encode, pad_id=0, fingerprint="f", world=World.single()
    )
    assert tokens.batch([])[0].shape == (0, 1)
    for ids in ([1], [-1]):
        with pytest.raises(IndexError, match="of 1 documents"):
            tokens.batch(ids)


def test_encoder_that_loses_documents(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encode gave 1 rows for 2 texts"):
        write_tokens(
            tmp_path / "k", store(tmp_path, ["a", "b"]), lambda t: encode(t)[:1], pad_id=0, fingerprint="f",
            world=World.single(),
        )  # fmt: skip


def test_pickled_lengths_are_never_run(tmp_path: Path) -> None:
    write_tokens(tmp_path / "k", store(tmp_path, ["a"]), encode, pad_id=0, fingerprint="f", world=World.single())
    path = tmp_path / "k" / "lengths.npy"
    np.save(path, np.array([object], dtype=object), allow_pickle=True)
    manifest = json.loads((tmp_path / "k" / "manifest.json").read_text())
    manifest["files"]["lengths.npy"]["bytes"] = path.stat().st_size
    (tmp_path / "k" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"lengths\.npy is damaged"):
        TokenShards.open(tmp_path / "k")
