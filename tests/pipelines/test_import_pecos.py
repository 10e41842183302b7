"""Models in PECOS's files answer here as their own formulas say; what cannot be converted is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import xmcdist
from tests.helpers.pecos_model import WIDTH, Chain
from xmcdist.config.commands import EvaluateConfig, ImportPecosConfig
from xmcdist.config.errors import UserError
from xmcdist.config.schema import DatasetConfig, EvaluationConfig
from xmcdist.parallel.launch import World
from xmcdist.pipelines.evaluation import evaluate_model
from xmcdist.pipelines.import_pecos import import_pecos
from xmcdist.rankers.pecos import read_pecos


def _import(source: Path, output: Path, **more: str) -> list[str]:
    return import_pecos(ImportPecosConfig(source=str(source), output=str(output), **more))


@pytest.mark.parametrize(
    "chain",
    [
        Chain(),
        Chain(bias=-1.0, post=("sigmoid", "sigmoid", "sigmoid")),
        Chain(bias=2.5, post=("l2-hinge", "l2-hinge", "noop")),
        Chain(post=("log-l3-hinge", "log-l3-hinge", "log-l3-hinge"), seed=3),
    ],
    ids=["plain", "no bias", "bias 2.5, last level noop", "log"],
)
@pytest.mark.parametrize("beam", [2, 7])
def test_scores_are_those_of_the_formulas(chain: Chain, beam: int, tmp_path: Path) -> None:
    _import(chain.write(tmp_path / "pecos"), tmp_path / "model")
    model = xmcdist.load(str(tmp_path / "model"))
    got = model.scores(None, features=sp.csr_matrix(chain.X), k=20, beam=beam)
    for i, want in enumerate(chain.scores(beam)):
        row = slice(got.indptr[i], got.indptr[i + 1])
        assert got.indices[row].tolist() == sorted(want)
        np.testing.assert_allclose(got.data[row], [want[j] for j in sorted(want)], rtol=2e-5, atol=1e-6)


def test_settings_names_and_answers_are_kept(tmp_path: Path) -> None:
    chain = Chain(topk=(3, 3, 6))
    (tmp_path / "names.txt").write_text("".join(f"größe {i}\n" for i in range(20)))
    notes = _import(chain.write(tmp_path / "pecos"), tmp_path / "model", labels=str(tmp_path / "names.txt"))
    assert "levels 3 > 7 > 20" in notes[0]
    model = xmcdist.load(str(tmp_path / "model"))
    assert (model.meta["beam"], model.meta["topk"], model.rankers.post_processor) == (3, 6, "l3-hinge")
    want = chain.scores(3)[0]
    best = sorted(want, key=lambda i: (-want[i], i))[:4]
    answer = model.predict(None, k=4, features=chain.X)[0]
    assert [a.label_id for a in answer] == best
    assert [a.label for a in answer] == [f"größe {i}" for i in best]
    assert all(a.probability is None for a in answer)


def test_beams_that_differ_are_told(tmp_path: Path) -> None:
    model = read_pecos(Chain(topk=(2, 5, 6)).write(tmp_path / "pecos"))
    assert model.beam == 5
    assert "beam sizes differ by level (2, 5)" in model.notes[0]


def test_the_chain_alone_and_a_text2text_folder_are_read(tmp_path: Path) -> None:
    chain = Chain()
    chain.write(tmp_path / "t2t" / "xlinear_ensemble" / "0")
    (tmp_path / "t2t" / "output_items.json").write_text(json.dumps([f"item {i}" for i in range(20)]))
    found = read_pecos(tmp_path / "t2t")
    assert found.labels is not None
    assert found.labels[19] == "item 19"
    assert "features must be given" in found.notes[0]
    alone = read_pecos(tmp_path / "t2t" / "xlinear_ensemble" / "0" / "ranker")
    assert alone.rankers.tree.fingerprint == found.rankers.tree.fingerprint
    (tmp_path / "t2t" / "output_items.json").write_text(json.dumps(["one"]))
    with pytest.raises(UserError, match=r"output_items\.json: 1 items for 20 labels"):
        read_pecos(tmp_path / "t2t")
    chain.write(tmp_path / "t2t" / "xlinear_ensemble" / "1")
    with pytest.raises(UserError, match=r"an ensemble of 2 models: import .*one by one"):
        read_pecos(tmp_path / "t2t")


def test_one_level_without_clusters(tmp_path: Path) -> None:
    """libpecos's one-vs-all model: every label hangs below the root."""
    rng = np.random.default_rng(0)
    folder, W = Chain().write(tmp_path / "pecos"), rng.normal(size=(WIDTH + 1, 5)).astype(np.float32)
    _change(folder / "ranker" / "param.json", depth=1)
    sp.save_npz(folder / "ranker" / "0.model" / "W.npz", sp.csc_matrix(W))
    sp.save_npz(folder / "ranker" / "0.model" / "C.npz", sp.csc_matrix(np.ones((5, 1), np.float32)))
    _import(folder, tmp_path / "model")
    X = rng.random((4, WIDTH)).astype(np.float32)
    got = xmcdist.load(str(tmp_path / "model")).scores(None, features=sp.csr_matrix(X), k=5).toarray()
    v = np.hstack([X, np.ones((4, 1))]) @ W
    np.testing.assert_allclose(got, np.exp(-(np.maximum(0, 1 - v) ** 3)), rtol=1e-5)


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _matrix(name: str, change: Callable[[sp.lil_matrix], Any]) -> Callable[[Path], None]:
    return lambda folder: sp.save_npz(
        folder / "ranker" / name, sp.csc_matrix(change(sp.load_npz(folder / "ranker" / name).tolil()))
    )


def _with(at: Any, value: float) -> Callable[[sp.lil_matrix], sp.lil_matrix]:
    def change(A: sp.lil_matrix) -> sp.lil_matrix:
        A[at] = value
        return A

    return change


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _pickle(path: Path) -> None:
    np.savez(path, data=np.array([{}], dtype=object), format=np.array("csc", dtype=object))


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        (lambda f: shutil.rmtree(f), r"source=.* is no folder"),
        (lambda f: (f / "param.json").unlink(), r"pecos/param\.json does not exist"),
        (lambda f: (f / "param.json").write_text("{"), r"pecos/param\.json is damaged"),
        (lambda f: (f / "ranker" / "param.json").unlink(), r"ranker/param\.json does not exist"),
        (lambda f: _change(f / "ranker" / "param.json", depth=0), r"ranker/param\.json: depth is 0"),
        (lambda f: _change(f / "ranker" / "param.json", depth=4), r"3\.model/param\.json does not exist"),
        (lambda f: _change(f / "ranker" / "param.json", nr_features=11), r"0\.model/W\.npz is 13 x 3, must be 12 x 3"),
        (lambda f: (f / "ranker/1.model/W.npz").unlink(), r"1\.model/W\.npz does not exist"),
        (lambda f: _cut(f / "ranker/1.model/W.npz"), r"1\.model/W\.npz is no sparse matrix"),
        (lambda f: _cut(f / "ranker/2.model/C.npz"), r"2\.model/C\.npz is no sparse matrix"),
        (lambda f: _pickle(f / "ranker/2.model/C.npz"), r"2\.model/C\.npz is no sparse matrix"),
        (lambda f: _change(f / "ranker/1.model/param.json", pred_kwargs={}), r"1\.model/param\.json is damaged"),
        (
            lambda f: _change(f / "ranker/2.model/param.json", pred_kwargs={"only_topk": 3, "post_processor": "l9"}),
            r"2\.model/param\.json: post_processor 'l9' is none of noop",
        ),
        (
            lambda f: _change(f / "ranker/1.model/param.json", pred_kwargs={"only_topk": 3, "post_processor": "noop"}),
            r"different post-processors \(l3-hinge, noop\)",
        ),
        (_matrix("1.model/W.npz", _with((4, 2), np.nan)), r"1\.model/W\.npz.* holds nan"),
        (
            _matrix("2.model/C.npz", _with((4, slice(None)), 0)),
            r"2\.model/C\.npz: row 4 has 0 parents; was the model pruned",
        ),
        (_matrix("2.model/C.npz", _with((4, 5), 1)), r"2\.model/C\.npz: row 4 has 2 parents, and a tree gives one"),
        (_matrix("2.model/C.npz", lambda A: A[:, :6]), r"2\.model/C\.npz has 6 parents; the level above has 7 nodes"),
        (_matrix("2.model/C.npz", lambda A: A[:19]), r"2\.model/W\.npz is 13 x 20, must be 13 x 19"),
        (_matrix("0.model/C.npz", lambda A: sp.identity(3)), r"hangs below 3 clusters .* the ranker half of a model"),
        (lambda f: _change(f / "ranker" / "param.json", is_mmap=True), r"compiled for memory mapping"),
        (lambda f: _change(f / "param.json", model="XTransformer"), r"is a PECOS XTransformer: its transformer cannot"),
        (lambda f: _change(f / "param.json", model="MLModel"), r"is one level of a PECOS model"),
        (lambda f: _change(f / "param.json", model="HNSW"), r"says HNSW: only XLinearModel can be read"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_file(
    damage: Callable[[Path], Any], answer: str, tmp_path: Path
) -> None:
    folder = Chain(topk=(3, 3, 6)).write(tmp_path / "pecos")
    damage(folder)
    with pytest.raises(UserError, match=answer):
        _import(folder, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] in (["pecos"], [])


def test_labels_frequencies_and_places_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = Chain().write(tmp_path / "pecos")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"names\.txt has 2 lines; the model has 20 labels"):
        _import(folder, tmp_path / "model", labels=str(tmp_path / "names.txt"))
    sp.save_npz(tmp_path / "Y.npz", sp.csr_matrix(np.ones((3, 19))))
    with pytest.raises(UserError, match=r"Y\.npz has 19 columns; the model has 20 labels"):
        _import(folder, tmp_path / "model", label_frequency=str(tmp_path / "Y.npz"))
    with pytest.raises(UserError, match=r"output=.*pecos is there already"):
        _import(folder, folder)
    assert (folder / "ranker" / "2.model" / "W.npz").exists()


def test_given_features_of_another_width_are_refused(tmp_path: Path) -> None:
    _import(Chain().write(tmp_path / "pecos"), tmp_path / "model")
    model = xmcdist.load(str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"features have 5 columns; the model has 12"):
        model.predict(None, features=sp.csr_matrix((2, 5)))
    with pytest.raises(UserError, match=r"pass features=\[n, 12\]"):
        model.predict(["a text"])


def _data(folder: Path, X: np.ndarray, Y: np.ndarray) -> DatasetConfig:
    folder.mkdir()
    for split in ("trn", "tst"):
        sp.save_npz(folder / f"X.{split}.npz", sp.csr_matrix(X))
        sp.save_npz(folder / f"Y.{split}.npz", sp.csr_matrix(Y.astype(np.float32)))
    return DatasetConfig(name="d", path=str(folder))


def test_evaluate_measures_an_imported_model(tmp_path: Path) -> None:
    """Half of the best answers are made true; frequencies come from the import, or else from the data set."""
    chain = Chain()
    Y = np.zeros((9, 20), int)
    for i, found in enumerate(chain.scores(3)):
        best = sorted(found, key=lambda j: (-found[j], j))
        Y[i, best[0] if i % 2 else best[2]] = 1
    data = _data(tmp_path / "data", chain.X, Y)
    told = {"label_frequency": str(tmp_path / "data" / "Y.trn.npz")}
    results = []
    for name, more in (("bare", {}), ("told", told)):
        notes = _import(Chain(topk=(3, 3, 6)).write(tmp_path / "pecos"), tmp_path / name, **more)
        assert any("not known" in note for note in notes) == (name == "bare")
        cfg = EvaluateConfig(model=str(tmp_path / name), dataset=data, evaluation=EvaluationConfig(ks=[1, 3]))
        results.append(evaluate_model(cfg, World.single()))
    assert results[0] == results[1]
    assert results[0]["P@1"] == pytest.approx(100 * 4 / 9)
    assert results[0]["R@3"] == pytest.approx(100)
