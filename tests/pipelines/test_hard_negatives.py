"""A run whose levels learn from the confusions of the level above, checked against its own files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.launch import launch
from tests.helpers.toy import TINY_RUN, write_text_folder
from xmcdist.sparse.store import open_csr

SHARE, KEPT = 0.15, 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hard")
    data = write_text_folder(folder / "data")
    args = [f"dataset.path={data}", f"run_dir={folder / 'run'}", *TINY_RUN, "negatives.scheme=tfn+man+consistent"]
    args += [
        "negatives.weight=score",
        f"negatives.consistent_share={SHARE}",
        f"negatives.confusions_per_cluster={KEPT}",
    ]
    launch(
        2,
        "train",
        *args,
        "negatives.weight=score",
        "matcher.steps=[20]",
        "matcher.beam=3",
        "tree.min_codes=8",
        log=folder / "log",
    )
    return folder / "run"


def _level(run: Path, t: int) -> tuple[np.ndarray, sp.csr_matrix, np.ndarray]:
    """Truth ``[N, K]``, beams, and beams as numbers, NaN where nothing was retrieved."""
    Y = open_csr(run / "stages" / "tree" / f"Y.level-{t}").toarray() > 0
    P = open_csr(run / "stages" / f"match-{t}" / "P")
    beams = np.full(P.shape, np.nan, np.float32)
    for i in range(P.shape[0]):
        a, z = P.indptr[i], P.indptr[i + 1]
        beams[i, P.indices[a:z]] = P.data[a:z]
    return Y, P, beams


@pytest.mark.distributed
@pytest.mark.parametrize("t", [1, 2])
def test_tables_say_what_the_beams_of_both_ranks_hold(run: Path, t: int) -> None:
    Y, _, beams = _level(run, t)
    held = ~np.isnan(beams)
    statistics = np.load(run / "stages" / f"match-{t}" / "statistics.npy")
    np.testing.assert_array_equal(statistics[:3], [Y.sum(0), held.sum(0), (Y & held).sum(0)])
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recall = next(row["beam_recall"] for row in logged if "beam_recall" in row and row["level"] == t)
    assert recall == pytest.approx((Y & held).sum() / Y.sum())
    with open(run / "confusions" / f"level-{t}.tsv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    assert len(rows) > 3
    for row in rows:
        c, w = int(row["cluster"]), int(row["wrong"])
        taken = Y[:, c] & held[:, w] & ~Y[:, w]
        assert int(row["documents"]) == taken.sum() > 0
        assert float(row["share"]) == pytest.approx(taken.sum() / Y[:, c].sum(), abs=1e-4)
        assert float(row["mass"]) == pytest.approx(beams[taken, w].sum(dtype=np.float64), abs=1e-3)
        assert "label " in row["text"]
    masses = [float(row["mass"]) for row in rows]
    assert masses == sorted(masses, reverse=True)


@pytest.mark.distributed
def test_the_next_level_trains_on_them(run: Path) -> None:
    Y, P, beams = _level(run, 1)
    held = ~np.isnan(beams)
    M = open_csr(run / "stages" / "match-2" / "M")
    added = 0
    for i in range(M.shape[0]):
        want = dict.fromkeys(np.flatnonzero(Y[i]), 1.0)
        scores = {int(w): float(beams[i, w]) for w in np.flatnonzero(held[i])}
        for c in np.flatnonzero(Y[i]):
            wrong = []
            for w in range(Y.shape[1]):
                taken = Y[:, c] & held[:, w] & ~Y[:, w]
                if taken.any():
                    wrong.append((-beams[taken, w].sum(dtype=np.float64), w, taken))
            for mass, w, taken in sorted(wrong, key=lambda x: x[:2])[:KEPT]:
                if taken.sum() >= SHARE * Y[:, c].sum():
                    added += w not in want and w not in scores
                    scores[w] = max(scores.get(w, 0.0), -mass / taken.sum())
        want = scores | want
        a, z = M.indptr[i], M.indptr[i + 1]
        assert M.indices[a:z].tolist() == sorted(want)
        np.testing.assert_allclose(M.data[a:z], [want[int(c)] for c in M.indices[a:z]], rtol=1e-5)
    assert added > 0  # parents that neither the document's labels nor its own beam would have given
    assert P.shape[1] < 10
    assert json.loads((run / "results.json").read_text())["metrics"]["P@1"] > 60
