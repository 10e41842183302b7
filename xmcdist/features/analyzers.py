"""What the terms of a text are: scikit-learn's rules for words and characters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import scipy.sparse as sp

__all__ = ["Analyzer", "Reading", "hashed_counts", "in_batches"]

Analyzer = Callable[[str], list[str]]

_BATCH_CHARS = 1 << 21  # characters of text looked at together: bounds temporary memory


@dataclass(frozen=True)
class Reading:
    """How texts are cut into terms; at least one of the two kinds of n-grams."""

    word_ngrams: tuple[int, int] | None
    char_ngrams: tuple[int, int] | None
    lowercase: bool

    def analyzers(self) -> list[tuple[str, Analyzer]]:
        """Name and function of every block of columns, words first.

        The functions are those of scikit-learn's ``CountVectorizer``: words of two or more
        letters or digits, or characters within word boundaries, padded by a space.  No term
        holds a line break.
        """
        from sklearn.feature_extraction.text import CountVectorizer

        blocks = [("word", self.word_ngrams), ("char_wb", self.char_ngrams)]
        return [
            (
                kind.removesuffix("_wb"),
                CountVectorizer(analyzer=kind, ngram_range=ngrams, lowercase=self.lowercase).build_analyzer(),
            )
            for kind, ngrams in blocks
            if ngrams is not None
        ]


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of a few million characters.

    Raises:
        TypeError: one text was given in place of many.
    """
    if isinstance(texts, str):
        raise TypeError("texts is a single str; give a list of texts")
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 1
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def hashed_counts(batch: list[str], analyzer: Analyzer, columns: int) -> sp.csr_matrix:
    """Terms counted in hashed columns ``[n, columns]``; the columns of ``HashingVectorizer``, without signs."""
    from sklearn.feature_extraction import FeatureHasher

    hasher = FeatureHasher(n_features=columns, input_type="string", alternate_sign=False)
    return sp.csr_matrix(cast(sp.csr_matrix, hasher.transform(map(analyzer, batch))))
