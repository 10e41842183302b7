"""What a level costs a rank: no array of all labels in its memory, no byte for more labels on the wire."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.ranks import on_ranks
from tests.training import problem
from tests.training.problem import DOCS, LEVEL, SEED, Hooks, Setting
from xmcdist.checkpoint.train_state import StateStore, load_state
from xmcdist.matchers.candidates import CandidateSource
from xmcdist.matchers.head import ShardedHead
from xmcdist.matchers.predict import predict_level
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.parallel.traffic import TRAFFIC
from xmcdist.training.loop import train_level

DIM = 64


def _source(labels: int) -> tuple[CandidateSource, np.ndarray]:
    """Three positives a document and the children of two of ten parents."""
    rng = np.random.default_rng(0)
    child_ptr = np.linspace(0, labels, 11).astype(np.int64)

    def some(columns: int, each: int) -> sp.csr_matrix:
        ids = np.concatenate([np.sort(rng.choice(columns, each, replace=False)) for _ in range(DOCS)])
        return sp.csr_matrix((np.ones(len(ids), np.float32), ids, np.arange(DOCS + 1) * each), shape=(DOCS, columns))

    M, Y = some(10, 2), some(labels, 3)
    return CandidateSource(M, Y, child_ptr, max_active=50, seed=SEED, level=LEVEL), child_ptr


def _mesh(rank: int, world_size: int) -> Mesh:
    return Mesh.build(World(rank, world_size, rank, world_size, "cpu"))


@on_ranks(2, 3)
def test_bytes_a_step_do_not_depend_on_the_number_of_labels(rank: int, world_size: int) -> None:
    sent = []
    for labels in (30, 300, 3000):
        setting, hooks = Setting(steps=3, micro_batch=2), Hooks()
        mesh = _mesh(rank, world_size)
        head = ShardedHead(mesh.label_shard(labels), DIM, seed=SEED, level=LEVEL)
        task = problem.task(setting, source=_source(labels)[0])
        before = TRAFFIC.copy()
        train_level(problem.engine(setting, rank, world_size), problem.encoder(setting), head, task, hooks)
        sent.append(TRAFFIC.since(before).sent)
        told = [row["sent_bytes_per_step"] for row in hooks.rows]
        assert min(told) > 0
        assert sum(told) <= TRAFFIC.since(before).total
    assert sent[0] == sent[1] == sent[2]
    # Documents' vectors and their gradient, the loss and the norm; nothing as long as the labels.
    vectors = sent[0]["all_gather_embeddings"]
    assert vectors == sent[0]["reduce_scatter_embeddings"] > 0
    assert sent[0].total() - 2 * vectors < 3 * 200 * world_size


class _Largest(TorchDispatchMode):
    """The most bytes of any tensor that an operation made."""

    bytes, by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            real = type(x) is torch.Tensor and x.device.type != "meta"
            if real and x.nbytes > self.bytes:
                self.bytes, self.by = x.nbytes, f"{func} {list(x.shape)}"
        return out


@on_ranks(2, 4)
def test_a_rank_never_holds_all_rows(rank: int, world_size: int, tmp_path: Path) -> None:
    labels = 40_000
    whole = 4 * labels * DIM
    setting, mesh = Setting(steps=3, micro_batch=2, save_every=2, scoring="pairs"), _mesh(rank, world_size)
    source, child_ptr = _source(labels)
    task, hooks = problem.task(setting, source=source), _Saving(tmp_path, mesh, labels)
    engine, encoder = problem.engine(setting, rank, world_size), problem.encoder(setting)
    predict_level(np.zeros((1, DIM), np.float32), *_tiny(mesh))  # what compiles on first use
    tracemalloc.start()
    with _Largest() as largest:
        head = ShardedHead(mesh.label_shard(labels), DIM, seed=SEED, level=LEVEL)
        head.load_rows(np.ones((len(head.shard), DIM), np.float32), np.zeros(len(head.shard), np.float32))
        train_level(engine, encoder, head, task, hooks)
        hooks.store.finish()
        place = hooks.store.latest()
        assert place is not None
        saved = load_state(place, mesh, encoder_like=problem.encoder(setting).state_dict(), num_rows=labels)
        parents = sp.csr_matrix(np.eye(1, 10, dtype=np.float32))
        predict_level(np.ones((1, DIM), np.float32), head, parents, child_ptr, 5, "sigmoid", mesh, scoring="pairs")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert saved["head"]["weight"].shape == (len(head.shard), DIM)
    own = 4 * len(head.shard) * DIM
    assert own <= largest.bytes < 1.05 * whole / world_size, largest.by
    # numpy's arrays: the first rows, those that `load_rows` was given here and its copy; nothing else of that size.
    assert peak < 3.5 * whole / world_size, peak


def _tiny(mesh: Mesh) -> tuple[Any, ...]:
    return ShardedHead(mesh.label_shard(5), DIM), None, np.array([0, 5], np.int64), 2, "sigmoid", mesh


class _Saving(Hooks):
    """Writes what the loop hands over, as the pipeline does."""

    def __init__(self, folder: Path, mesh: Mesh, labels: int) -> None:
        super().__init__()
        self.store, self.labels = StateStore(folder, mesh), labels

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.store.save(step=step, num_rows=self.labels, **state)


def test_the_largest_tensor_is_seen() -> None:
    with _Largest() as largest:
        torch.ones(3, 5) @ torch.ones(5, 7)
    assert largest.bytes == 4 * 35
