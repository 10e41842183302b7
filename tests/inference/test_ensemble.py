"""Ensembles against PECOS's rules written as plain Python, and against one another in blocks."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.pecos_model import WIDTH, Chain
from xmcdist.config.commands import ImportPecosConfig
from xmcdist.config.errors import UserError
from xmcdist.inference import ensemble as module
from xmcdist.inference.ensemble import METHODS, Ensemble, combine, open_model
from xmcdist.pipelines.import_pecos import import_pecos

Rows = list[dict[int, float]]


def _model(rng: np.random.Generator, rows: int, labels: int, k: int) -> Rows:
    """Up to k labels a row, scores with many ties, some of them 0, some negative; some rows empty."""
    made: Rows = []
    for i in range(rows):
        size = 0 if i % 7 == 3 else int(rng.integers(1, k + 1))
        ids = rng.choice(labels, size=size, replace=False)
        made.append({int(j): float(s) for j, s in zip(ids, rng.integers(-3, 5, size=size) / 4, strict=True)})
    return made


def _csr(rows: Rows, labels: int) -> sp.csr_matrix:
    ids = [sorted(row) for row in rows]
    values = [row[j] for row, own in zip(rows, ids, strict=True) for j in own]
    ptr = np.cumsum([0, *map(len, ids)])
    return sp.csr_matrix(
        (np.array(values, np.float32), np.array([j for own in ids for j in own], np.int32), ptr), (len(rows), labels)
    )


def _reference(models: list[Rows], method: str, k: int, depth: int) -> Rows:
    """PECOS's CsrEnsembler, a document and a label at a time."""
    out = []
    for parts in zip(*models, strict=True):
        total: dict[int, float] = defaultdict(float)
        for m, row in enumerate(parts):
            order = sorted(row, key=lambda j: (-row[j], j))
            for place, j in enumerate(order):
                if method == "average":
                    total[j] += row[j]
                elif method == "sigmoid":
                    total[j] += 1 / (1 + math.exp(-row[j]))
                elif method == "softmax":
                    total[j] += math.exp(row[j]) / sum(math.exp(s) for s in row.values())
                elif method == "rank":
                    total[j] += depth - place
                else:
                    total[j] = max(total[j], depth - place + (len(models) - m) / (len(models) + 1))
        mean = {j: float(np.float32(s / len(models))) for j, s in total.items()}
        best = sorted(mean, key=lambda j: (-mean[j], j))[:k]
        out.append({j: mean[j] for j in sorted(best)})
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_scores_are_those_of_the_rules(method: str, models: int) -> None:
    rng = np.random.default_rng(models)
    rows = [_model(rng, 40, 15, 6) for _ in range(models)]
    got = combine([_csr(r, 15) for r in rows], method, 5, depth=6)
    for i, want in enumerate(_reference(rows, method, 5, depth=6)):
        own = slice(got.indptr[i], got.indptr[i + 1])
        assert got.indices[own].tolist() == list(want), i
        np.testing.assert_allclose(got.data[own], list(want.values()), rtol=1e-6)
    assert got.dtype == np.float32


def test_round_robin_takes_turns() -> None:
    a, b = {0: 1.0, 1: 0.9, 2: 0.8}, {5: 0.9, 0: 0.8, 7: 0.7}
    got = combine([_csr([a], 9), _csr([b], 9)], "round_robin", 9)
    assert got.indices[np.argsort(-got.data)].tolist() == [0, 5, 1, 2, 7]


def test_large_scores_do_not_overflow() -> None:
    P = _csr([{0: 1e30, 3: -1e30}, {1: -1e30}], 4)
    with np.errstate(all="raise", under="ignore"):
        assert combine([P, P], "softmax", 4).toarray().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
        assert combine([P, P], "sigmoid", 4).toarray().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("method", METHODS)
def test_no_documents_and_no_labels(method: str) -> None:
    assert combine([sp.csr_matrix((0, 4), dtype=np.float32)] * 2, method, 3).shape == (0, 4)
    assert combine([sp.csr_matrix((2, 4), dtype=np.float32)] * 2, method, 3).nnz == 0


def test_matrices_that_cannot_be_combined_are_refused() -> None:
    P = _csr([{0: 1.0}], 4)
    with pytest.raises(ValueError, match="none of average, rank"):
        combine([P], "median", 3)
    with pytest.raises(ValueError, match=r"one shape, not \[\(1, 4\), \(1, 5\)\]"):
        combine([P, _csr([{0: 1.0}], 5)], "rank", 3)
    with pytest.raises(ValueError, match="one shape"):
        combine([], "rank", 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models of other seeds and trees, their labels named alike."""
    folder = tmp_path_factory.mktemp("members")
    (folder / "names.txt").write_text("".join(f"name {i}\n" for i in range(20)))
    for seed in range(3):
        source = Chain(seed=seed, topk=(3, 3, 6)).write(folder / f"pecos-{seed}")
        names = str(folder / "names.txt")
        import_pecos(ImportPecosConfig(source=str(source), output=str(folder / f"{seed}"), labels=names))
    return [str(folder / f"{seed}") for seed in range(3)]


X = sp.csr_matrix(Chain(seed=9).X)


def _rows(P: sp.csr_matrix) -> Rows:
    return [
        dict(zip(P.indices[a:b].tolist(), P.data[a:b].tolist(), strict=True))
        for a, b in zip(P.indptr, P.indptr[1:], strict=False)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_an_ensemble_combines_its_members_answers(folders: list[str], method: str) -> None:
    models = Ensemble.load(folders, method)
    members = [_rows(m.scores(None, features=X, k=4)) for m in models.members]
    assert len({tuple(row) for m in members for row in m}) > 9  # they do not agree
    want = _reference(members, method, 4, depth=4)
    got = models.scores(None, features=X, k=4)
    for own, row in zip(_rows(got), want, strict=True):
        assert own == pytest.approx(row, rel=1e-6)
    answer = models.predict(None, k=4, features=X)
    for row, document in zip(want, answer, strict=True):
        assert [a.label_id for a in document] == sorted(row, key=lambda j: (-row[j], j))
        assert [a.label for a in document] == [f"name {a.label_id}" for a in document]


def test_blocks_change_nothing(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    models = Ensemble.load(folders, "rank")
    whole = models.scores(None, features=X, k=3)
    monkeypatch.setattr(module, "_BLOCK", 2)
    parts = models.scores(None, features=X, k=3)
    assert (whole != parts).nnz == 0
    assert np.array_equal(whole.indices, parts.indices)


def test_models_with_other_labels_are_refused_by_name(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"name {i if i != 7 else 'seven'}\n" for i in range(20)))
    source = Chain().write(tmp_path / "pecos")
    other, names = str(tmp_path / "other"), str(tmp_path / "names.txt")
    import_pecos(ImportPecosConfig(source=str(source), output=other, labels=names))
    with pytest.raises(UserError, match=r"label 7 is 'name 7' in .*1 and 'name seven' in .*other"):
        Ensemble.load([folders[1], other])
    ova = tmp_path / "pecos" / "ranker"
    (ova / "param.json").write_text(f'{{"model": "HierarchicalMLModel", "depth": 1, "nr_features": {WIDTH}}}')
    few = str(tmp_path / "few")
    import_pecos(ImportPecosConfig(source=str(source), output=few))
    with pytest.raises(UserError, match=r"same labels: .*0 has 20, .*few has 3"):
        Ensemble.load([folders[0], few])


def test_one_folder_or_several(folders: list[str]) -> None:
    assert not isinstance(open_model(folders[0]), Ensemble)
    several = open_model(folders)
    assert isinstance(several, Ensemble)
    assert several.method == "average"
    with pytest.raises(UserError, match="ensemble=rank needs several models"):
        open_model(folders[0], "rank")
    with pytest.raises(UserError, match="ensemble=median is none of"):
        open_model(folders, "median")
    with pytest.raises(UserError, match="neither a folder nor a list"):
        open_model([])
