"""All levels of rankers on 1, 2 and 3 ranks: the same weights bit for bit, whatever negatives are used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.ranks import on_ranks
from tests.helpers.toy import texts_and_labels
from xmcdist.checkpoint.stages import StageStore
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import ConfigError
from xmcdist.config.schema import FeaturesConfig
from xmcdist.features.tfidf import Tfidf
from xmcdist.observability.log import RunLog
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.pipelines.run import Run
from xmcdist.rankers.model import LinearTree
from xmcdist.rankers.partition import estimate_costs, node_ranges
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import open_csr, save_csr
from xmcdist.trees.label_tree import LabelTree

DOCS, LABELS = 91, 23
POINTERS = [np.array([0, 3]), np.array([0, 2, 5, 7]), np.array([0, 4, 5, 9, 9, 12, 20, 23])]
SCHEMES = {
    "tfn": ["ranker.cost_sensitive=true"],
    "half": ["ranker.cost_sensitive=true", "ranker.weights_dtype=mixed"],
    "both": ["ranker.negatives=[tfn+man]"],
    "weighted": ["ranker.negatives=[tfn+man]", "ranker.negative_weight=score"],
}


@dataclass
class _Data:
    """What the stages ask of a prepared data set."""

    fingerprint: str = "toy"

    def num_docs(self, split: str) -> int:
        return DOCS


def _rank(folder: Path, name: str, world: World, mesh: Mesh) -> LinearTree:
    from xmcdist.pipelines.ranking import rank_stages

    run_dir = folder / f"{name}-{world.world_size}"
    cfg = compose_run(
        ["dataset.path=x", f"run_dir={run_dir}", "encoder=none", "ranker.beam=2", "ranker.threshold=0", *SCHEMES[name]]
    )
    log = RunLog(run_dir, world)
    stages = StageStore(run_dir, world, log.say)
    stages.prints = {"features": "f", "tree": "t"}
    if world.is_main:
        run_dir.mkdir()
    world.barrier()
    E = np.load(folder / "E.npy", mmap_mode="r")
    run = Run(cfg, world, log, stages, _Data(), mesh)
    return rank_stages(run, "rank", Features(open_csr(folder / "X"), E), folder, ("features", "tree"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features, a tree of 3, 7 and 23 nodes, and one process's rankers for every scheme."""
    folder = tmp_path_factory.mktemp("rank")
    texts, Y = texts_and_labels(DOCS, LABELS, seed=3)
    save_csr(folder / "X", Tfidf.fit(texts, FeaturesConfig(), World.single()).transform(texts))
    np.save(folder / "E.npy", np.random.default_rng(0).normal(size=(DOCS, 3)).astype(np.float32))
    tree = LabelTree(POINTERS, np.random.default_rng(1).permutation(LABELS), LABELS)
    tree.save(folder / "tree")
    for t in (1, 2, 3):
        save_csr(folder / f"Y.level-{t}", sp.csr_matrix(tree.lift(Y, t)))
    for name in SCHEMES:
        _rank(folder, name, World.single(), Mesh(World.single()))
    return folder


def _weights(run_dir: Path, t: int) -> np.ndarray:
    level = LevelWeights.load(run_dir / "stages" / f"rank-{t}" / "weights")
    dense, bias = level.dense_rows()
    return np.hstack([level.sparse_rows().toarray(), dense, bias[:, None]])


@on_ranks(2, 3)
def test_the_number_of_ranks_changes_no_weight(single: Path, rank: int, world_size: int) -> None:
    world = World(rank, world_size, rank, world_size, "cpu")
    for name in SCHEMES:
        _rank(single, name, world, Mesh(world, world_size))
        for t in (1, 2, 3):
            got, want = (_weights(single / f"{name}-{w}", t) for w in (world_size, 1))
            assert got.tobytes() == want.tobytes(), (name, t)
            stage = single / f"{name}-{world_size}" / "stages" / f"rank-{t}"
            features = Features(open_csr(single / "X"), np.load(single / "E.npy"))
            costs = estimate_costs(features, open_csr(stage / "M"), POINTERS[t - 1])  # of all documents at once
            parts = LevelWeights.load(stage / "weights").parts
            assert [p.num_nodes for p in parts] == [b - a for a, b in node_ranges(costs, POINTERS[t - 1], world_size)]
            for matrix in ("M/indptr", "M/indices", "M/data"):
                files = [single / f"{name}-{w}" / "stages" / f"rank-{t}" / f"{matrix}.npy" for w in (world_size, 1)]
                assert files[0].read_bytes() == files[1].read_bytes()
            told = json.loads((single / f"{name}-{world_size}" / "stages" / f"rank-{t}" / "balance.json").read_text())
            assert len(told["cpu_seconds"]) == world_size
            assert told["max_over_mean"] >= 1


def test_dense_weights_may_be_of_half_precision(single: Path) -> None:
    for t in (1, 2, 3):
        full, half = (_weights(single / f"{name}-1", t) for name in ("tfn", "half"))
        full[:, -4:-1] = full[:, -4:-1].astype(np.float16)
        np.testing.assert_array_equal(half, full)


def test_scores_weigh_the_negatives_that_were_retrieved(single: Path) -> None:
    M = open_csr(single / "weighted-1" / "stages" / "rank-3" / "M").toarray()
    true = open_csr(single / "Y.level-2").toarray() > 0
    P = open_csr(single / "weighted-1" / "stages" / "rank-2" / "P").toarray()
    np.testing.assert_array_equal(M, np.where(true, 1, P))
    assert ((M > 0) & (M < 1)).any()
    assert not np.array_equal(_weights(single / "weighted-1", 3), _weights(single / "both-1", 3))
    rows = [json.loads(line) for line in (single / "tfn-1" / "metrics.jsonl").read_text().splitlines()]
    assert [r["level"] for r in rows if "ranker_balance" in r] == [1, 2, 3]


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        (["ranker.negative_weight=score"], "add man"),
        (["ranker.negative_weight=scores"], "did you mean score"),
        (
            ["ranker.negative_weight=score", "ranker.negatives=[man]", "ranker.post_processor=log-sigmoid"],
            "needs scores from 0 to 1",
        ),
    ],
)
def test_weights_without_effect_or_sense_are_refused(more: list[str], answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        compose_run(["dataset.path=x", "encoder=none", *more])
