"""Runs whose matcher finds the clusters at prediction: trained, measured, opened, asked in every way."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import xmcdist
from tests.helpers.ranks import on_ranks
from tests.helpers.toy import TINY_RUN, texts_and_labels, write_text_folder
from tests.inference.test_postprocess import formula
from xmcdist.config.commands import CalibrateConfig, EvaluateConfig, PredictConfig
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import ConfigError, UserError
from xmcdist.config.schema import DatasetConfig, RunConfig
from xmcdist.inference.cluster_matcher import ClusterMatcher
from xmcdist.inference.ensemble import open_model
from xmcdist.parallel.launch import World
from xmcdist.pipelines.calibration import calibrate
from xmcdist.pipelines.evaluation import evaluate_model
from xmcdist.pipelines.levels import matched_levels
from xmcdist.pipelines.predict import predict_file
from xmcdist.pipelines.ranking import _solver_params
from xmcdist.pipelines.train import train
from xmcdist.rankers.solver import solve_level
from xmcdist.rankers.weights import LevelWeights
from xmcdist.serving.model import Ask, Part, ServedModel
from xmcdist.sparse.features import Features, unit_vectors
from xmcdist.sparse.store import open_csr
from xmcdist.trees.label_tree import LabelTree

BY_MATCHER = [*TINY_RUN, "ranker.clusters_by=matcher", "evaluation.linear_baseline=false", "ranker.beam=3"]
BY_MATCHER += ["ranker.negatives=[tfn+man]", "ranker.negative_weight=score"]
KINDS = {
    # levels 8 > 40: X-Transformer's single level of clusters
    "flat": ["tree.nr_splits=8", "matcher.steps=[50]", "ranker.last_post_processor=noop"],
    # levels 4 > 8 > 40, of which the head has one, and the rankers read no embedding
    "deep": ["matcher.max_clusters=4", "matcher.loss=bce", "ranker.features=sparse", "ranker.post_processor=sigmoid"],
}
MATCHED = 1  # levels of both


def config(folder: Path, kind: str, run: str | None = None) -> RunConfig:
    return compose_run(
        [f"dataset.path={folder / 'data'}", f"run_dir={folder / (run or kind)}", *BY_MATCHER, *KINDS[kind]]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a run of each kind, and what one process answers."""
    folder = tmp_path_factory.mktemp("xt")
    write_text_folder(folder / "data", train=361, test=61)
    for kind in KINDS:
        train(config(folder, kind), World.single())
    (folder / "in.txt").write_text("".join(t + "\n" for t in texts_and_labels(31, 40, seed=5)[0]))
    predict_file(_predict(folder, "one.jsonl"))
    return folder


def _predict(folder: Path, output: str, **more: Any) -> PredictConfig:
    model, source = folder / "flat" / "model", folder / "in.txt"
    return PredictConfig(model=str(model), input=str(source), output=str(folder / output), batch=7, **more)


def _texts(folder: Path) -> list[str]:
    return (folder / "data" / "X.tst.txt").read_text().splitlines()


def _stage(folder: Path, kind: str, name: str) -> Path:
    return folder / kind / "stages" / name


def _outputs(folder: Path, kind: str) -> list[tuple[np.ndarray, str]]:
    """Of every level all outputs for the test documents ``[n, K_t]`` and their post-processor, by numpy alone."""
    cfg, model = config(folder, kind), xmcdist.load(str(folder / kind / "model"))
    E = model.embedder(_texts(folder)).astype(np.float64)
    X = model.tfidf.transform(_texts(folder))
    U = unit_vectors(E) if cfg.ranker.features == "both" else np.zeros((len(E), 0))
    levels = []
    for t in range(1, model.rankers.tree.depth + 1):
        if t <= MATCHED:
            W, b = (np.load(_stage(folder, kind, f"match-{t}") / f"{name}.npy") for name in ("head", "bias"))
            levels.append((E @ W.T + b, "sigmoid" if cfg.matcher.loss == "bce" else "l3-hinge"))
            continue
        level = LevelWeights.load(_stage(folder, kind, f"rank-{t}") / "weights")
        dense, b = level.dense_rows()
        last = cfg.ranker.last_post_processor if t == model.rankers.tree.depth else None
        levels.append((X @ level.sparse_rows().toarray().T + U @ dense.T + b, last or cfg.ranker.post_processor))
    return levels


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_plain_numpy(trained: Path, kind: str) -> None:
    model, levels = xmcdist.load(str(trained / kind / "model")), _outputs(trained, kind)
    tree = LabelTree.load(_stage(trained, kind, "tree") / "tree")
    for beam in (1, 3):
        got = model.scores(_texts(trained), k=4, beam=beam)
        for i in range(got.shape[0]):
            kept = {0: 1.0}
            for t, (V, post) in enumerate(levels, start=1):
                last, parents = t == tree.depth, tree.parents(t)
                ids = tree.labels if last else np.arange(tree.level_size(t))
                found = {
                    int(ids[j]): formula(post, float(V[i, j]), kept[p]) for j, p in enumerate(parents) if p in kept
                }
                best = sorted(found, key=lambda j: (-found[j], j))[: 4 if last else beam]
                kept = {j: found[j] for j in best}
            row = got[i]
            assert set(row.indices.tolist()) == set(kept)
            np.testing.assert_allclose(row.data, [kept[j] for j in row.indices], rtol=2e-3, atol=1e-6)
    full = model.scores(_texts(trained), k=40, beam=8)
    again = model.scores(_texts(trained), selected=full)
    np.testing.assert_array_equal(again.indices, full.indices)
    np.testing.assert_array_equal(again.data, full.data)


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_measures_what_its_model_answers(trained: Path, kind: str) -> None:
    results = json.loads((trained / kind / "results.json").read_text())
    data = DatasetConfig(path=str(trained / "data"), prepared=str(trained / kind / "prepared"))
    got = evaluate_model(EvaluateConfig(model=str(trained / kind / "model"), dataset=data), World.single())
    for key in ("P@1", "P@3", "P@5", "PSP@5", "R@10"):
        assert got[key] == pytest.approx(results["metrics"][key], abs=1.7)  # one document: rounding of embeddings
    assert got["P@1"] > 60
    raw = np.load(_stage(trained, kind, "embed") / "raw.tst.npy")  # what the run's own measures went by
    model = xmcdist.load(str(trained / kind / "model"))
    np.testing.assert_allclose(raw, model.embedder(_texts(trained)), rtol=1e-3, atol=1e-5)
    about = json.loads((trained / kind / "model" / "config.json").read_text())
    assert (about["clusters_by"], about["encoder"]) == ("matcher", True)
    assert not _stage(trained, kind, "ranker_tree").exists()
    ranked = [p.name for p in sorted((trained / kind / "stages").glob("rank-*"))]
    assert ranked == [f"rank-{t}" for t in range(MATCHED + 1, model.rankers.tree.depth + 1)]


def test_the_head_retrieves_at_prediction_what_it_retrieved_in_training(trained: Path) -> None:
    for kind in KINDS:
        stage = _stage(trained, kind, f"match-{MATCHED}")
        P = open_csr(stage / "P")
        matcher = ClusterMatcher.load(trained / kind / "model" / "matcher")
        found = matcher.clusters(np.load(stage / "E.npy"), config(trained, kind).matcher.beam)
        assert found.indptr.tolist() == P.indptr.tolist()
        same = found.indices == P.indices
        assert same.mean() > 0.99  # a tie may go the other way by rounding
        np.testing.assert_allclose(found.data[same], P.data[same], rtol=1e-3, atol=1e-7)


def test_the_matcher_s_probabilities_weigh_the_rankers_negatives(trained: Path) -> None:
    cfg, t = config(trained, "flat"), 2
    M = open_csr(_stage(trained, "flat", f"rank-{t}") / "M")
    P = open_csr(_stage(trained, "flat", "match-1") / "P").toarray()
    tree_stage = _stage(trained, "flat", "tree")
    true = open_csr(tree_stage / "Y.level-1").toarray() > 0
    np.testing.assert_array_equal(M.toarray(), np.where(true, 1, P))
    assert ((M.data > 0) & (M.data < 1)).any()
    below = open_csr(_stage(trained, "deep", "rank-2") / "M").toarray()
    found = open_csr(_stage(trained, "deep", "match-1") / "P").toarray()
    np.testing.assert_array_equal(
        below, np.where(open_csr(_stage(trained, "deep", "tree") / "Y.level-1").toarray() > 0, 1, found)
    )
    features = Features(
        open_csr(_stage(trained, "flat", "features") / "X.trn"), np.load(_stage(trained, "flat", "embed") / "E.trn.npy")
    )
    tree = LabelTree.load(tree_stage / "tree")
    params = _solver_params(SimpleNamespace(cfg=cfg), t)  # type: ignore[arg-type]
    got = LevelWeights.load(_stage(trained, "flat", f"rank-{t}") / "weights").sparse_rows()
    for weighted in (True, False):
        params = replace(params, weighted_negatives=weighted)
        solved = solve_level(features, open_csr(tree_stage / f"Y.level-{t}"), M, tree.child_ptr[t - 1], params)
        assert ((solved.sparse_rows() != got).nnz == 0) == weighted


def test_a_head_whose_rows_are_shuffled_finds_clusters_by_chance(trained: Path) -> None:
    """The negative control: clusters come from the head, not from the rankers or the tree."""
    model = xmcdist.load(str(trained / "flat" / "model"))
    Y = sp.load_npz(trained / "data" / "Y.tst.npz").toarray()
    E = model.embedder(_texts(trained))
    model.embedder = lambda texts: E  # read once

    def hits() -> float:
        best = model.scores(_texts(trained), k=1, beam=1)
        return float(np.mean([Y[i, best[i].indices[0]] for i in range(len(Y))]))

    right = hits()
    W, b = model.matcher.head.levels[0].dense_rows()
    shuffled = []
    for shift in range(1, len(W)):  # every cluster gets every other one's row once
        order = np.roll(np.arange(len(W)), shift)
        model.matcher = ClusterMatcher.from_rows(model.rankers.tree, [(W[order], b[order])], "l3-hinge")
        shuffled.append(hits())
    share = Y.sum(1).mean() / len(W)  # of the clusters that hold one of a document's labels
    assert np.mean(shuffled) < share < right - 0.2


def test_every_other_way_of_asking(trained: Path) -> None:
    folder = str(trained / "flat" / "model")
    model, texts = xmcdist.load(folder), _texts(trained)[:5]
    alone = model.predict(texts, k=3)
    both = open_model([folder, folder]).predict(texts, k=3)
    assert [[a.label_id for a in row] for row in both] == [[a.label_id for a in row] for row in alone]
    open_model([folder, str(trained / "deep" / "model")], "rank").predict(texts, k=3)
    served = ServedModel(folder, None, 1, exact=True)
    (answer,) = served.answer([Part(texts[:1], Ask(3))])
    (given,) = served.answer([Part(texts[:1], Ask(3, None, tuple(a.label_id for a in alone[0])))])
    assert answer == given
    assert [a["id"] for a in json.loads(answer[0])] == [a.label_id for a in alone[0]]
    copy = trained / "calibrated"
    shutil.copytree(folder, copy)
    data = DatasetConfig(path=str(trained / "data"), prepared=str(trained / "flat" / "prepared"))
    calibrate(CalibrateConfig(model=str(copy), dataset=data), World.single())
    assert xmcdist.load(str(copy), verify=True).predict(texts, k=1)[0][0].probability is not None
    part = next((copy / "matcher" / "level-1").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=r"matcher/level-1"):
        xmcdist.load(str(copy))


@on_ranks(3)
def test_three_processes_train_and_answer_as_one(trained: Path, rank: int, world_size: int) -> None:
    """Of the same fine-tuned encoder: embeddings of test documents, rankers, measures, model, answers."""
    world = World(rank, world_size, rank, world_size, "cpu")
    if rank == 0:
        shutil.copytree(trained / "flat", trained / "three")
        for name in ("embed", "rank-2", "export"):
            shutil.rmtree(trained / "three" / "stages" / name)
        shutil.rmtree(trained / "three" / "model")
    world.barrier()
    results = train(config(trained, "flat", "three"), world)
    assert {"tree", "match-1"} <= set(results["stages_skipped"])
    one = json.loads((trained / "flat" / "results.json").read_text())
    for key in ("P@1", "P@5", "R@10"):
        assert results["metrics"][key] == pytest.approx(one["metrics"][key], abs=1.7)
    raw, want = (np.load(_stage(trained, kind, "embed") / "raw.tst.npy") for kind in ("three", "flat"))
    np.testing.assert_allclose(raw, want, rtol=1e-3, atol=1e-5)
    a, b = (LevelWeights.load(_stage(trained, kind, "rank-2") / "weights") for kind in ("three", "flat"))
    assert (a.sparse_rows() != b.sparse_rows()).nnz == 0
    for x, y in zip(a.dense_rows(), b.dense_rows(), strict=True):
        assert x.tobytes() == y.tobytes()
    for parallel in ("documents", "labels"):
        cfg = _predict(trained, f"{parallel}.jsonl", parallel=parallel)
        assert predict_file(cfg, world) == 31
        assert Path(cfg.output).read_bytes() == (trained / "one.jsonl").read_bytes()
    data = DatasetConfig(path=str(trained / "data"), prepared=str(trained / "flat" / "prepared"))
    asked = EvaluateConfig(model=cfg.model, dataset=data, batch=16, parallel="labels")
    assert evaluate_model(asked, world)["P@1"] == pytest.approx(one["metrics"]["P@1"], abs=1.7)


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        (["encoder=none"], "needs an encoder, whose head finds the clusters"),
        (["ranker.tree_start=random"], "ranker.tree_start=random has no effect with ranker.clusters_by=matcher"),
        (["ranker_tree.path=somewhere"], "ranker_tree.path=somewhere has no effect.*set tree.path instead"),
        (["ranker_tree.nr_splits=32"], "ranker_tree.nr_splits=32 has no effect.*leave it as tree.nr_splits=4"),
        (["ranker.clusters_by=matchers"], "did you mean matcher"),
    ],
)
def test_settings_that_contradict_it_are_refused(more: list[str], answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        compose_run(["dataset.path=x", *BY_MATCHER, *more])


def test_the_labels_own_level_is_left_to_the_rankers() -> None:
    cfg = compose_run(["dataset.path=x", *BY_MATCHER])
    tree = LabelTree([np.array([0, 2]), np.array([0, 3, 5])], np.arange(5), 5)
    assert matched_levels(cfg, tree) == 1
    cfg.ranker.clusters_by = "rankers"
    assert matched_levels(cfg, tree) == 2


def test_a_tree_without_clusters_is_refused_before_anything_is_trained(trained: Path, tmp_path: Path) -> None:
    LabelTree([np.array([0, 40])], np.arange(40), 40).save(tmp_path / "tree")
    place = [f"dataset.path={trained / 'data'}", f"run_dir={tmp_path / 'run'}", f"tree.path={tmp_path / 'tree'}"]
    cfg = compose_run([*place, *BY_MATCHER, "evaluation.linear_baseline=true"])
    with pytest.raises(UserError, match="needs clusters above the labels, and the tree has none"):
        train(cfg, World.single())
    assert not (tmp_path / "run" / "stages" / "linear-1").exists()
