"""Metrics against the slow reference, scikit-learn, and numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import ndcg_score

from tests.evaluation.slow import bands, reference
from tests.helpers.ranks import on_ranks
from xmcdist.config.errors import UserError
from xmcdist.evaluation.bands import BANDS, label_bands
from xmcdist.evaluation.metrics import MetricSums
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range

L, KS = 30, [1, 3, 5, 10]


def _data(documents: int, seed: int = 0, width: int = 10) -> tuple[np.ndarray, sp.csr_matrix, np.ndarray]:
    """Predictions with empty slots at the end, truths of 0 to 14 labels, frequencies with ties."""
    rng = np.random.default_rng(seed)
    labels = np.full((documents, width), -1)
    Y = np.zeros((documents, L), dtype=np.float32)
    for i in range(documents):
        count = int(rng.integers(0, width + 1))
        labels[i, :count] = rng.choice(L, count, replace=False)
        Y[i, rng.choice(L, int(rng.integers(0, 15)), replace=False)] = 1
    return labels, sp.csr_matrix(Y), rng.integers(0, 12, L)


def _truth(Y: sp.csr_matrix) -> list[set[int]]:
    return [set(np.flatnonzero(row).tolist()) for row in Y.toarray()]


def _sums(frequency: np.ndarray, **changes: Any) -> MetricSums:
    settings: dict[str, Any] = {"ks": KS, "num_train": 500, "a": 0.55, "b": 1.5, "head_share": 0.2, "tail_below": 4}
    return MetricSums(label_frequency=frequency, **{**settings, **changes})


def _slow(labels: np.ndarray, Y: sp.csr_matrix, frequency: np.ndarray, **changes: Any) -> dict[str, float]:
    settings: dict[str, Any] = {"ks": KS, "n": 500, "a": 0.55, "b": 1.5, "head_share": 0.2, "tail_below": 4}
    return reference(labels.tolist(), _truth(Y), frequency.tolist(), **{**settings, **changes})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_equals_the_slow_reference(seed: int, batch: int) -> None:
    labels, Y, frequency = _data(60, seed)
    sums = _sums(frequency)
    for start in range(0, 60, batch):
        sums.update(labels[start : start + batch], Y[start : start + batch])
    assert sums.result() == pytest.approx(_slow(labels, Y, frequency), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("width", [2, 25])
def test_fewer_or_more_predictions_than_cut_offs(width: int) -> None:
    labels, Y, frequency = _data(40, 7, width)
    sums = _sums(frequency)
    sums.update(labels, Y)
    assert sums.result() == pytest.approx(_slow(labels, Y, frequency), rel=1e-12, abs=1e-12)


def test_other_propensities_and_bands() -> None:
    labels, Y, frequency = _data(50, 3)
    sums = _sums(frequency, ks=[7, 2, 2], a=0.6, b=2.6, num_train=12_345, head_share=0.5, tail_below=0)
    sums.update(labels, Y)
    want = _slow(labels, Y, frequency, ks=[2, 7], a=0.6, b=2.6, n=12_345, head_share=0.5, tail_below=0)
    assert sums.result() == pytest.approx(want, rel=1e-12, abs=1e-12)
    assert "tail/R@2" not in sums.result()  # no label is tail


def test_ndcg_equals_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    scores = rng.permuted(np.tile(np.arange(L, dtype=float), (50, 1)), axis=1)
    _, Y, frequency = _data(50, 4)
    Y = Y[np.diff(Y.indptr) > 0]
    scores = scores[: Y.shape[0]]
    sums = _sums(frequency)
    sums.update(np.argsort(-scores, axis=1)[:, :10], Y)
    for k in KS:
        assert sums.result()[f"nDCG@{k}"] == pytest.approx(100 * ndcg_score(Y.toarray(), scores, k=k), rel=1e-12)


def test_propensity_scored_precision_by_hand() -> None:
    # A = B = 1 and N = 20: 1/p = 1 + (ln 20 - 1) * 2 / (n + 1), for labels of n = 0, 1 and 3 documents.
    rare, common = 1 + (math.log(20) - 1) * 2, 1 + (math.log(20) - 1) / 2
    sums = MetricSums(ks=[1, 2], label_frequency=np.array([0, 1, 3]), num_train=20, a=1.0, b=1.0)
    sums.update(np.array([[2, 1], [1, 0]]), sp.csr_matrix([[1, 0, 1], [1, 0, 0]]))
    # Document 1 is given the common label, then a wrong one; document 2 the wrong one, then the rare one.
    got = sums.result()
    assert got["PSP@1"] == pytest.approx(100 * common / (rare + rare))
    assert got["PSP@2"] == pytest.approx(100 * (common + rare) / ((rare + common) + rare))
    second = 1 / math.log2(3)
    hits = common / (1 + second) + rare * second / 1
    best = (rare + common * second) / (1 + second) + rare / 1
    assert got["PSnDCG@2"] == pytest.approx(100 * hits / best)
    assert got["P@1"] == 50.0
    assert got["P@2"] == 50.0
    assert got["R@2"] == 75.0


def test_the_oracle_scores_one_hundred() -> None:
    _, Y, frequency = _data(40, 5)
    weight = 1 + (math.log(500) - 1) * 2.5**0.55 * (frequency + 1.5) ** -0.55
    labels = np.full((40, 10), -1)
    for i, truth in enumerate(_truth(Y)):
        best = sorted(truth, key=lambda label: -weight[label])[:10]
        labels[i, : len(best)] = best
    sums = _sums(frequency)
    sums.update(labels, Y)
    for k in KS:
        for name in ("PSP", "PSnDCG", "nDCG"):
            assert sums.result()[f"{name}@{k}"] == pytest.approx(100.0)


def test_bands_of_label_with_ties() -> None:
    frequency = np.array([5, 9, 9, 9, 0, 3, 5, 4, 1, 2])
    got = [BANDS[b] for b in label_bands(frequency, 0.2, 4)]
    # Of the three labels with 9 documents the two with the smaller ids are the head.
    assert got == ["torso", "head", "head", "torso", "tail", "tail", "torso", "torso", "tail", "tail"]
    assert got == bands(frequency.tolist(), 0.2, 4)
    assert [BANDS[b] for b in label_bands(np.array([1, 2]), 0.5, 6)] == ["tail", "head"]  # head comes before tail


def test_bands_sum_to_the_whole() -> None:
    labels, Y, frequency = _data(60, 8)
    sums = _sums(frequency)
    sums.update(labels, Y)
    got = sums.result()
    for k in KS:
        assert sum(got[f"{band}/P@{k}"] for band in BANDS) == pytest.approx(got[f"P@{k}"], rel=1e-12)


def test_documents_without_labels_are_skipped_and_counted() -> None:
    labels, Y, frequency = _data(30, 2)
    with_labels = np.diff(Y.indptr) > 0
    assert not with_labels.all()
    every, some = _sums(frequency), _sums(frequency)
    every.update(labels, Y)
    some.update(labels[with_labels], Y[with_labels])
    assert every.result() == {**some.result(), "documents_without_labels": float((~with_labels).sum())}
    assert (every.documents, every.skipped) == (int(with_labels.sum()), int((~with_labels).sum()))
    nothing = _sums(frequency)
    nothing.update(labels[:0], Y[:0])
    nothing.update(labels[~with_labels], Y[~with_labels])
    assert nothing.result() == {"documents": 0.0, "documents_without_labels": float((~with_labels).sum())}


def test_truth_in_any_form_is_read_and_left_alone() -> None:
    labels, Y, frequency = _data(30, 6)
    plain, odd = _sums(frequency), _sums(frequency)
    plain.update(labels, Y)
    rows = np.repeat(np.arange(30), np.diff(Y.indptr))
    # Backwards within each row, with duplicates, a stored zero and values other than one.
    order = np.lexsort((-Y.indices, rows))
    order = np.concatenate([order, order[:5]])
    order = order[np.argsort(rows[order], kind="stable")]
    zero = next(j for j in range(L) if j not in _truth(Y)[29])
    indices = np.append(Y.indices[order], zero).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(np.append(rows[order], 29), minlength=30))])
    messy = sp.csr_matrix((np.append(np.full(order.size, 0.5), 0.0), indices, indptr), shape=(30, L))
    messy.data.flags.writeable = messy.indices.flags.writeable = False
    odd.update(labels, messy)
    assert odd.result() == plain.result()


def test_bad_predictions_are_refused() -> None:
    sums = _sums(np.ones(L, dtype=np.int64))
    Y = sp.csr_matrix((1, L), dtype=np.float32)
    with pytest.raises(ValueError, match=r"-1\.\.30 must be in"):
        sums.update(np.array([[30]]), Y)
    with pytest.raises(ValueError, match="document 0 of 1"):
        sums.update(np.array([[3, -1, 3]]), Y)
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        sums.update(np.array([[1], [2]]), Y)
    with pytest.raises(UserError, match=r"evaluation\.ks"):
        _sums(np.ones(L, dtype=np.int64), ks=[0, 1])
    with pytest.raises(UserError, match="propensity_b"):
        _sums(np.ones(L, dtype=np.int64), b=0.0)


@on_ranks(1, 2, 3)
def test_ranks_together_equal_the_slow_reference(rank: int, world_size: int) -> None:
    labels, Y, frequency = _data(31, 9)
    start, stop = row_range(31, rank, world_size)
    if world_size == 3 and rank == 1:
        start = stop = 0  # a rank without documents
    sums = _sums(frequency)
    for i in range(start, stop, 4):
        sums.update(labels[i : min(i + 4, stop)], Y[i : min(i + 4, stop)])
    sums.reduce(World(rank, world_size, rank, world_size, "cpu"))
    kept = np.ones(31, dtype=bool)
    if world_size == 3:
        kept[slice(*row_range(31, 1, 3))] = False
    want = _slow(labels[kept], Y[kept], frequency)
    assert sums.result() == pytest.approx(want, rel=1e-12, abs=1e-12)
    assert sums.documents + sums.skipped == kept.sum()
