"""What a plan has to know of a data set: a handful of counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["DataCounts", "grown_vocabulary"]


@dataclass(frozen=True)
class DataCounts:
    """Counts of one data set.

    Attributes:
        documents: of the training split, N; ``test_documents``: of the other.
        labels: L.
        labels_per_document: mean.
        features: columns of the sparse features, D.
        values_per_document: mean stored values of a row of them.
        tokens_per_document: mean tokens, cut to ``encoder.max_length``; 0 without an encoder.
        text_bytes: of the training texts, 0 where not known.
        source: where the counts come from, for people.
    """

    documents: int
    test_documents: int
    labels: int
    labels_per_document: float
    features: int
    values_per_document: float
    tokens_per_document: float
    text_bytes: int = 0
    source: str = "given"

    @property
    def feature_values(self) -> float:
        """Stored values of all training documents."""
        return self.documents * self.values_per_document

    @property
    def label_entries(self) -> float:
        """Stored entries of Y."""
        return self.documents * self.labels_per_document


def grown_vocabulary(half: int, whole: int, sample: int, documents: int) -> int:
    """Different terms of all documents, from a sample and its half.

    A vocabulary grows as a power of the number of documents (Heaps' law).

    Args:
        half, whole: terms in half of the sample and in all of it.
        sample: its documents.
        documents: all.
    """
    if documents <= sample or not half:
        return whole
    ratio = max(whole / half, 1.0)
    return int(whole * (documents / sample) ** min(math.log2(ratio), 1.0))
