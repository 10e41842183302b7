"""Checkpoints in the middle of a level: any writers, any readers, any engine, nothing lost."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.ranks import on_ranks
from xmcdist.checkpoint import storage
from xmcdist.checkpoint.train_state import StateStore, load_state
from xmcdist.config.errors import UserError
from xmcdist.parallel.collectives import all_reduce
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh

ROWS, COLUMNS = 499, 3
EXTRA = {"best": 0.5, "rng": [1, 2], "note": None}


def _mesh(rank: int, world_size: int, shards: int | None = None) -> Mesh:
    return Mesh.build(World(rank, world_size, rank, world_size, "cpu"), shards)


def _ids(n: int, shard: int, shards: int) -> range:
    """The rows of a shard, by torch's rule: of all rows in equal parts, rounded up, the last may be empty."""
    widest = (n + shards - 1) // shards
    return range(min(shard * widest, n), min((shard + 1) * widest, n))


def _head(ids: range, step: int = 0) -> dict[str, Tensor]:
    """Rows that say who they are."""
    rows = torch.tensor([[100.0 * i + c + step for c in range(COLUMNS)] for i in ids]).reshape(-1, COLUMNS)
    return {
        "weight": rows,
        "bias": torch.tensor([-float(i) for i in ids]),
        "weight.exp_avg": rows / 7,
        "bias.steps": torch.tensor(list(ids), dtype=torch.int64),
        "best.weight": (rows + 0.25).to(torch.bfloat16),
    }


def _module() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1))


def _optimizer(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {f"{n}.exp_avg": 2 * p.detach() for n, p in encoder.items()}
    state |= {f"{n}.step": torch.tensor(11.0) for n in encoder}
    return state | {"0.weight.factor": torch.arange(5.0)}  # a moment of another shape than its parameter


def _encoder() -> dict[str, Tensor]:
    return {n: p.detach() for n, p in _module().named_parameters()}


def _fsdp(world_size: int) -> dict[str, Tensor]:
    module = fully_shard(_module(), mesh=init_device_mesh("cpu", (world_size,)))
    return {n: p.detach() for n, p in module.named_parameters()}


def _save(store: StateStore, step: int, n: int, encoder: dict[str, Tensor]) -> None:
    """Save, and then change everything in place, as the next step would."""
    head = _head(_ids(n, store.mesh.shard, store.mesh.shards), step)
    with_best = encoder | {f"best.{k}": v + 1 for k, v in encoder.items()}
    optimizer, extra = _optimizer(encoder), json.loads(json.dumps(EXTRA))
    store.save(step=step, encoder=with_best, optimizer=optimizer, head=head, num_rows=n, extra=extra)
    for tensors in (with_best, optimizer, head):
        for t in tensors.values():
            t.zero_() if not isinstance(t, DTensor) else t.to_local().zero_()
    extra["rng"].append(3)


@on_ranks(2, 3, 4)
def _write(rank: int, world_size: int, folder: str) -> None:
    mesh = _mesh(rank, world_size)
    for n in (ROWS, 3):
        _save(StateStore(Path(folder) / f"plain-{n}-{world_size}", mesh, asynchronous=False), 5, n, _encoder())
    store = StateStore(Path(folder) / f"async-{world_size}", mesh)
    _save(store, 5, ROWS, _encoder())
    _save(store, 6, ROWS, _encoder())  # waits for the one before
    store.finish()
    if world_size > 1:
        _save(StateStore(Path(folder) / f"fsdp-{world_size}", mesh, asynchronous=False), 5, ROWS, _fsdp(world_size))
    if world_size == 4:
        _save(StateStore(Path(folder) / "2x2", _mesh(rank, 4, 2), asynchronous=False), 5, ROWS, _encoder())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("written")
    _write.__wrapped__(0, 1, str(folder))  # without a process group
    for world in (2, 3, 4):
        _write(world=world, folder=str(folder))
    return str(folder)


def _same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, t in want.items():
        whole = got[name].full_tensor() if isinstance(got[name], DTensor) else got[name]
        assert whole.dtype == t.dtype, name
        assert torch.equal(whole, t), name


def _check(place: Path, mesh: Mesh, n: int, like: dict[str, Tensor], step: int = 5) -> dict[str, Any]:
    state = load_state(place, mesh, encoder_like=like, num_rows=n)
    assert (state["step"], state["extra"]) == (step, EXTRA)
    _same(state["head"], _head(_ids(n, mesh.shard, mesh.shards), step))
    plain = _encoder()
    _same(state["encoder"], plain | {f"best.{k}": v + 1 for k, v in plain.items()})
    _same(state["optimizer"], _optimizer(plain))
    return state


@on_ranks(1, 2, 3)
def test_rows_written_by_any_ranks_are_read_by_any_owner(rank: int, world_size: int, written: str) -> None:
    folder = Path(written)
    layouts = [_mesh(rank, world_size)] + ([_mesh(rank, world_size, 1)] if world_size > 1 else [])
    for mesh in layouts:
        for writers in (1, 2, 3, 4):
            _check(folder / f"plain-{ROWS}-{writers}" / "step-5", mesh, ROWS, _encoder())
            _check(folder / f"plain-3-{writers}" / "step-5", mesh, 3, _encoder())
            for step in (5, 6):
                _check(folder / f"async-{writers}" / f"step-{step}", mesh, ROWS, _encoder(), step)
            if writers > 1:
                _check(folder / f"fsdp-{writers}" / "step-5", mesh, ROWS, _encoder())
        _check(folder / "2x2" / "step-5", mesh, ROWS, _encoder())
    if world_size == 1:
        return
    sharded = _fsdp(world_size)
    for name in (f"plain-{ROWS}-1", f"plain-{ROWS}-4", "fsdp-2", "fsdp-3", "fsdp-4"):
        state = _check(folder / name / "step-5", layouts[0], ROWS, sharded)
        for k, like in sharded.items():
            assert isinstance(like, DTensor)
            for t in (state["encoder"][k], state["encoder"][f"best.{k}"], state["optimizer"][f"{k}.exp_avg"]):
                assert isinstance(t, DTensor)
                assert (t.device_mesh, t.placements) == (like.device_mesh, like.placements)
                assert t.to_local().shape == like.to_local().shape
        assert not isinstance(state["optimizer"]["0.weight.step"], DTensor)


class _Largest(TorchDispatchMode):
    """The most numbers of any tensor that was allocated; a view, also of a mapped file, is none."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in _with_memory((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in _with_memory(out):
            if t.is_floating_point() and t.untyped_storage().data_ptr() not in before:
                self.numel = max(self.numel, t.numel())
        return out


def _with_memory(tree: object) -> list[Tensor]:
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tree_leaves(tree) if isinstance(t, Tensor)]
    return [t for t in tensors if t.device.type != "meta"]


@on_ranks(3)
def test_no_rank_ever_holds_rows_of_others(rank: int, world_size: int, tmp_path: Path) -> None:
    mesh, n = _mesh(rank, world_size), 3000
    alone = _mesh(0, 1)
    if rank == 0:
        StateStore(tmp_path / "alone", alone, asynchronous=False).save(
            step=1, encoder={}, optimizer={}, head=_head(range(n)), num_rows=n, extra={}
        )
    all_reduce(torch.ones(1))
    own = _head(_ids(n, rank, 3))
    with _Largest() as largest:
        store = StateStore(tmp_path / "three", mesh, asynchronous=False)
        store.save(step=1, encoder={}, optimizer={}, head=own, num_rows=n, extra={})
    assert 0 < largest.numel <= n // 3 * COLUMNS
    assert sum(p.stat().st_size for p in (tmp_path / "three" / "step-1").glob(f"rank-{rank:05d}*")) < 50_000
    for writer in ("alone", "three"):
        with _Largest() as largest:
            load_state(tmp_path / writer / "step-1", mesh, encoder_like={})
        assert 0 < largest.numel <= n // 3 * COLUMNS, writer


@on_ranks(3)
def test_training_goes_on_while_a_save_is_written(rank: int, world_size: int, tmp_path: Path) -> None:
    may_write, write = threading.Event(), storage._save_file

    def slow(parts: dict[str, Tensor], path: Path) -> None:
        assert may_write.wait(30)
        write(parts, path)

    def full(parts: dict[str, Tensor], path: Path) -> None:
        raise OSError(errno.ENOSPC, "no space", str(path))

    mesh = _mesh(rank, world_size)
    store = StateStore(tmp_path, mesh)
    storage._save_file = slow
    _save(store, 5, ROWS, _encoder())
    for i in range(20):  # collectives of the training loop between those of the save
        assert all_reduce(torch.tensor(rank + i)).item() == 3 + 3 * i
    assert store.latest() is None
    may_write.set()
    store.finish()
    assert store.latest() == tmp_path / "step-5"
    _check(tmp_path / "step-5", mesh, ROWS, _encoder())

    storage._save_file = full if rank == 1 else write
    _save(store, 6, ROWS, _encoder())  # fails on rank 1, behind the back of the loop ...
    assert all_reduce(torch.tensor(1)).item() == 3
    with pytest.raises(UserError, match=r"rank 1: no space left while writing .*step-6.partial.*before it are whole"):
        _save(store, 7, ROWS, _encoder())  # ... which learns of it at the next, on every rank
    assert store.latest() == tmp_path / "step-5"
    assert not list(tmp_path.glob("step-[67].partial"))  # their space is free again; another rank may be at 8
    storage._save_file = write
    _save(store, 8, ROWS, _encoder())
    store.finish()
    _check(tmp_path / "step-8", mesh, ROWS, _encoder(), 8)

    if rank == 0:
        (tmp_path / "step-8" / "rank-00002.safetensors").unlink()
    all_reduce(torch.ones(1))
    with pytest.raises(UserError, match=r"rank-00002.safetensors is missing"):  # also on ranks that need it not
        load_state(tmp_path / "step-8", mesh, encoder_like={} if rank else _encoder())


def _one(folder: Path, *, keep: int = 2, asynchronous: bool = False) -> StateStore:
    return StateStore(folder, _mesh(0, 1), keep=keep, asynchronous=asynchronous)


def test_the_newest_are_kept_and_what_is_not_whole_is_no_checkpoint(tmp_path: Path) -> None:
    store = _one(tmp_path / "run", keep=2)
    assert store.latest() is None
    for step in (8, 9, 10):
        _save(store, step, 7, _encoder())
    assert sorted(p.name for p in store.folder.iterdir()) == ["step-10", "step-9"]
    (store.folder / "step-20.partial").mkdir()  # killed while it wrote
    (store.folder / "step-20.partial" / "rank-00000.safetensors").write_bytes(b"half")
    (store.folder / "step-30").mkdir()  # killed while it deleted
    again = _one(tmp_path / "run", keep=1)
    assert again.latest() == store.folder / "step-10"
    _check(store.folder / "step-10", store.mesh, 7, _encoder(), 10)
    _save(again, 10, 7, _encoder())  # the same step once more
    assert [p.name for p in store.folder.iterdir()] == ["step-10"]
    _save(again, 20, 7, _encoder())  # where something stale was
    assert [p.name for p in store.folder.iterdir()] == ["step-20"]
    _check(store.folder / "step-20", store.mesh, 7, _encoder(), 20)


def test_a_kill_before_the_commit_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _one(tmp_path, keep=1)
    _save(store, 1, 7, _encoder())
    with monkeypatch.context() as patch:
        patch.setattr(StateStore, "_commit", lambda *_: None)
        _save(store, 2, 7, _encoder())
    assert (tmp_path / "step-2.partial" / "rank-00000.safetensors").exists()
    assert store.latest() == tmp_path / "step-1"
    _check(tmp_path / "step-1", store.mesh, 7, _encoder(), 1)


def test_a_save_in_flight_fails_quietly_until_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _one(tmp_path, asynchronous=True)
    _save(store, 1, 7, _encoder())
    store.finish()
    with monkeypatch.context() as patch:
        (tmp_path / "full").symlink_to("/dev/full")
        patch.setattr(storage, "_save_file", lambda parts, path: (tmp_path / "full").write_bytes(b"x" * 100))
        _save(store, 2, 7, _encoder())
        with pytest.raises(UserError, match=r"no space left while writing .*the checkpoints in .* before it are whole"):
            store.finish()
    with monkeypatch.context() as patch:
        patch.setattr("xmcdist.checkpoint.train_state.write_json", _refuse)
        _save(store, 3, 7, _encoder())
        with pytest.raises(UserError, match=r"nothing was written \(PermissionError: .*before it are whole"):
            store.finish()
    store.finish()  # told once
    assert store.latest() == tmp_path / "step-1"


def _refuse(path: Path, value: Any) -> None:
    raise PermissionError(errno.EACCES, "not allowed", str(path))


def test_a_really_full_disk_is_told_from_other_faults(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory") as missing:
        storage._save_file({"a": torch.zeros(3)}, tmp_path / "none" / "a.safetensors")
    assert missing.value.errno == errno.ENOENT


def test_rows_must_be_those_that_are_owned(tmp_path: Path) -> None:
    store = _one(tmp_path)
    with pytest.raises(ValueError, match=r"head tensor weight is \[7, 3\], and this rank owns 8 rows"):
        store.save(step=1, encoder={}, optimizer={}, head=_head(range(7)), num_rows=8, extra={})
    with pytest.raises(TypeError, match="JSON"):
        store.save(step=1, encoder={}, optimizer={}, head={}, num_rows=8, extra={"a": torch.ones(1)})


def _cut(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes()[:n])


def _flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_damage_and_another_run_are_named(tmp_path: Path) -> None:
    store = _one(tmp_path)
    place, mesh, like = tmp_path / "step-5", store.mesh, _encoder()

    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(UserError, match=rf"checkpoint {place}: .*{match}.* Delete this folder to go on"):
            load_state(place, mesh, **({"encoder_like": like} | changed))

    refused("state.json does not exist")
    _save(store, 5, 7, _encoder())
    refused("holds 7 head rows, and the level has 8: it is of another tree", num_rows=8)
    refused(
        r"encoder tensor 0.weight is \[7, 5\], and here \[5, 7\]", encoder_like=like | {"0.weight": torch.zeros(5, 7)}
    )
    refused("has no encoder tensor extra", encoder_like=like | {"extra": torch.zeros(1)})
    refused("its encoder has a tensor 2.bias", encoder_like={k: v for k, v in like.items() if k != "2.bias"})
    data = place / "rank-00000.safetensors"
    size = data.stat().st_size
    for left in (size - 3, size // 2, 3, 0):
        _cut(data, left)
        refused(r"rank-00000.safetensors is damaged at (encoder|head|optimizer)\.")
    data.unlink()
    refused("rank-00000.safetensors is missing, with .* in it")
    _cut(place / "index.json", 20)
    refused("index.json is damaged: its checksum differs")
    (place / "state.json").write_text('{"step": 5}')
    refused("state.json is damaged: its checksum differs")


def test_every_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    said: list[str] = []
    store = StateStore(tmp_path, _mesh(0, 1), asynchronous=False, say=said.append)
    _save(store, 5, 2, {"w": torch.tensor([1.5])})
    place, aside = tmp_path / "step-5", tmp_path / "step-5.damaged"
    for file in ("rank-00000.safetensors", "index.json", "state.json"):
        whole = (place / file).read_bytes()
        for bit in range(0, 8 * len(whole), 17):
            _flip(place / file, bit)
            if store.latest() is None:
                aside.replace(place)
                assert str(place / file) in said[-1]
            else:  # white space and the like, which say nothing
                assert load_state(place, store.mesh, encoder_like={"w": torch.zeros(1)})["encoder"]["w"].item() == 1.5
            (place / file).write_bytes(whole)
    assert store.latest() == place


@on_ranks(1, 3)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_taken_by_all(
    rank: int, world_size: int, tmp_path: Path
) -> None:
    said: list[str] = []
    mesh = _mesh(rank, world_size)
    store = StateStore(tmp_path, mesh, keep=3, asynchronous=False, say=said.append)
    for step in (5, 6, 7):
        _save(store, step, ROWS, _encoder())
    if rank == 0:
        last = sorted((tmp_path / "step-7").glob("rank-*"))[-1]
        _cut(last, last.stat().st_size - 1)
        index = json.loads((tmp_path / "step-6" / "index.json").read_text())["tensors"]
        part = max(index["head.weight"]["parts"], key=lambda p: p["offset"])
        path = tmp_path / "step-6" / part["file"]
        number = _head(_ids(ROWS, world_size - 1, world_size), 6)["weight"][5].numpy().tobytes()  # one row of the head
        _flip(path, 8 * path.read_bytes().index(number) + 20)
    all_reduce(torch.ones(1))
    assert store.latest() == tmp_path / "step-5"
    all_reduce(torch.ones(1))
    _check(tmp_path / "step-5", mesh, ROWS, _encoder())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-5", "step-6.damaged"]
    all_reduce(torch.ones(1))  # before the next save makes a folder
    if rank == 0:
        assert [s.split(":")[0] for s in said] == ["checkpoint step-7", "checkpoint step-6"]
        assert "going back to step-6" in said[0]
        assert f"{path} is damaged at head.weight (its checksum differs" in said[1]
    else:
        assert not said
    _save(store, 8, ROWS, _encoder())
    assert (tmp_path / "step-6.damaged").exists()  # until another is found, or the level is done
    all_reduce(torch.ones(1))
    if rank == 0:
        (tmp_path / "step-8" / "state.json").write_text("{")
        (tmp_path / "step-5" / "index.json").unlink()
    all_reduce(torch.ones(1))
    assert store.latest() is None
    if rank == 0:
        assert "the level begins anew" in said[-1]
