"""Exact ranking metrics of extreme classification, summed document by document.

Shapes: n documents of one update, k predictions a document, L labels, K cut-offs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from xmcdist.config.errors import UserError
from xmcdist.evaluation.bands import BANDS, label_bands
from xmcdist.evaluation.ranked import discounts, inverse_propensity, mark_hits, oracle_weights, positives

if TYPE_CHECKING:
    from xmcdist.parallel.launch import World

__all__ = ["MetricSums"]

_MEANS = ("R", "nDCG", "PSP", "PSP oracle", "PSnDCG", "PSnDCG oracle")


class MetricSums:
    """Sums over test documents from which every metric follows.

    A rank updates with its own documents, `reduce` adds the ranks, `result` divides.
    What is counted is kept in int64 and what is weighted in float64, so the result does
    not depend on how documents were split over batches and ranks (up to the last bits
    of a float64).

    With r_1, r_2, .. a document's predictions, y its set of true labels, and C(m) the sum
    of 1/log2(j+1) over j = 1 .. m:

    * P@k: mean of ``hits in the first k / k``.  Fewer predictions than k count as misses.
    * R@k: mean of ``hits in the first k / |y|``.
    * nDCG@k: mean of ``sum over hits j <= k of 1/log2(j+1) / C(min(k, |y|))``.
    * PSP@k, PSnDCG@k: hits weighted by the inverse propensity of their label, divided by
      the same of the oracle that ranks the true labels by inverse propensity: a ratio of
      the two means, not a mean of ratios.  Each document's PSnDCG is divided by
      C(min(k, |y|)) above and below.
    * ``band/P@k``: P@k that counts only hits of the band's labels; the bands of
      `label_bands` sum to P@k.
    * ``band/R@k``: R@k of the band's labels alone, mean over the documents that have any.

    Documents without true labels are skipped: no ranking of them is right or wrong.  They
    are in no mean, and counted as ``documents_without_labels``.

    Source: Jain et al., KDD 2016, for propensities; normalisations as in pyxclib
    (github.com/kunaldahiya/pyxclib).

    Args:
        ks: cut-offs; duplicates and order do not matter.
        label_frequency: training documents of each label, int64 ``[L]``.
        num_train: number of training documents.
        a: constant A of the propensity model.
        b: constant B.
        head_share: see `label_bands`.
        tail_below: see `label_bands`.

    Raises:
        UserError: a cut-off below 1, no training documents, or constants that give no weight.
    """

    def __init__(
        self,
        *,
        ks: Sequence[int],
        label_frequency: npt.NDArray[np.integer],
        num_train: int,
        a: float = 0.55,
        b: float = 1.5,
        head_share: float = 0.2,
        tail_below: int = 6,
    ) -> None:
        if not len(ks) or min(ks) < 1:
            raise UserError(f"evaluation.ks={list(ks)} needs positive cut-offs")
        if num_train < 1:
            raise UserError(f"propensities need the number of training documents, not {num_train}")
        if b <= 0 or a < 0:
            raise UserError(f"dataset.propensity_a={a} must be at least 0 and dataset.propensity_b={b} positive")
        frequency = np.asarray(label_frequency, dtype=np.int64)
        self.ks = sorted(set(ks))
        self.num_labels = frequency.size
        self._weight = inverse_propensity(frequency, num_train, a, b)
        self._band = label_bands(frequency, head_share, tail_below)
        self._discount = discounts(self.ks[-1])
        self._at = np.asarray(self.ks) - 1
        self._documents = np.zeros(2, dtype=np.int64)  # counted, skipped
        self._band_hits = np.zeros((len(BANDS), len(self.ks)), dtype=np.int64)
        self._band_documents = np.zeros(len(BANDS), dtype=np.int64)  # with true labels of the band
        self._band_recall = np.zeros((len(BANDS), len(self.ks)))
        self._sums = np.zeros((len(_MEANS), len(self.ks)))

    @property
    def documents(self) -> int:
        """Documents with true labels so far; over all ranks after `reduce`."""
        return int(self._documents[0])

    @property
    def skipped(self) -> int:
        """Documents without true labels so far; over all ranks after `reduce`."""
        return int(self._documents[1])

    def update(self, labels: npt.NDArray[np.integer], Y: sp.csr_matrix) -> None:
        """Add documents.

        Args:
            labels: ``[n, k]`` predicted label ids in rank order, -1 in empty slots; any k.
            Y: ``[n, L]`` true labels, where not zero.  Only read.

        Raises:
            ValueError: shapes do not fit, an id is outside [-1, L), or a document has one twice.

        Cost: O(n k log nnz(Y) + nnz(Y) log nnz(Y)) time, O(n max(ks) + nnz(Y)) memory.
        """
        ranked = self._checked(labels, Y)
        rows, columns = positives(Y)
        counts = np.bincount(rows, minlength=Y.shape[0])
        counted = counts > 0
        self._documents += [np.count_nonzero(counted), np.count_nonzero(~counted)]
        hits = mark_hits(ranked, rows, columns, self.num_labels)
        for band in range(len(BANDS)):
            self._add_band(band, hits & (self._band[ranked] == band), rows[self._band[columns] == band])
        # An empty slot has id -1 and reads the last label's band and weight, but is never a hit.
        weighted = np.where(hits, self._weight[ranked], 0.0)[counted]
        oracle = oracle_weights(rows, self._weight[columns], Y.shape[0], self.ks[-1])[counted]
        self._add_means(hits[counted].astype(np.float64), weighted, oracle, counts[counted])

    def _add_band(self, band: int, hits: npt.NDArray[np.bool_], rows: npt.NDArray[np.int64]) -> None:
        """Add the hits ``[n, max(ks)]`` of a band's labels; ``rows`` are the documents of its positives."""
        counts = np.bincount(rows, minlength=hits.shape[0])
        some = counts > 0
        found = np.cumsum(hits[some], axis=1)[:, self._at]  # a document without positives has no hit
        self._band_hits[band] += found.sum(axis=0)
        self._band_recall[band] += (found / counts[some, None]).sum(axis=0)
        self._band_documents[band] += np.count_nonzero(some)

    def _add_means(
        self,
        hits: npt.NDArray[np.float64],
        weighted: npt.NDArray[np.float64],
        oracle: npt.NDArray[np.float64],
        counts: npt.NDArray[np.int64],
    ) -> None:
        ideal = np.cumsum(self._discount)[np.minimum(np.asarray(self.ks), counts[:, None]) - 1]
        per_document = (
            self._until_k(hits) / counts[:, None],
            self._until_k(hits * self._discount) / ideal,
            self._until_k(weighted),
            self._until_k(oracle),
            self._until_k(weighted * self._discount) / ideal,
            self._until_k(oracle * self._discount) / ideal,
        )
        self._sums += np.stack([values.sum(axis=0) for values in per_document])

    def _until_k(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sums over the first k ranks for every cut-off, ``[n, max(ks)]`` to ``[n, K]``."""
        return np.asarray(np.cumsum(values, axis=1)[:, self._at])

    def _checked(self, labels: npt.NDArray[np.integer], Y: sp.csr_matrix) -> npt.NDArray[np.int64]:
        """The predictions as int64 with exactly max(ks) columns."""
        if labels.ndim != 2 or labels.shape[0] != Y.shape[0] or Y.shape[1] != self.num_labels:
            raise ValueError(
                f"predictions {list(labels.shape)} and true labels {list(Y.shape)} must be [n, k] and [n, L] "
                f"with L={self.num_labels}"
            )
        width = self.ks[-1]
        ranked = np.full((labels.shape[0], width), -1, dtype=np.int64)
        given = labels[:, :width]
        ranked[:, : given.shape[1]] = given
        if ranked.size and not -1 <= ranked.min() <= ranked.max() < self.num_labels:
            raise ValueError(f"predicted label ids {ranked.min()}..{ranked.max()} must be in [-1, {self.num_labels})")
        in_order = np.sort(ranked, axis=1)
        twice = ((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any(axis=1)
        if twice.any():
            raise ValueError(
                f"document {int(np.argmax(twice))} of {len(twice)} has a label twice among its predictions"
            )
        return ranked

    def reduce(self, world: World) -> None:
        """Add every rank's sums, so that all ranks hold the total; collective.  Call it once, after all updates."""
        if world.world_size == 1:
            return
        from xmcdist.parallel.collectives import all_reduce_array

        for sums in (self._documents, self._band_hits, self._band_documents, self._band_recall, self._sums):
            sums[...] = all_reduce_array(sums)

    def result(self) -> dict[str, float]:
        """Percent by key: ``"P@1"``, ``"nDCG@3"``, ``"PSP@5"``, ``"PSnDCG@5"``, ``"R@10"``, ``"tail/P@5"``, ...

        Also two plain numbers, ``documents`` and ``documents_without_labels``.  A metric
        without a value has no key: all of them when no document was counted, and
        ``band/R@k`` of a band without true labels.
        """
        out = {"documents": float(self.documents), "documents_without_labels": float(self.skipped)}
        if not self.documents:
            return out
        means = dict(zip(_MEANS, self._sums / self.documents, strict=True))
        for i, k in enumerate(self.ks):
            slots = self.documents * k
            out[f"P@{k}"] = 100.0 * int(self._band_hits[:, i].sum()) / slots
            for name in ("nDCG", "R"):
                out[f"{name}@{k}"] = 100.0 * float(means[name][i])
            for name in ("PSP", "PSnDCG"):
                out[f"{name}@{k}"] = 100.0 * float(means[name][i] / means[f"{name} oracle"][i])
            for b, band in enumerate(BANDS):
                out[f"{band}/P@{k}"] = 100.0 * int(self._band_hits[b, i]) / slots
                if self._band_documents[b]:
                    out[f"{band}/R@{k}"] = 100.0 * float(self._band_recall[b, i]) / int(self._band_documents[b])
        return out
