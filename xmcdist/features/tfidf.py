"""TF-IDF over words and characters, counted by all ranks, with the same columns on any number of them.

Shapes: n documents, D columns.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from xmcdist.config.errors import UserError
from xmcdist.config.schema import FeaturesConfig
from xmcdist.features.analyzers import Reading, hashed_counts, in_batches
from xmcdist.features.vocabulary import TermCounts, choose_terms, most_frequent, within_bounds
from xmcdist.parallel.launch import World
from xmcdist.sparse.csr import unit_rows

__all__ = ["Tfidf"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_FORMAT = 1


class Tfidf:
    """Texts to sparse vectors of unit length.

    Columns come in blocks, words first and then characters: the terms of a block in
    alphabetical order, or ``2**hashing_bits`` hashed columns a block.  A value is the term's
    count (``1 + ln`` of it when sublinear) times ``ln((1 + N) / (1 + df)) + 1``, and a row is
    scaled to length 1 over all blocks.  With one block of words the same numbers as
    scikit-learn's ``TfidfVectorizer``; hashed, as its ``HashingVectorizer`` without signs
    followed by ``TfidfTransformer``.

    A hashed column whose counts lie outside the bounds stays, empty.

    Attributes:
        idf: ``[D]`` float64; 0 for an unused hashed column.
        terms: the columns of each block, or None when hashed.
        fingerprint: sixteen hex digits that differ when any vector would.
    """

    def __init__(
        self, reading: Reading, *, sublinear: bool, hashing_bits: int | None, terms: list[list[str]] | None, idf: F64
    ) -> None:
        self.reading, self.sublinear, self.hashing_bits = reading, sublinear, hashing_bits
        self.terms, self.idf = terms, idf
        self._analyzers = reading.analyzers()
        columns = iter(range(idf.size))  # one block takes up where the other ended
        self._columns = [dict(zip(block, columns, strict=False)) for block in terms or []]
        self.fingerprint = self._fingerprint()

    @property
    def num_features(self) -> int:
        """D, the number of columns."""
        return int(self.idf.size)

    @classmethod
    def fit(cls, texts: Iterable[str], cfg: FeaturesConfig, world: World) -> Tfidf:
        """Count this rank's documents, add up the ranks, choose the columns; collective.

        Args:
            texts: the documents of this rank, read once; together the ranks' are all.
            cfg: what terms are and which are kept.

        Returns:
            The same on every rank, bit for bit, however documents are divided.

        Raises:
            UserError: no term is left.

        Cost: one pass over the texts.  Memory grows with the number of different terms (or
        hashed columns), not with the texts.
        """
        if cfg.word_ngrams is None and cfg.char_ngrams is None:
            raise UserError("features.word_ngrams and features.char_ngrams are both null: set one")
        reading = Reading(_span(cfg.word_ngrams), _span(cfg.char_ngrams), cfg.lowercase)
        terms, idf = (_fit_terms if cfg.hashing_bits is None else _fit_hashed)(texts, reading, cfg, world)
        return cls(reading, sublinear=cfg.sublinear, hashing_bits=cfg.hashing_bits, terms=terms, idf=idf)

    def transform(self, texts: Iterable[str]) -> sp.csr_matrix:
        """Vectors of any texts, ``[n, D]`` float32 with sorted columns.

        A text without a known term gives an empty row.  Needs twice the memory of the
        result, and that of a batch of a few million characters.

        Raises:
            TypeError: one text was given in place of many.
        """
        parts = [self._weighted(batch) for batch in in_batches(texts)]
        if not parts:
            return sp.csr_matrix(np.zeros((0, self.num_features), dtype=np.float32))
        return parts[0] if len(parts) == 1 else sp.csr_matrix(sp.vstack(parts, format="csr"))

    def _weighted(self, batch: list[str]) -> sp.csr_matrix:
        X = self._counts(batch) if self.hashing_bits is None else self._hashed(batch)
        if self.sublinear:
            X.data = np.log(X.data) + 1.0
        X.data *= self.idf[X.indices]
        if self.hashing_bits is not None:
            X.eliminate_zeros()
        return unit_rows(X)

    def _counts(self, batch: list[str]) -> sp.csr_matrix:
        """How often each known term occurs, ``[n, D]`` float64."""
        found = array("i")
        ends = np.zeros(len(batch) + 1, dtype=np.int64)
        blocks = [(analyze, known.get) for (_, analyze), known in zip(self._analyzers, self._columns, strict=True)]
        unknown = repeat(-1)
        for i, text in enumerate(batch, start=1):
            for analyze, column in blocks:
                found.extend(map(column, analyze(text), unknown))
            ends[i] = len(found)
        columns = np.asarray(found, dtype=np.int32)
        known = columns >= 0
        ends = np.concatenate([[0], np.cumsum(known)])[ends]
        columns = columns[known]
        X = sp.csr_matrix((np.ones(columns.size), columns, ends), shape=(len(batch), self.num_features))
        X.sum_duplicates()
        return X

    def _hashed(self, batch: list[str]) -> sp.csr_matrix:
        width = self.num_features // len(self._analyzers)
        blocks = [hashed_counts(batch, analyze, width) for _, analyze in self._analyzers]
        return sp.csr_matrix(sp.hstack(blocks, format="csr"))

    def save(self, folder: Path | str) -> None:
        """Write settings (JSON), terms (UTF-8 text, one a line, a file a block) and ``idf.npy``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for (name, _), block in zip(self._analyzers, self.terms or [], strict=False):
            _terms_file(folder, name).write_bytes(_text(block))
        np.save(folder / "idf.npy", self.idf, allow_pickle=False)
        settings = {**self._settings(), "format": _FORMAT, "fingerprint": self.fingerprint}
        (folder / "tfidf.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Tfidf:
        """Read what `save` wrote.

        Raises:
            UserError: a file is missing, damaged, or not of this vocabulary.
        """
        folder = Path(folder)
        try:
            settings: dict[str, Any] = json.loads((folder / "tfidf.json").read_text(encoding="utf-8"))
            if settings["format"] != _FORMAT:
                raise ValueError(f"format {settings['format']}, this version reads {_FORMAT}")
            reading = Reading(_span(settings["word_ngrams"]), _span(settings["char_ngrams"]), settings["lowercase"])
            terms = None
            if settings["hashing_bits"] is None:
                terms = [_lines(_terms_file(folder, name)) for name, _ in reading.analyzers()]
            idf = np.load(folder / "idf.npy", allow_pickle=False)
            given = cls(
                reading, sublinear=settings["sublinear"], hashing_bits=settings["hashing_bits"], terms=terms, idf=idf
            )
            if given.fingerprint != settings["fingerprint"]:
                raise ValueError("the files do not belong together, or one was changed")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise UserError(f"{folder} holds no whole TF-IDF vocabulary ({error}): copy it again, or train") from error
        return given

    def _settings(self) -> dict[str, Any]:
        return {**asdict(self.reading), "sublinear": self.sublinear, "hashing_bits": self.hashing_bits}

    def _fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for block in self.terms or []:
            digest.update(b"%d\n" % len(block) + _text(block))
        digest.update(np.ascontiguousarray(self.idf, dtype="<f8").data)
        return digest.hexdigest()[:16]


def _fit_terms(
    texts: Iterable[str], reading: Reading, cfg: FeaturesConfig, world: World
) -> tuple[list[list[str]] | None, F64]:
    analyzers = [analyze for _, analyze in reading.analyzers()]
    counts = [TermCounts() for _ in analyzers]
    mine = 0
    for text in _many(texts):
        mine += 1
        for analyze, block in zip(analyzers, counts, strict=True):
            block.add(analyze(text))
    documents = _total(mine)
    chosen = [choose_terms(block, documents, cfg, world) for block in counts]
    df = np.concatenate([frequency for _, frequency in chosen])
    if not df.size:
        raise _nothing_left("term", documents, cfg)
    return [terms for terms, _ in chosen], _idf(df, documents)


def _fit_hashed(
    texts: Iterable[str], reading: Reading, cfg: FeaturesConfig, world: World
) -> tuple[list[list[str]] | None, F64]:
    from xmcdist.parallel.collectives import all_reduce_array

    analyzers = [analyze for _, analyze in reading.analyzers()]
    width = 1 << int(cfg.hashing_bits or 0)
    df, tf = np.zeros((2, len(analyzers), width), dtype=np.int64)
    mine = 0
    for batch in in_batches(texts):
        mine += len(batch)
        for b, analyze in enumerate(analyzers):
            X = hashed_counts(batch, analyze, width)
            columns, first = np.unique(X.indices, return_inverse=True)
            df[b, columns] += np.bincount(first, minlength=columns.size)
            tf[b, columns] += np.bincount(first, X.data, minlength=columns.size).astype(np.int64)
    documents = _total(mine)
    df, tf = all_reduce_array(df), all_reduce_array(tf)
    kept = within_bounds(df, documents, cfg)
    if cfg.max_features is not None:
        for b in range(len(analyzers)):
            kept[b] &= most_frequent(np.where(kept[b], tf[b], 0), cfg.max_features)
    if not kept.any():
        raise _nothing_left("hashed column", documents, cfg)
    return None, np.where(kept, _idf(df, documents), 0.0).ravel()


def _many(texts: Iterable[str]) -> Iterator[str]:
    for batch in in_batches(texts):
        yield from batch


def _total(mine: int) -> int:
    from xmcdist.parallel.collectives import gather_objects

    return sum(gather_objects(mine))


def _idf(df: I64, documents: int) -> F64:
    return np.asarray(np.log((1.0 + documents) / (1.0 + df)) + 1.0, dtype=np.float64)


def _nothing_left(what: str, documents: int, cfg: FeaturesConfig) -> UserError:
    return UserError(
        f"no {what} is left of {documents} documents with features.min_df={cfg.min_df} and "
        f"features.max_df={cfg.max_df}: lower min_df, raise max_df, or look at the texts"
    )


def _span(ngrams: list[int] | None) -> tuple[int, int] | None:
    return (int(ngrams[0]), int(ngrams[1])) if ngrams is not None else None


def _terms_file(folder: Path, block: str) -> Path:
    return folder / f"terms.{block}.txt"


def _text(terms: list[str]) -> bytes:
    return "".join(f"{term}\n" for term in terms).encode("utf-8", "surrogatepass")


def _lines(path: Path) -> list[str]:
    return path.read_bytes().decode("utf-8", "surrogatepass").split("\n")[:-1]
