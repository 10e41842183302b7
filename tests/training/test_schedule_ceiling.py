"""The ceiling of the head's rate against dense eigenvalues, and gradient descent on both sides of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.training import problem
from tests.training.problem import DOCS, NODES, Hooks, Setting
from xmcdist.config.schema import OptimizerConfig, ScheduleConfig
from xmcdist.encoders.embed import embed
from xmcdist.matchers.candidates import Candidates
from xmcdist.matchers.head import ShardedHead
from xmcdist.matchers.losses import ragged_loss
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.shards import LabelShard
from xmcdist.training.ceiling import ceiling_of
from xmcdist.training.loop import LevelTask, train_level
from xmcdist.training.optim import head_optimizer

N, D, ROWS = 80, 4, 5


def _vectors() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0.3, 1.0, (N, D)).astype(np.float32))


def _candidates() -> Candidates:
    """Labels that documents do not explain, so that no margin is reached at the best weights."""
    rng = np.random.default_rng(1)
    doc, node = np.nonzero(rng.random((N, ROWS)) < 0.6)
    value = (rng.integers(1, 4, len(doc)) * (rng.random(len(doc)) < 0.4)).astype(np.float32)
    weight = np.where(value > 0, 1.0, rng.uniform(0.5, 1, len(doc))).astype(np.float32)
    ptr = np.searchsorted(doc, np.arange(N + 1))
    return Candidates(ptr, node, value, weight, np.diff(ptr))


def _dense(E: NDArray[np.float64], c: Candidates, rows: int, loss: str) -> list[tuple[float, float]]:
    """Each row's largest eigenvalue and largest single term, by numpy alone."""
    out = []
    for row in range(rows):
        H, largest = np.zeros((E.shape[1] + 1, E.shape[1] + 1)), 0.0
        for i in range(len(E)):
            for k in range(int(c.doc_ptr[i]), int(c.doc_ptr[i + 1])):
                if c.node[k] == row:
                    e = np.append(E[i], 1.0)
                    a = {"bce": 0.25}.get(loss, 2.0) * c.weight[k] / c.counts[i]
                    a *= c.value[k] if c.value[k] > 0 and loss == "weighted_squared_hinge" else 1.0
                    H += a * np.outer(e, e) / len(E)
                    largest = max(largest, float(a * (e @ e)))
        out.append((float(np.linalg.eigvalsh(H)[-1]), largest))
    return out


@pytest.mark.parametrize("loss", ["weighted_squared_hinge", "squared_hinge", "bce"])
@pytest.mark.parametrize("batch", [1, 10, N, 3 * N])
def test_equals_dense_eigenvalues(loss: str, batch: int) -> None:
    E, c = _vectors(), _candidates()
    got = ceiling_of(E, c, ROWS, loss, batch, N)
    both = _dense(E.double().numpy(), c, ROWS, loss)
    q = max(N - batch, 0) / (batch * (N - 1))
    assert got.curvature == pytest.approx(max(C for C, _ in both), rel=1e-3)
    assert got.rate == pytest.approx(2 / max((1 - q) * C + q * R for C, R in both), rel=1e-3)
    assert got.documents == N
    many = ceiling_of(E, c, ROWS, loss, batch, 10**9)  # of which the documents are a sample
    assert many.rate == pytest.approx(2 / max((1 - 1 / batch) * C + R / batch for C, R in both), rel=1e-3)


def test_nothing_to_bound() -> None:
    none = Candidates(
        np.zeros(N + 1, np.int64), *(np.zeros(0, t) for t in (np.int64, np.float32, np.float32)), np.zeros(N)
    )
    assert ceiling_of(_vectors(), none, ROWS, "squared_hinge", 8, N).rate == np.inf


def _descend(rate: float, batch: int, steps: int, start: torch.Tensor | None = None) -> tuple[torch.Tensor, float]:
    """Weights and loss on all documents after steps of plain gradient descent on the head."""
    E, c = _vectors(), _candidates()
    head = ShardedHead(LabelShard(0, 1, ROWS), D)
    with torch.no_grad():
        head.weight.copy_(torch.zeros(ROWS, D) if start is None else start[:, :-1])
        head.bias.copy_(torch.zeros(ROWS) if start is None else start[:, -1])
    optimizer = head_optimizer(head, OptimizerConfig(head="sgd", head_lr=rate))

    def loss(part: Candidates, vectors: torch.Tensor) -> torch.Tensor:
        doc, node, value = (torch.from_numpy(a) for a in (part.doc(), part.node, part.value))
        scores = head(vectors, doc, node)
        weight, counts = torch.from_numpy(part.weight), torch.from_numpy(part.counts)
        return ragged_loss("weighted_squared_hinge", scores, value, doc, counts, len(vectors), weight)

    rng = np.random.default_rng(2)
    for _ in range(steps):
        some = rng.permutation(N)[:batch] if batch < N else np.arange(N)
        optimizer.zero_grad()
        loss(c.take(some), E[some]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return torch.cat([head.weight.detach(), head.bias.detach().unsqueeze(1)], 1), float(loss(c, E).detach())


def test_descent_converges_just_below_and_diverges_just_above() -> None:
    ceiling = ceiling_of(_vectors(), _candidates(), ROWS, "weighted_squared_hinge", N, N)
    best, _ = _descend(0.9 * ceiling.rate, N, 800)
    near = best + 1e-4 * torch.from_numpy(np.random.default_rng(3).normal(size=best.shape).astype(np.float32))
    below, _ = _descend(0.97 * ceiling.rate, N, 150, near)
    above, _ = _descend(1.03 * ceiling.rate, N, 150, near)
    before = float((near - best).norm())
    assert float((below - best).norm()) < 0.2 * before
    assert float((above - best).norm()) > 50 * before  # grows until margins are reached, which no bound is about


def test_small_batches_are_stable_below_their_own_ceiling_and_not_below_that_of_all_documents() -> None:
    ceiling = ceiling_of(_vectors(), _candidates(), ROWS, "weighted_squared_hinge", 1, N)
    whole = ceiling_of(_vectors(), _candidates(), ROWS, "weighted_squared_hinge", N, N)
    _, start = _descend(0.0, 1, 1)
    _, below = _descend(0.97 * ceiling.rate, 1, 600)
    _, above = _descend(0.97 * whole.rate, 1, 600)
    assert below < start
    assert not above < 1e6 * start  # no number any more, or a huge one


SETTING = Setting(head="sgd", weight_decay=0.0, steps=1, lr=1e3, clip=1e-3)


def _bounded(limit: str, **values: Any) -> LevelTask:
    setting = replace(SETTING, **values)
    return replace(problem.task(setting), schedule=ScheduleConfig(name="constant", warmup=0, max_head_lr=limit))


def check_on_ranks(rank: int, world_size: int) -> None:
    """The loop measures it with each rank's rows and documents; numpy with all of them.

    Collective; called by `test_schedule`, where the ranks are.
    """
    task, hooks, ids = _bounded("auto"), Hooks(), np.arange(DOCS)
    E = embed(problem.encoder(SETTING), task.tokens, ids).astype(np.float64)
    both = _dense(E, task.candidates.of(ids, 0), NODES, task.matcher.loss)
    q = (DOCS - 8) / (8 * (DOCS - 1))
    want = 2 / max((1 - q) * C + q * R for C, R in both)
    engine = problem.engine(SETTING, rank, world_size)
    train_level(engine, problem.encoder(SETTING), problem.head(rank, world_size), task, hooks)
    (row,) = hooks.rows
    assert row["head_lr"] == row["max_head_lr"] == pytest.approx(want, rel=1e-3)
    assert row["lr"] == 1e3  # the encoder's own
    assert gather_objects(row["head_lr"]) == [row["head_lr"]] * world_size


def test_a_number_bounds_as_well_and_a_resumed_level_keeps_what_was_measured() -> None:
    hooks, head = Hooks(), problem.head()
    train_level(problem.engine(SETTING), problem.encoder(SETTING), head, _bounded("0.125"), hooks)
    assert hooks.rows[0]["head_lr"] == 0.125
    straight, resumed = Hooks(), Hooks()
    task = _bounded("auto", steps=3, save_every=1)
    train_level(problem.engine(SETTING), problem.encoder(SETTING), problem.head(), task, straight)
    step, state = straight.saved[1]
    train_level(problem.engine(SETTING), problem.encoder(SETTING), head, task, resumed, {"step": step, **state})
    assert straight.rows[-1]["head_lr"] == resumed.rows[-1]["head_lr"]
    state["extra"]["max_head_lr"] = 0.5  # where it came from: not from the encoder as it is now
    train_level(problem.engine(SETTING), problem.encoder(SETTING), head, task, resumed, {"step": step, **state})
    assert resumed.rows[-1]["head_lr"] == 0.5
