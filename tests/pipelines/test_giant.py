"""Node embeddings carry what edges say: a planted graph, its negative controls, and any number of processes."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.graphs import Planted, two_dialects, write_ogb
from tests.helpers.launch import launch
from xmcdist.config.commands import GiantClassifyConfig, GiantConfig
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import ConfigError, UserError
from xmcdist.encoders.embed import TextEmbedder
from xmcdist.evaluation.node_classification import Classifier, NodeSplit, classify_nodes
from xmcdist.features.tfidf import Tfidf
from xmcdist.parallel.launch import World
from xmcdist.pipelines.giant import giant
from xmcdist.pipelines.node_classification import classify
from xmcdist.sparse.csr import without
from xmcdist.sparse.store import open_csr

SETTINGS = [
    "encoder=tiny",
    "encoder.dropout=0.0",
    "encoder.max_length=12",
    "features=tfidf",
    "tree.nr_splits=8",
    "tree.max_leaf_size=30",
    "matcher.steps=[40]",
    "optimizer.lr=2e-3",
    "schedule.warmup=5",
    "engine.threads=1",
    "graph.holdout=0.1",
]
CHANCE = 100 / 6  # communities
TOLERANCE = 2e-3  # of an embedding's length, fp32, 120 steps


@pytest.fixture(scope="module")
def planted() -> Planted:
    return two_dialects()


@pytest.fixture(scope="module")
def runs(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The planted graph on one process and on three, and rewired."""
    folder = tmp_path_factory.mktemp("giant")
    files = planted.write(folder)
    for name, more in (("one", []), ("rewired", ["graph.rewired=true"])):
        giant(_config(*files, f"run_dir={folder / name}", *more), World.single())
    launch(3, "giant", *files, *SETTINGS, f"run_dir={folder / 'three'}", log=folder / "three.log")
    return {name: folder / name for name in ("one", "three", "rewired")}


def _config(*settings: str) -> GiantConfig:
    cfg = compose_run([*SETTINGS, *settings], config_name="giant")
    assert isinstance(cfg, GiantConfig)
    return cfg


def _results(run: Path) -> dict[str, Any]:
    out: dict[str, Any] = json.loads((run / "results.json").read_text())
    return out


def _embeddings(run: Path) -> np.ndarray:
    return np.asarray(np.load(run / "embeddings" / "embeddings.npy"))


def _across(X: np.ndarray, planted: Planted) -> float:
    """Accuracy on nodes of the second dialect, of a classifier that has seen the first alone."""
    first = np.random.default_rng(0).permutation(np.flatnonzero(planted.dialect == 0))
    split = NodeSplit(first[:90], first[90:], np.flatnonzero(planted.dialect == 1))
    how = Classifier(model="linear", epochs=60, patience=60)
    return classify_nodes(X.astype(np.float32), planted.community, split, how, 0)["test"]


@pytest.mark.distributed
def test_embeddings_translate_between_dialects_that_share_no_word(runs: dict[str, Path], planted: Planted) -> None:
    assert _across(_embeddings(runs["one"]), planted) > 95
    assert _across(_embeddings(runs["three"]), planted) > 95


@pytest.mark.distributed
def test_words_alone_and_a_rewired_graph_stay_at_chance(runs: dict[str, Path], planted: Planted) -> None:
    words = Tfidf.load(runs["one"] / "stages" / "features" / "tfidf").transform(planted.texts)
    assert _across(words.toarray(), planted) < 2 * CHANCE
    assert _across(_embeddings(runs["rewired"]), planted) < 2 * CHANCE
    true, control = (_results(runs[name])["graph"] for name in ("one", "rewired"))
    assert control["edges"] == true["edges"]


@pytest.mark.distributed
def test_held_out_neighbours_are_found_by_the_true_graph_alone(runs: dict[str, Path]) -> None:
    """Within a community all are alike: ten of its 39 others hold a quarter of the held-out ones."""
    true, control = (_results(runs[name])["neighbours"] for name in ("one", "rewired"))
    assert true["of"] == control["of"] == "neighbours"
    assert true["metrics"]["R@10"] > 18
    assert control["metrics"]["R@10"] < 10


@pytest.mark.distributed
def test_three_processes_make_the_same(runs: dict[str, Path]) -> None:
    exact = ["prepared/**/*", "stages/features/X.*/*", "stages/tree/tree/*", "stages/tokens/tokens.*/*"]
    one, three = ({p.relative_to(runs[k]): p for g in exact for p in runs[k].glob(g)} for k in ("one", "three"))
    assert one.keys() == three.keys()
    compared = [name for name in one if name.suffix in (".npy", ".bin")]
    assert len(compared) > 20
    for name in compared:
        assert hashlib.sha256(one[name].read_bytes()).digest() == hashlib.sha256(three[name].read_bytes()).digest(), (
            name
        )
    assert _results(runs["three"])["world_size"] == 3
    A, B = _embeddings(runs["one"]), _embeddings(runs["three"])
    assert np.linalg.norm(A - B, axis=1).max() < TOLERANCE * np.linalg.norm(A, axis=1).min()
    a, b = (_results(runs[name])["neighbours"]["metrics"] for name in ("one", "three"))
    assert b["R@10"] == pytest.approx(a["R@10"], abs=1.0)


@pytest.mark.distributed
def test_the_folder_is_all_that_a_graph_network_needs(runs: dict[str, Path], planted: Planted) -> None:
    folder, X = runs["one"] / "embeddings", _embeddings(runs["one"])
    assert X.dtype == np.float32
    assert np.load(folder / "ids.npy").tolist() == list(range(240))
    about = json.loads((folder / "about.json").read_text())
    assert (about["nodes"], about["width"], about["pooling"]) == (240, 64, "mean")
    assert about["graph"]["held_out_edges"] > 50
    again = TextEmbedder.load(folder / "encoder")(planted.texts)
    np.testing.assert_allclose(again, X, atol=1e-5)


@pytest.mark.distributed
def test_the_same_command_does_only_what_is_missing(runs: dict[str, Path], planted: Planted) -> None:
    run, before = runs["rewired"], _embeddings(runs["rewired"])
    shutil.rmtree(run / "embeddings")
    shutil.rmtree(run / "stages" / "nodes")
    files = planted.write(run.parent)
    found = giant(_config(*files, f"run_dir={run}", "graph.rewired=true"), World.single())
    assert "nodes" not in found["stages_skipped"]
    assert {"features", "tree", "tokens", "match-1", "neighbours"} <= set(found["stages_skipped"])
    np.testing.assert_array_equal(_embeddings(run), before)


@pytest.mark.distributed
def test_hubs_and_lonely_nodes_are_embedded_too_and_rankers_may_follow(tmp_path: Path) -> None:
    """Node 0 knows everybody, the last nobody: neither is trained on."""
    planted = two_dialects(nodes=60, communities=3, neighbours=2)
    lonely = 59
    edges = planted.edges[:, ~(planted.edges == lonely).any(0)]
    hub = np.stack([np.zeros(58, np.int64), np.arange(1, 59)])
    files = Planted(planted.texts, np.hstack([edges, hub]), planted.community, planted.dialect).write(tmp_path)
    more = ["graph.max_degree=30", "matcher.steps=[2]", "matcher.max_clusters=20"]
    more += ["until=null", "evaluation.linear_baseline=true"]
    found = giant(_config(*files, *more, f"run_dir={tmp_path / 'run'}"), World.single())
    assert found["graph"]["nodes_of_too_many_edges"] == 1
    assert open_csr(tmp_path / "run" / "prepared" / "Y.trn").shape == (58, 60)
    X = _embeddings(tmp_path / "run")
    again = TextEmbedder.load(tmp_path / "run" / "embeddings" / "encoder")(planted.texts)
    np.testing.assert_allclose(again, X, atol=1e-5)
    assert {"metrics", "baseline", "neighbours"} <= found.keys()
    assert found["neighbours"]["of"] == "neighbours' clusters (2)"  # the level of the nodes is left to the rankers
    assert 0 < found["neighbours"]["metrics"]["R@5"] <= 100
    fitted = Tfidf.load(tmp_path / "run" / "stages" / "features" / "tfidf")
    assert fitted.fingerprint == Tfidf.fit(planted.texts, _config(*files).features, World.single()).fingerprint
    assert found["metrics"]["R@10"] > 0
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_known_neighbours_leave_the_ranking() -> None:
    scores = sp.csr_matrix(
        (np.array([0.5, 0.0, 0.25, 0.0, 0.75], np.float32), np.array([1, 2, 3, 0, 3]), np.array([0, 3, 3, 5])),
        shape=(3, 4),
    )
    known = sp.csr_matrix((np.ones(3, np.float32), np.array([0, 2, 3]), np.array([0, 2, 2, 3])), shape=(3, 4))
    left = without(scores, known)
    assert left.indptr.tolist() == [0, 2, 2, 3]
    assert left.indices.tolist() == [1, 3, 0]
    assert left.data.tolist() == [0.5, 0.25, 0.0]


def test_mistakes_are_told_before_anything_is_read() -> None:
    with pytest.raises(ConfigError) as told:
        _config("graph.holdout=1", "graph.max_degree=1", "encoder=none", "dataset.path=x", "until=tree")
    for part in (
        "graph.holdout=1.0 is a share",
        "graph.max_degree=1",
        "giant needs an encoder",
        "dataset.path=x has no",
    ):
        assert part in str(told.value)
    with pytest.raises(ConfigError, match=r"did you mean 'graph\.holdout'"):
        _config("graph.holdot=0.1")
    with pytest.raises(ConfigError, match="are of a graph: start `python -m xmcdist giant`"):
        compose_run(["experiment=giant_ogbn_arxiv"])


def test_classify_a_folder_of_the_open_graph_benchmark(tmp_path: Path) -> None:
    folder, E = write_ogb(tmp_path / "ogbn_arxiv"), tmp_path / "E.npy"
    y = np.array([4, 4, 0, 0, 4, 0])
    X = np.stack([y, 1 - y], axis=1).astype(np.float32)
    np.save(E, X)
    cfg = GiantClassifyConfig(embeddings=str(E), path=str(folder), model="linear", epochs=60)
    found = classify(cfg)
    assert found["split"] == {"train": 3, "valid": 1, "test": 2}
    assert found["classes"] == 2
    assert found["accuracy"]["test"]["all"] == [100.0] * 3
    assert found["accuracy"]["test"]["std"] == 0
    (tmp_path / "names.txt").write_text("b\nb\na\na\nb\n\n")
    named = replace(cfg, path=None, classes=str(tmp_path / "names.txt"), split=str(folder / "split" / "time"))
    assert classify(replace(named, output=str(tmp_path / "out.json")))["classes"] == 2
    assert json.loads((tmp_path / "out.json").read_text())["accuracy"]["test"]["mean"] == 100
    np.save(E, X[:5])
    with pytest.raises(UserError, match=r"has 6 lines but there are 5 embeddings"):
        classify(named)


def test_what_classify_cannot_do_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        classify(GiantClassifyConfig(embeddings="x", model="sag", layers=0, train_share=0.9, valid_share=0.2, seeds=[]))
    for part in (
        "model=sag is none",
        "layers=0",
        "must leave nodes for the test",
        "seeds is empty",
        "give classes=FILE",
    ):
        assert part in str(told.value)
