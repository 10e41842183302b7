"""What a window tells, against counting by hand."""

from __future__ import annotations

import mmap
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from tests.helpers.ranks import on_ranks
from xmcdist.data.batches import local
from xmcdist.encoders.costs import EncoderCosts
from xmcdist.parallel.launch import World
from xmcdist.parallel.traffic import TRAFFIC
from xmcdist.pipelines import level_log
from xmcdist.pipelines.level_log import LevelLog, beam_metrics, line_of, memory_mb, steps_before, utilisation
from xmcdist.pipelines.shapes import histogram_of_counts
from xmcdist.training import meters
from xmcdist.training.meters import Window


@pytest.mark.parametrize(("documents", "ranks"), [(12, 1), (12, 5), (3, 5), (1, 4), (257, 16)])
def test_tokens_and_padding_of_all_ranks_are_known_without_asking(documents: int, ranks: int) -> None:
    lengths = np.random.default_rng(documents).integers(1, 50, documents).astype(np.int32)
    window = Window(0)
    for _ in range(2):
        window.add(scored=documents, active=documents * 7, waiting=0.0, lengths=lengths, parts=ranks)
    row = window.flush({"step": 2, "total": 10})
    padded = 0
    for rank in range(ranks):
        mine = local(np.arange(documents), rank, ranks)
        padded += len(mine) * max((int(lengths[d]) for d in mine), default=0)
    real = sum(int(n) for n in lengths)
    assert row["padding_percent"] == pytest.approx(100 * (padded - real) / padded)
    assert row["tokens_per_s"] / row["docs_per_s"] == pytest.approx(real / documents)
    assert row["length_squared"] == pytest.approx(sum(int(n) ** 2 for n in lengths) / documents)
    assert row["active_candidates"] == 7
    assert (window.documents, window.tokens, window.padded) == (0, 0, 0)


def test_validation_is_neither_time_nor_traffic_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 9.0, 10.0, 10.0])  # begun; validation from 4 to 9; told at 10
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    window = Window(0)
    window.add(scored=10, active=10, waiting=1.0, lengths=np.full(10, 3), parts=1)
    TRAFFIC.add("all_reduce", 500, 2.0)
    with window.apart():
        TRAFFIC.add("exchange", 9000, 3.0)
    row = window.flush({"step": 5, "total": 10})
    assert (row["docs_per_s"], row["tokens_per_s"], row["data_wait_percent"]) == (2, 6, 20)
    assert (row["sent_bytes_per_step"], row["collective_s"], row["collective_percent"]) == (100, 2, 40)
    assert row["eta_s"] == 10


def test_mfu_of_a_known_case() -> None:
    costs = EncoderCosts(
        layers=2,
        hidden=4,
        heads=1,
        intermediate=8,
        parameters=500,
        trained_parameters=500,
        embedding_parameters=100,
        token_weights=100,
        document_weights=0,
        pooler_trained=False,
        dropout=False,
    )
    # Documents of 4 and 6 tokens. A token meets 100 weights: 2 * 100 * 5 = 1000 FLOPs a document; scores and sums
    # of attention, 2 layers of width 4: 4 * 2 * 4 * (16 + 36) / 2 = 832. With backward three times as much: 5496.
    # 7 candidates of width 4, forward and two gradients: 6 * 7 * 4 = 168. 10 documents a second: 56640 FLOP/s.
    got = utilisation(costs, 1e6, docs_per_s=10.0, tokens_per_s=50.0, squared=26.0, active=7.0, dim=4)
    assert got == pytest.approx(5.664)
    assert utilisation(costs, 1e6, docs_per_s=0.0, tokens_per_s=0.0, squared=0.0, active=0.0, dim=4) == 0


def _beams(n: int, K: int, beam: int) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Scores with ties, documents without true nodes, rows shorter than the beam."""
    rng = np.random.default_rng(3)
    rows, columns, scores = [], [], []
    for i in range(n):
        size = int(rng.integers(0, beam + 1))
        columns += sorted(rng.choice(K, size, replace=False).tolist())
        rows += [i] * size
        scores += (rng.integers(1, 4, size) / 4).tolist()
    P = sp.csr_matrix((np.array(scores, np.float32), (rows, columns)), shape=(n, K))
    Y = sp.random(n, K, density=0.2, format="csr", rng=rng, dtype=np.float32)
    return P, Y


@on_ranks(1, 3)
def test_recall_and_precision_of_a_beam_equal_the_slow_ones(rank: int, world_size: int) -> None:
    P, Y = _beams(31, 9, beam=4)
    mine = local(np.arange(31), rank, world_size)
    got = beam_metrics(P[mine], Y[mine], beam=4)
    hits, positives, documents, at = 0, 0, 0, {1: 0, 3: 0}
    for i in range(31):
        true = set(np.flatnonzero(Y[i].toarray()).tolist())
        found = {int(c): float(s) for c, s in zip(P[i].indices, P[i].data, strict=True)}
        ranked = sorted(found, key=lambda c: (-found[c], c))
        hits, positives, documents = hits + len(true & set(ranked)), positives + len(true), documents + bool(true)
        for k in at:
            at[k] += len(true & set(ranked[:k]))
    assert got == pytest.approx(
        {"beam_recall": hits / positives} | {f"P@{k}": n / (documents * k) for k, n in at.items()}
    )


class _Log:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.lines: list[str] = []

    def metrics(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def say(self, line: str) -> None:
        self.lines.append(line)


def _level_log(rank: int, world_size: int) -> LevelLog:
    told = object.__new__(LevelLog)
    cfg = SimpleNamespace(matcher=SimpleNamespace(steps=[100, 30], eval_every=20))
    world = World(rank, world_size, rank, world_size, "cpu")
    told.run: Any = SimpleNamespace(cfg=cfg, world=world, log=_Log())
    told.engine: Any = SimpleNamespace(device=torch.device("cpu"), norms=(3.0, 4.0))
    told.t, told.steps, told.before, told._validated = 2, 30, 100, 0
    told.costs, told.peak, told.dim = None, None, 8
    return told


@on_ranks(1, 3)
def test_a_window_tells_of_the_worst_rank_where_it_matters(rank: int, world_size: int) -> None:
    told = _level_log(rank, world_size)
    level_log.memory_mb = lambda device: 100.0 * (1 + rank)
    row = {"level": 2, "step": 6, "total": 30, "loss": 0.5, "lr": 0.05, "grad_norm": 5.0, "length_squared": 9.0}
    row |= {"docs_per_s": 10.0, "tokens_per_s": 50.0, "active_candidates": 7.0, "eta_s": 3700.0}
    row |= {"data_wait_percent": 10.0 * rank, "collective_percent": 6.0 * rank, "collective_s": 2.0 * rank}
    told.window(row | {"sent_bytes_per_step": 2500.0})
    (got,), last = told.run.log.rows, world_size - 1
    assert got["global_step"] == 106
    assert got["memory_mb"] == 100 * world_size
    assert got["data_wait_percent"] == 10 * last
    assert (got["collective_percent"], got["collective_s"]) == (3 * last, last)
    assert (got["encoder_grad_norm"], got["head_grad_norm"]) == (3, 4)
    assert got["mfu_percent"] is None
    assert "length_squared" not in got
    (line,) = told.run.log.lines
    assert "level 2 step 6/30  loss 0.5000" in line
    assert "MFU -" in line
    assert "ETA 1 h 01 min" in line
    assert ("2.5 kB a step" in line) == (world_size > 1)


def test_evaluations_are_placed_where_they_happen() -> None:
    told = _level_log(0, 1)
    for _ in range(2):
        told.validation({"beam_recall": 0.5, "P@1": 0.25})
    assert [(row["global_step"], row["step"]) for row in told.run.log.rows] == [(120, 20), (130, 30)]
    assert told.run.log.rows[0]["validation_P@1"] == 0.25
    assert steps_before(told.run, 1) == 0
    assert steps_before(told.run, 4) == 160  # 100, 30, and the last value repeated


def test_memory_is_that_of_this_process() -> None:
    before = memory_mb(torch.device("cpu"))
    kept = np.frombuffer(mmap.mmap(-1, 64 << 20), np.uint8)  # new pages, whatever the allocator has kept
    kept[:] = 1
    assert 48 < memory_mb(torch.device("cpu")) - before < 128
    assert kept.nbytes == 64 << 20


def test_the_line_has_what_a_person_looks_for() -> None:
    row = {"level": 1, "step": 20, "total": 300, "loss": 0.25, "lr": 1e-4, "grad_norm": 1.5, "docs_per_s": 850.0}
    row |= {"mfu_percent": 31.25, "data_wait_percent": 2.4, "collective_percent": 8.0, "sent_bytes_per_step": 2.5e6}
    line = line_of(row | {"memory_mb": 2310.4, "eta_s": 95.0}, 2)
    want = r"level 1 step 20/300 +loss 0\.2500 +lr 1\.00e-04 +grad 1\.50 +850 docs/s +MFU 31\.2 % +waiting 2 % +"
    assert re.fullmatch(want + r"collectives 8 %, 2\.5 MB a step +2310 MB +ETA 1 min 35 s", line)


def test_label_frequencies_fall_into_bins_that_double() -> None:
    counts, edges = histogram_of_counts(np.array([0, 0, 1, 2, 3, 4, 7, 8, 1000]))
    assert edges == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert counts == [2, 1, 2, 2, 1, 0, 0, 0, 0, 0, 1]
    assert histogram_of_counts(np.zeros(3, np.int64)) == ([3], [0, 1])
