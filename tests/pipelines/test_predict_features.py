"""predict on given features, on several models, and what it says when they are not what a model reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

import xmcdist
from tests.helpers.pecos_model import Chain
from tests.helpers.ranks import on_ranks
from xmcdist.config.commands import ImportPecosConfig, PredictConfig
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import UserError
from xmcdist.inference.ensemble import Ensemble
from xmcdist.parallel.launch import World
from xmcdist.pipelines.import_pecos import import_pecos
from xmcdist.pipelines.predict import _Round, _with_features, predict_file

ROWS = 9  # with blocks of two: five blocks, the last of one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that read features, and features."""
    folder = tmp_path_factory.mktemp("features")
    for seed in (0, 1):
        source = Chain(seed=seed, topk=(3, 3, 6)).write(folder / f"pecos-{seed}")
        import_pecos(ImportPecosConfig(source=str(source), output=str(folder / f"{seed}")))
    sp.save_npz(folder / "X.npz", sp.csr_matrix(Chain(seed=5).X))
    return folder


def _config(folder: Path, output: Path, **more: object) -> PredictConfig:
    given = {"model": str(folder / "0"), "input": str(folder / "X.npz"), "output": str(output), "k": 4, "batch": 2}
    return PredictConfig(**{**given, **more})  # type: ignore[arg-type]


def _labels(path: Path) -> list[list[tuple[int, float]]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["document"] for row in rows] == list(range(ROWS))
    return [[(label["id"], label["score"]) for label in row["labels"]] for row in rows]


def test_rows_are_answered_in_order(folder: Path, tmp_path: Path) -> None:
    assert predict_file(_config(folder, tmp_path / "out")) == ROWS
    answers = xmcdist.load(str(folder / "0")).predict(None, k=4, features=sp.load_npz(folder / "X.npz"))
    assert _labels(tmp_path / "out") == [[(a.label_id, round(a.score, 6)) for a in row] for row in answers]


def test_several_models_answer_together(folder: Path, tmp_path: Path) -> None:
    models = [str(folder / "0"), str(folder / "1")]
    words = [f"model=[{models[0]},{models[1]}]", "ensemble=round_robin", f"input={folder / 'X.npz'}", "batch=2", "k=4"]
    cfg = compose_run([*words, f"output={tmp_path / 'out'}"], config_name="predict")
    assert cfg.model == models
    predict_file(cfg)
    answers = Ensemble.load(models, "round_robin").predict(None, k=4, features=sp.load_npz(folder / "X.npz"))
    assert _labels(tmp_path / "out") == [[(a.label_id, round(a.score, 6)) for a in row] for row in answers]
    alone = compose_run([f"model={models[0]}", *words[2:], "output=o"], config_name="predict")
    assert (alone.model, alone.ensemble) == (models[0], None)


@on_ranks(2, 3)
def test_ranks_and_shared_labels_change_nothing(folder: Path, rank: int, world_size: int) -> None:
    models = [str(folder / "0"), str(folder / "1")]
    world = World(rank, world_size, rank, world_size, "cpu")
    for name, more in (("one", {}), ("two", {"model": models, "ensemble": "rank"})):
        for parallel in ("documents", "labels"):
            output = folder / f"{name}-{parallel}-{world_size}"
            predict_file(_config(folder, output, parallel=parallel, **more), world)
            if rank == 0:
                model = Ensemble.load(models, "rank") if name == "two" else xmcdist.load(models[0])
                answers = model.predict(None, k=4, features=sp.load_npz(folder / "X.npz"))
                want = [[(a.label_id, round(a.score, 6)) for a in row] for row in answers]
                assert _labels(output) == want
            world.barrier()


def test_selected_labels_get_the_scores_that_a_full_beam_gives(folder: Path) -> None:
    model, X = xmcdist.load(str(folder / "0")), sp.load_npz(folder / "X.npz")
    every = model.scores(None, features=X, k=20, beam=7)
    wanted = sp.csr_matrix((np.random.default_rng(0).random((ROWS, 20)) < 0.3).astype(np.float32))
    got = model.scores(None, features=X, selected=wanted)
    assert got.nnz == wanted.nnz
    assert (got != every.multiply(wanted > 0)).nnz == 0


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        ({"input": "docs.txt"}, r"was trained on given features: give input=X\.npz"),
        ({"features": "X.npz"}, r"was trained on given features: give input=X\.npz"),
        ({"input": "bad.npz"}, r"bad\.npz is no sparse matrix"),
        ({"features": "nowhere.npz"}, r"features=.*nowhere\.npz does not exist"),
        ({"input": "narrow.npz"}, "features have 3 columns; the model has 12"),
        ({"ensemble": "rank"}, "ensemble=rank needs several models"),
        ({"batch": 0}, "batch=0 must be at least 1"),
    ],
)
def test_what_the_model_does_not_read_is_refused(
    folder: Path, tmp_path: Path, more: dict[str, object], answer: str
) -> None:
    (tmp_path / "docs.txt").write_text("a document\n")
    (tmp_path / "bad.npz").write_text("no zip")
    sp.save_npz(tmp_path / "narrow.npz", sp.csr_matrix((2, 3)))
    sp.save_npz(tmp_path / "X.npz", sp.load_npz(folder / "X.npz"))
    placed = {k: str(tmp_path / v) if k in ("input", "features") else v for k, v in more.items()}
    with pytest.raises(UserError, match=answer):
        predict_file(_config(folder, tmp_path / "out", **placed))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [4, 5, 6])
def test_rows_beside_texts_must_be_as_many(rows: int) -> None:
    X = sp.csr_matrix(np.arange(1.0, rows + 1)[:, None])
    rounds = [_Round(0, ["a", "b"], None, 4, 4), _Round(4, ["e"], None, 5, 5)]
    cfg = PredictConfig(model="m", input="docs.txt", features="X.npz", output="o")
    if rows == 5:
        found = list(_with_features(iter(rounds), X, cfg))
        assert [r.features.toarray().ravel().tolist() for r in found if r.features is not None] == [[1, 2], [5]]
        return
    told = "more" if rows == 4 else "5"
    with pytest.raises(UserError, match=rf"features=X\.npz has {rows} rows, and input=docs\.txt {told} documents"):
        list(_with_features(iter(rounds), X, cfg))
