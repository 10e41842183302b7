"""Ranking metrics of extreme classification, as exact sums over documents and ranks.

P@k, nDCG@k, R@k, and their propensity-scored forms, overall and by how frequent labels are
in training.  Only documents with at least one true label count; the others are skipped and
counted (``documents_without_labels``), for no ranking of theirs is right or wrong.

Bands: with the labels in order of falling training frequency (ties to the smaller id),
*head* is the first ``head_share`` of all labels, *tail* are labels outside it with fewer
than ``tail_below`` training documents, *torso* the rest.  ``band/P@k`` is the part of P@k
that hits in the band bring (the three add up to P@k); ``band/R@k`` is the share of the
band's true labels that are found, averaged over documents that have any.

Source: Jain et al., KDD 2016 (propensities: p_l of label frequency N_l,
``1/p_l = 1 + C (N_l + B)^-A`` with ``C = (ln N - 1)(B + 1)^A``); the Extreme Classification
Repository's normalisation of PSP@k and PSnDCG@k by the oracle ranking.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.parallel.launch import World

__all__ = ["BANDS", "MetricSums", "inverse_propensity", "label_bands"]

BANDS = ("head", "torso", "tail")

F64 = NDArray[np.float64]


def inverse_propensity(frequency: NDArray[np.int64], num_train: int, a: float, b: float) -> F64:
    """``1/p_l`` of each label ``[L]``, at least 1; ``frequency`` in training documents."""
    c = (np.log(num_train) - 1.0) * (b + 1.0) ** a
    inverse: F64 = 1.0 + c * (frequency.astype(np.float64) + b) ** -a
    return inverse


def label_bands(frequency: NDArray[np.int64], head_share: float, tail_below: int) -> NDArray[np.int64]:
    """0 head, 1 torso, 2 tail for each label ``[L]``; see the module's words."""
    order = np.argsort(-frequency, kind="stable")
    bands = np.where(frequency < tail_below, 2, 1)
    bands[order[: round(head_share * frequency.size)]] = 0
    return bands


class MetricSums:
    """Sums from which all metrics follow; add documents, reduce over ranks, read the result."""

    def __init__(
        self,
        *,
        ks: Sequence[int],
        label_frequency: NDArray[np.int64],
        num_train: int,
        a: float = 0.55,
        b: float = 1.5,
        head_share: float = 0.2,
        tail_below: int = 6,
    ) -> None:
        """Args are those of the module's words; ``label_frequency`` is ``[L]``."""
        self.ks = sorted(set(ks))
        frequency = np.asarray(label_frequency, dtype=np.int64)
        self.inverse = inverse_propensity(frequency, max(num_train, 2), a, b)
        self.bands = label_bands(frequency, head_share, tail_below)
        # rows: P nDCG R PSP PSP-oracle PSnDCG PSnDCG-oracle, then (P R documents) a band
        self.sums = np.zeros((7 + 3 * len(BANDS), len(self.ks)), dtype=np.float64)
        self.documents = np.zeros(2, dtype=np.int64)  # scored, without labels

    def update(self, labels: NDArray[np.int64], Y: sp.csr_matrix) -> None:
        """Add documents.

        Args:
            labels: predicted label ids ``[n, k]``, best first, -1 where there is none.
            Y: true labels ``[n, L]``; stored entries above 0 count.

        Cost: O(n k log) for the matching, no loop over documents.
        """
        width = max(self.ks)
        ranked = np.full((labels.shape[0], width), -1, dtype=np.int64)
        ranked[:, : min(width, labels.shape[1])] = labels[:, :width]
        truth = sp.csr_matrix(Y, copy=True)
        truth.data[truth.data <= 0] = 0
        truth.eliminate_zeros()
        counts = np.diff(truth.indptr)
        some = counts > 0
        self.documents += [int(some.sum()), int((~some).sum())]
        truth, ranked, counts = truth[some], ranked[some], counts[some].astype(np.int64)
        hit = _hits(ranked, truth)
        weight = np.where(hit, self.inverse[np.maximum(ranked, 0)], 0.0)
        best = _oracle(truth, self.inverse, width)
        discount = 1.0 / np.log2(np.arange(width) + 2.0)
        ideal = np.concatenate([[0.0], np.cumsum(discount)])
        for column, k in enumerate(self.ks):
            found = hit[:, :k]
            gain = found @ discount[:k]
            base = ideal[np.minimum(counts, k)]
            self.sums[:7, column] += [
                found.sum() / k,
                (gain / base).sum(),
                (found.sum(axis=1) / counts).sum(),
                weight[:, :k].sum() / k,
                best[:, :k].sum() / k,
                (weight[:, :k] @ discount[:k] / base).sum(),
                (best[:, :k] @ discount[:k] / base).sum(),
            ]
            self._add_bands(column, k, ranked, hit, truth)

    def _add_bands(
        self, column: int, k: int, ranked: NDArray[np.int64], hit: NDArray[np.bool_], truth: sp.csr_matrix
    ) -> None:
        rows = np.repeat(np.arange(truth.shape[0]), np.diff(truth.indptr))
        for band in range(len(BANDS)):
            of_band = np.bincount(rows[self.bands[truth.indices] == band], minlength=truth.shape[0])
            found = (hit[:, :k] & (self.bands[np.maximum(ranked[:, :k], 0)] == band)).sum(axis=1)
            have = of_band > 0
            self.sums[7 + 3 * band : 10 + 3 * band, column] += [
                found.sum() / k,
                (found[have] / of_band[have]).sum(),
                have.sum(),
            ]

    def reduce(self, world: World) -> None:
        """Add up the ranks' sums; collective."""
        if world.world_size > 1:
            from xmcdist.parallel.collectives import all_reduce_array

            self.sums, self.documents = all_reduce_array(self.sums), all_reduce_array(self.documents)

    def result(self) -> dict[str, float]:
        """Percent by key: ``"P@1"``, ``"nDCG@3"``, ``"R@10"``, ``"PSP@5"``, ``"PSnDCG@5"``, ``"tail/R@10"``;
        and the numbers of documents scored and skipped."""
        n = max(int(self.documents[0]), 1)
        out: dict[str, float] = {}
        for column, k in enumerate(self.ks):
            p, ndcg, r, psp, psp_best, psn, psn_best = self.sums[:7, column].tolist()
            out |= {
                f"P@{k}": 100 * p / n,
                f"nDCG@{k}": 100 * ndcg / n,
                f"R@{k}": 100 * r / n,
                f"PSP@{k}": 100 * psp / psp_best if psp_best else 0.0,
                f"PSnDCG@{k}": 100 * psn / psn_best if psn_best else 0.0,
            }
            for band, name in enumerate(BANDS):
                hits, recall, have = self.sums[7 + 3 * band : 10 + 3 * band, column].tolist()
                out[f"{name}/P@{k}"] = 100 * hits / n
                out[f"{name}/R@{k}"] = 100 * recall / have if have else 0.0
        out["documents"] = float(self.documents[0])
        out["documents_without_labels"] = float(self.documents[1])
        return out


def _hits(ranked: NDArray[np.int64], truth: sp.csr_matrix) -> NDArray[np.bool_]:
    """Which predictions are true ``[n, k]``: a search for (row, label) in the sorted true pairs."""
    rows = np.repeat(np.arange(truth.shape[0], dtype=np.int64), np.diff(truth.indptr))
    pairs = np.sort(rows * truth.shape[1] + truth.indices)
    if not pairs.size:
        return np.zeros(ranked.shape, dtype=np.bool_)
    asked = np.arange(ranked.shape[0], dtype=np.int64)[:, None] * truth.shape[1] + ranked
    place = np.minimum(np.searchsorted(pairs, asked), pairs.size - 1)
    return (pairs[place] == asked) & (ranked >= 0)


def _oracle(truth: sp.csr_matrix, inverse: F64, width: int) -> F64:
    """Inverse propensities of each document's true labels, largest first, ``[n, width]``, 0 beyond."""
    lengths = np.diff(truth.indptr)
    rows = np.repeat(np.arange(truth.shape[0]), lengths)
    values = inverse[truth.indices]
    order = np.lexsort((-values, rows))
    place = np.arange(order.size) - np.repeat(truth.indptr[:-1], lengths)
    kept = place < width
    out = np.zeros((truth.shape[0], width), dtype=np.float64)
    out[rows[kept], place[kept]] = values[order[kept]]
    return out
