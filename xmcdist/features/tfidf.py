"""TF-IDF over words and characters, counted by all ranks, the same columns on any number of them.

What a term is, scikit-learn's analyzers say (its token pattern, n-grams, ``char_wb``); the
counting is ours, so that it streams, reduces over ranks and saves without pickle.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.config.errors import UserError
from xmcdist.config.schema import FeaturesConfig
from xmcdist.parallel.launch import World
from xmcdist.sparse.csr import unit_rows

__all__ = ["Tfidf"]

Analyzer = Callable[[str], list[str]]


class Tfidf:
    """A fitted vocabulary and its inverse document frequencies.

    Columns: the words in alphabetical order, then the character n-grams likewise (or the
    hashed columns of each).  A row is l2-normalised over all of them.

    Attributes:
        idf: ``[D]`` float64, ``ln((1 + n) / (1 + df)) + 1``; 0 for a hashed column out of bounds.
    """

    def __init__(self, cfg: FeaturesConfig, vocabularies: list[dict[str, int]], idf: NDArray[np.float64]) -> None:
        self.cfg, self.vocabularies, self.idf = cfg, vocabularies, idf
        self._analyzers = _analyzers(cfg)

    @property
    def num_features(self) -> int:
        """D, the number of columns."""
        return int(self.idf.size)

    @classmethod
    def fit(cls, texts: Iterable[str], cfg: FeaturesConfig, world: World) -> Tfidf:
        """Count this rank's documents, reduce over ranks, keep the terms that qualify; collective.

        Args:
            texts: this rank's documents, read once.
            cfg: n-grams, document-frequency bounds, number of terms.

        Raises:
            UserError: no term qualifies.

        Cost: one pass; memory is that of the vocabulary, not of the text.
        """
        from xmcdist.parallel.collectives import gather_objects  # here: prediction needs no torch

        if cfg.hashing_bits is not None:
            return cls._fit_hashed(texts, cfg, world)
        analyzers = _analyzers(cfg)
        counts: list[dict[str, list[int]]] = [{} for _ in analyzers]
        documents = 0
        for text in texts:
            documents += 1
            for analyzer, table in zip(analyzers, counts, strict=True):
                for term, times in Counter(analyzer(text)).items():
                    seen = table.get(term)
                    if seen is None:
                        table[term] = [1, times]
                    else:
                        seen[0] += 1
                        seen[1] += times
        total = sum(gather_objects(documents))
        vocabularies, idfs = [], []
        for table in counts:
            kept = _choose(_reduce(table, world, cfg, total), cfg)
            vocabularies.append({term: column for column, (term, _) in enumerate(kept)})
            idfs.append(_idf(np.array([df for _, df in kept], dtype=np.int64), total))
        if not sum(map(len, vocabularies)):
            raise UserError(
                f"no term is left of {total} documents with features.min_df={cfg.min_df}, "
                f"features.max_df={cfg.max_df}: lower min_df, raise max_df, or look at the texts"
            )
        return cls(cfg, vocabularies, np.concatenate(idfs))

    @classmethod
    def _fit_hashed(cls, texts: Iterable[str], cfg: FeaturesConfig, world: World) -> Tfidf:
        from xmcdist.parallel.collectives import all_reduce_array, gather_objects

        analyzers = _analyzers(cfg)
        width = 1 << int(cfg.hashing_bits or 0)
        frequency = np.zeros(width * len(analyzers), dtype=np.int64)
        documents = 0
        for text in texts:
            documents += 1
            columns = {
                width * block + column
                for block, analyzer in enumerate(analyzers)
                for column in _hashed(analyzer(text), width)
            }
            frequency[list(columns)] += 1
        total = sum(gather_objects(documents))
        frequency = all_reduce_array(frequency)
        kept = (frequency >= cfg.min_df) & (frequency <= cfg.max_df * total)
        if not kept.any():
            raise UserError(f"no hashed column is left with features.min_df={cfg.min_df}: lower it")
        return cls(cfg, [], np.where(kept, _idf(frequency, total), 0.0))

    def transform(self, texts: Iterable[str]) -> sp.csr_matrix:
        """Documents as unit rows ``[n, D]`` float32; one without a known term is an empty row."""
        columns, values, ends = array("i"), array("d"), array("q", [0])
        lookups = self._lookups()
        for text in texts:
            for analyzer, lookup in zip(self._analyzers, lookups, strict=True):
                found = Counter(lookup(analyzer(text)))
                columns.extend(found.keys())
                values.extend(found.values())
            ends.append(len(columns))
        indices = np.frombuffer(columns, dtype=np.int32) if columns else np.zeros(0, np.int32)
        tf = np.frombuffer(values, dtype=np.float64) if values else np.zeros(0)
        weight = (1.0 + np.log(tf) if self.cfg.sublinear else tf) * self.idf[indices]
        # A frozen buffer cannot be sorted in place, hence the copies.
        X = sp.csr_matrix(
            (weight, indices.copy(), np.frombuffer(ends, dtype=np.int64).copy()),
            shape=(len(ends) - 1, self.num_features),
        )
        X.eliminate_zeros()
        X.sort_indices()
        return unit_rows(X)

    def save(self, folder: Path) -> None:
        """Write settings and vocabulary as JSON, frequencies as ``.npy``."""
        folder.mkdir(parents=True, exist_ok=True)
        terms = [list(v) for v in self.vocabularies]
        (folder / "tfidf.json").write_text(
            json.dumps({"settings": asdict(self.cfg), "terms": terms}, ensure_ascii=False), encoding="utf-8"
        )
        np.save(folder / "idf.npy", self.idf)

    @classmethod
    def load(cls, folder: Path) -> Tfidf:
        """Read what `save` wrote.

        Raises:
            UserError: a file is missing or damaged.
        """
        try:
            saved: dict[str, Any] = json.loads((folder / "tfidf.json").read_text(encoding="utf-8"))
            idf = np.load(folder / "idf.npy", allow_pickle=False)
            vocabularies, first = [], 0
            for terms in saved["terms"]:
                vocabularies.append({term: column for column, term in enumerate(terms)})
                first += len(terms)
            cfg = FeaturesConfig(**saved["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no whole TF-IDF vocabulary ({error}): copy or train it again") from error
        if vocabularies and first != idf.size:
            raise UserError(f"{folder}: {first} terms and {idf.size} frequencies: copy or train it again")
        return cls(cfg, vocabularies, idf)

    def _lookups(self) -> list[Callable[[list[str]], list[int]]]:
        """One function a block: terms to column numbers, unknown ones left out."""
        if self.cfg.hashing_bits is not None:
            width = 1 << self.cfg.hashing_bits
            return [_hash_lookup(width, width * block) for block in range(len(self._analyzers))]
        firsts = np.cumsum([0, *(len(v) for v in self.vocabularies)]).tolist()
        return [_word_lookup(v, first) for v, first in zip(self.vocabularies, firsts, strict=False)]


def _word_lookup(vocabulary: dict[str, int], first: int) -> Callable[[list[str]], list[int]]:
    get = vocabulary.get
    if first == 0:
        return lambda terms: [c for c in map(get, terms) if c is not None]
    return lambda terms: [c + first for c in map(get, terms) if c is not None]


def _hash_lookup(width: int, first: int) -> Callable[[list[str]], list[int]]:
    return lambda terms: [c + first for c in _hashed(terms, width)]


def _hashed(terms: list[str], width: int) -> list[int]:
    from sklearn.utils import murmurhash3_32

    return [murmurhash3_32(term, positive=True) % width for term in terms]


def _analyzers(cfg: FeaturesConfig) -> list[Analyzer]:
    from sklearn.feature_extraction.text import CountVectorizer

    blocks = [("word", cfg.word_ngrams), ("char_wb", cfg.char_ngrams)]
    return [
        CountVectorizer(analyzer=kind, ngram_range=(n[0], n[1]), lowercase=cfg.lowercase).build_analyzer()
        for kind, n in blocks
        if n is not None
    ]


def _reduce(
    table: dict[str, list[int]], world: World, cfg: FeaturesConfig, documents: int
) -> list[tuple[str, int, int]]:
    """(term, documents, occurrences) over all ranks, document-frequency bounds applied; same on all.

    Each term is summed by one rank, chosen by its hash, so that no rank holds the rare
    terms of all; only what passes the bounds reaches every rank.
    """
    from xmcdist.parallel.collectives import gather_objects

    mine: dict[str, list[int]] = {}
    for owner in range(world.world_size):
        part = {t: c for t, c in table.items() if crc32(t.encode()) % world.world_size == owner}
        for counts in gather_objects(part):
            if owner != world.rank:
                continue
            for term, (df, tf) in counts.items():
                seen = mine.setdefault(term, [0, 0])
                seen[0] += df
                seen[1] += tf
    bounded = [(t, df, tf) for t, (df, tf) in mine.items() if cfg.min_df <= df <= cfg.max_df * documents]
    return [row for rows in gather_objects(bounded) for row in rows]


def _choose(rows: list[tuple[str, int, int]], cfg: FeaturesConfig) -> list[tuple[str, int]]:
    """The most frequent ``max_features`` terms, ties alphabetical; (term, documents) in alphabetical order."""
    if cfg.max_features is not None and len(rows) > cfg.max_features:
        rows = sorted(rows, key=lambda r: (-r[2], r[0]))[: cfg.max_features]
    return sorted((term, df) for term, df, _ in rows)


def _idf(frequency: NDArray[np.int64], documents: int) -> NDArray[np.float64]:
    return math.log(1 + documents) - np.log1p(frequency.astype(np.float64)) + 1.0
