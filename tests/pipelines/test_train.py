"""Runs in this process: what must fall to chance, what settings do, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import xmcdist
from tests.helpers.toy import TINY_RUN, texts_and_labels, write_jsonl, write_text_folder
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import UserError
from xmcdist.parallel.launch import World
from xmcdist.pipelines.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("train") / "data")


def _train(path: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    return train(compose_run([f"dataset.path={path}", f"run_dir={run_dir}", *TINY_RUN, *overrides]), World.single())


def test_shuffled_labels_fall_to_chance(tmp_path: Path) -> None:
    """The negative control: nothing in texts tells the labels, so nothing may be learnt of them."""
    path = write_text_folder(tmp_path / "data", shuffled=True)
    results = _train(path, tmp_path / "run")
    assert results["metrics"]["P@1"] < 15  # two labels of forty by chance: 5
    assert results["baseline"]["P@1"] < 15


@pytest.mark.parametrize(
    "overrides",
    [
        ("matcher.bootstrap=linear", "negatives.scheme=man", "matcher.loss=bce", "ranker.features=dense"),
        ("matcher.bootstrap=inherit", "optimizer.head=sparse_adam", "matcher.scoring=pairs", "negatives.max_active=6"),
        ("matcher.bootstrap=none", "encoder.gradient_checkpointing=true", "engine.precision=bf16", "encoder.layers=1"),
        ("matcher.validation_fraction=0.2", "matcher.eval_every=4", "matcher.patience=1", "schedule=cosine"),
        ("ranker.negatives=[tfn,tfn+man]", "ranker.cost_sensitive=true", "ranker.max_nonzeros_per_label=20"),
        ("encoder.pooling=pooler", "matcher.loss=squared_hinge", "ranker.last_post_processor=noop", "features=hashing"),
        ("encoder.pooling=cls", "matcher.max_clusters=20", "ranker.features=sparse", "matcher.scoring=dense"),
    ],
    ids=lambda o: o[0],
)
def test_settings_run_and_the_model_answers_as_it_was_measured(
    data: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    results = _train(data, tmp_path / "run", "evaluation.linear_baseline=false", *overrides)
    model = xmcdist.load(str(tmp_path / "run" / "model"))
    texts = (data / "X.tst.txt").read_text().splitlines()
    Y = sp.load_npz(data / "Y.tst.npz").tocsr()
    answers = model.predict(texts, k=1)
    hits = [a[0].label_id in Y.indices[Y.indptr[i] : Y.indptr[i + 1]] for i, a in enumerate(answers)]
    assert 100 * np.mean(hits) == pytest.approx(
        results["metrics"]["P@1"], abs=1.7
    )  # one document: rounding of embeddings
    assert results["metrics"]["P@1"] > (20 if "ranker.features=dense" in overrides else 60)


def test_early_stopping_stops_and_keeps_the_best(data: Path, tmp_path: Path) -> None:
    _train(
        data,
        tmp_path / "run",
        "evaluation.linear_baseline=false",
        "matcher.steps=[60]",
        "matcher.max_clusters=8",
        "matcher.validation_fraction=0.2",
        "matcher.eval_every=2",
        "matcher.patience=2",
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [r["validation_beam_recall"] for r in rows if "validation_beam_recall" in r]
    assert values[-1] <= max(values)
    assert max(r["step"] for r in rows if "step" in r) < 60  # beam 4 of 4 nodes: recall is 1 from the start


def test_a_run_of_jsonl_names_labels_as_the_source_does(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, count=200)
    cfg = compose_run([f"dataset.path={path}", f"run_dir={tmp_path / 'run'}", "encoder=none", "tree.max_leaf_size=3"])
    train(cfg, World.single())
    answers = xmcdist.load(str(tmp_path / "run" / "model")).predict(["w4 w5 noise1"], k=2)[0]
    assert answers[0].label == "label-2"


def test_bags_of_words_train_the_linear_path_and_refuse_an_encoder(tmp_path: Path) -> None:
    folder = tmp_path / "xc"
    folder.mkdir()
    _, Y = texts_and_labels(120, 12)
    rows = [Y.indices[Y.indptr[i] : Y.indptr[i + 1]] for i in range(120)]
    for name in ("train", "test"):
        lines = [f"{','.join(map(str, r))} " + " ".join(f"{j}:1.0" for j in sorted(r)) for r in rows]
        (folder / f"{name}.txt").write_text("120 12 12\n" + "\n".join(lines) + "\n")
    linear = compose_run(
        [f"dataset.path={folder}", f"run_dir={tmp_path / 'run'}", "encoder=none", "tree.max_leaf_size=4"]
    )
    assert train(linear, World.single())["metrics"]["P@1"] > 90
    model = xmcdist.load(str(tmp_path / "run" / "model"))
    features = sp.csr_matrix(([1.0], ([0], [3])), shape=(1, 12))
    assert model.predict([], k=1, features=features)[0][0].label_id == 3
    with pytest.raises(UserError, match="trained on given features: pass features"):
        model.predict([], k=1)
    with pytest.raises(UserError, match="no texts, so only the linear path is open: set encoder=none"):
        _train(folder, tmp_path / "other")


def test_an_own_tree_is_taken(data: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    parents = np.arange(40) % 5
    sp.save_npz(tree / "C_1.npz", sp.csr_matrix(np.ones((5, 1), dtype=np.float32)))
    sp.save_npz(tree / "C_2.npz", sp.csr_matrix((np.ones(40, np.float32), (np.arange(40), parents)), shape=(40, 5)))
    cfg = compose_run([f"dataset.path={data}", f"run_dir={tmp_path / 'run'}", "encoder=none", f"tree.path={tree}"])
    assert train(cfg, World.single())["metrics"]["P@1"] > 60
    assert "levels 5 > 40" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (("tree.max_leaf_size=500",), r"max_leaf_size.*500.*40 labels"),
        (("matcher.max_clusters=1",), r"matcher.max_clusters=1 is below the \d nodes of the first level"),
        (("encoder=hf", "encoder.name=/no/such/folder"), r"/no/such/folder"),
        (("features.kind=given",), r"features.kind=given, but the data set has no X.trn.npz"),
        (("encoder.layers=9",), r"encoder.layers=9"),
        (("features.min_df=100000",), r"features.min_df"),
    ],
    ids=lambda o: o[0] if isinstance(o, tuple) else "",
)
def test_what_does_not_fit_is_one_clear_error(
    data: Path, tmp_path: Path, overrides: tuple[str, ...], answer: str
) -> None:
    with pytest.raises(UserError, match=answer):
        _train(data, tmp_path / "run", *overrides)


def test_a_damaged_model_is_named(data: Path, tmp_path: Path) -> None:
    cfg = compose_run([f"dataset.path={data}", f"run_dir={tmp_path / 'run'}", "encoder=none", "tree.max_leaf_size=5"])
    train(cfg, World.single())
    model = tmp_path / "run" / "model"
    value = next((model / "rankers" / "level-2").glob("*.safetensors"))
    content = value.read_bytes()
    value.unlink()
    value.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"level-2/part-00000-of-00001\.safetensors"):
        xmcdist.load(str(model))
    with pytest.raises(UserError, match="is no model folder"):
        xmcdist.load(str(tmp_path))
