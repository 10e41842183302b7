"""Calibrating a trained model: where, on what, with which answer, and that its ranking stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

import xmcdist
from tests.helpers.ranks import on_ranks
from tests.helpers.toy import texts_and_labels, write_text_folder
from xmcdist.config.commands import CalibrateConfig, PredictConfig
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import UserError
from xmcdist.config.schema import DatasetConfig
from xmcdist.parallel.launch import World
from xmcdist.pipelines.calibration import calibrate, score_pairs
from xmcdist.pipelines.predict import predict_file
from xmcdist.pipelines.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    write_text_folder(folder / "data", test=300)
    overrides = [f"dataset.path={folder / 'data'}", f"run_dir={folder / 'run'}", "encoder=none", "tree.max_leaf_size=5"]
    train(compose_run([*overrides, "evaluation.linear_baseline=false"]), World.single())
    return folder


def _config(folder: Path, place: Path, **more: object) -> CalibrateConfig:
    data = DatasetConfig(path=str(folder / "data"), prepared=str(folder / "run" / "prepared"))
    return CalibrateConfig(**{"model": str(place), "dataset": data, "k": 6, **more})  # type: ignore[arg-type]


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder / "run" / "model", to))


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_probabilities_come_true_and_the_ranking_stays(trained: Path, method: str, tmp_path: Path) -> None:
    model = _copy(trained, tmp_path / "model")
    texts, Y = texts_and_labels(300, 40, seed=77)
    bare = xmcdist.load(str(model)).predict(texts, k=6)
    assert all(a.probability is None for row in bare for a in row)
    said = calibrate(_config(trained, model, method=method), World.single())
    assert f"{method} on 300 documents" in said
    answers = xmcdist.load(str(model)).predict(texts, k=6)
    assert [[a._replace(probability=None) for a in row] for row in answers] == bare
    p = np.array([a.probability for row in answers for a in row], float)
    right = np.array([Y[i, a.label_id] > 0 for i, row in enumerate(answers) for a in row])
    assert 0 <= p.min() < 0.1
    assert 0.8 < p.max() <= 1
    assert abs(p.mean() - right.mean()) < 0.02
    assert np.mean((p - right) ** 2) < 0.7 * np.mean((right.mean() - right) ** 2)
    about = json.loads((model / "calibration.json").read_text())["about"]
    assert about["pairs"] == 1800
    assert about["error"] < min(about["error_of_scores"], 0.05)


def test_predict_writes_probabilities(trained: Path, tmp_path: Path) -> None:
    model = _copy(trained, tmp_path / "model")
    calibrate(_config(trained, model), World.single())
    (tmp_path / "in.txt").write_text("w0 w1\nw4 w5\n")
    predict_file(PredictConfig(model=str(model), input=str(tmp_path / "in.txt"), output=str(tmp_path / "out"), k=2))
    rows = [json.loads(line)["labels"] for line in (tmp_path / "out").read_text().splitlines()]
    want = xmcdist.load(str(model)).predict(["w0 w1", "w4 w5"], k=2)
    assert [[label["probability"] for label in row] for row in rows] == [
        [round(a.probability or 0.0, 6) for a in row] for row in want
    ]


@on_ranks(1, 3)
def test_the_number_of_processes_changes_nothing(trained: Path, rank: int, world_size: int) -> None:
    model = trained / f"of-{world_size}"
    if rank == 0:
        _copy(trained, model)
        _copy(trained, trained / f"alone-{world_size}")
    world = World(rank, world_size, rank, world_size, "cpu")
    world.barrier()
    calibrate(_config(trained, model), world)
    if rank == 0:
        alone = json.loads((model / "calibration.json").read_text())
        assert alone["about"]["documents"] == 300
        found = trained / "calibration-of-one.json"
        if world_size == 1:
            shutil.copy(model / "calibration.json", found)
        elif found.exists():
            assert (model / "calibration.json").read_bytes() == found.read_bytes()


def test_documents_that_were_trained_on_are_refused(trained: Path, tmp_path: Path) -> None:
    model = _copy(trained, tmp_path / "model")
    with pytest.raises(UserError, match="was trained on the trn documents of"):
        calibrate(_config(trained, model, split="trn"), World.single())
    disguised = tmp_path / "disguised"  # as the test split of another data set
    shutil.copytree(trained / "data", disguised)
    for kind in ("X.{}.txt", "Y.{}.npz"):
        shutil.copy(disguised / kind.format("trn"), disguised / kind.format("tst"))
    with pytest.raises(UserError, match="was trained on the tst documents of"):
        calibrate(_config(trained, model, dataset=DatasetConfig(path=str(disguised))), World.single())
    assert not (model / "calibration.json").exists()


def test_another_data_set_may_name_labels_that_the_model_does_not_know(trained: Path, tmp_path: Path) -> None:
    """They are never predicted, so they are nobody's hits."""
    texts, Y = texts_and_labels(50, 40, seed=8)
    names = [f"label {i} : w{2 * i} w{2 * i + 1}" for i in range(40)]
    names[0] = "unheard of"
    rows = [{"text": t, "labels": [names[j] for j in Y[i].indices]} for i, t in enumerate(texts)]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model, data = _copy(trained, tmp_path / "model"), DatasetConfig(path=str(tmp_path / "more"))
    with pytest.raises(UserError, match="has no test documents"):
        calibrate(_config(trained, model, dataset=data), World.single())
    calibrate(_config(trained, model, dataset=data, split="trn"), World.single())
    about = json.loads((model / "calibration.json").read_text())["about"]
    answers = xmcdist.load(str(model)).predict(texts, k=6)
    known = [sum(Y[i, a.label_id] > 0 and a.label_id > 0 for a in row) for i, row in enumerate(answers)]
    assert about["share_right"] == pytest.approx(sum(known) / 300)


@pytest.mark.parametrize(
    ("setting", "answer"),
    [
        ({"method": "spline"}, "method=spline is none of isotonic, platt"),
        ({"split": "val"}, "split=val is none of tst, trn"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"model": "/nowhere"}, "is no model folder"),
    ],
)
def test_bad_settings_are_refused(trained: Path, setting: dict[str, object], answer: str) -> None:
    with pytest.raises(UserError, match=answer):
        calibrate(_config(trained, trained / "run" / "model", **setting), World.single())


def test_pairs_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([rng.permutation(9)[:4] for _ in range(30)])
    labels[rng.random(labels.shape) < 0.3] = -1
    scores = rng.random(labels.shape).astype(np.float32)
    truth = sp.csr_matrix((rng.random((30, 9)) < 0.3).astype(np.float32))
    want = [(i, scores[i, j], bool(truth[i, labels[i, j]])) for i in range(30) for j in range(4) if labels[i, j] >= 0]
    assert list(zip(*(a.tolist() for a in score_pairs(scores, labels, truth)), strict=True)) == [
        (i, float(s), hit) for i, s, hit in want
    ]
