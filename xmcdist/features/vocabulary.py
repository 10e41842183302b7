"""Counting terms over ranks and choosing those that become columns.

Every rank counts its own documents.  A term is summed by one rank, its owner, chosen by a
hash of the term that is the same on every machine; only terms that can still become
columns are sent to all.  Counts are integers and every choice is by count, then alphabet,
so the vocabulary is the same for any number of ranks and any division of the documents.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
import numpy.typing as npt

from xmcdist.config.schema import FeaturesConfig
from xmcdist.parallel.launch import World

__all__ = ["TermCounts", "choose_terms", "most_frequent", "within_bounds"]

I64 = npt.NDArray[np.int64]

_EXCHANGED = 1 << 20  # terms a rank sends at once: bounds temporary memory


@dataclass
class TermCounts:
    """How often terms were seen: documents (df) and occurrences (tf), by term."""

    df: Counter[str] = field(default_factory=Counter)
    tf: Counter[str] = field(default_factory=Counter)

    def add(self, terms: list[str]) -> None:
        """Count one document."""
        once = set(terms)
        self.df.update(once)
        self.tf.update(terms)


@dataclass(frozen=True)
class _Rows:
    """Terms with their counts, side by side."""

    terms: list[str]
    df: I64
    tf: I64

    def where(self, kept: npt.NDArray[np.bool_]) -> _Rows:
        return _Rows(list(itertools.compress(self.terms, kept.tolist())), self.df[kept], self.tf[kept])


def within_bounds(df: I64, documents: int, cfg: FeaturesConfig) -> npt.NDArray[np.bool_]:
    """Which document frequencies lie in ``[min_df, max_df * documents]``."""
    return np.asarray((df >= cfg.min_df) & (df <= cfg.max_df * documents))


def most_frequent(tf: I64, limit: int) -> npt.NDArray[np.bool_]:
    """Which ``limit`` entries are the largest, ties to the earlier."""
    kept = np.zeros(tf.size, dtype=np.bool_)
    kept[np.argsort(-tf, kind="stable")[:limit]] = True
    return kept


def choose_terms(counts: TermCounts, documents: int, cfg: FeaturesConfig, world: World) -> tuple[list[str], I64]:
    """The terms that become columns, the same on every rank; collective.

    Terms within the document-frequency bounds; of these the ``max_features`` of highest
    occurrence, ties to the alphabetically first.

    Args:
        counts: of this rank's documents; emptied on the way, to save memory.
        documents: number of documents over all ranks.
        cfg: the bounds.

    Returns:
        Terms in alphabetical (code point) order and their document frequencies.
    """
    from xmcdist.parallel.collectives import gather_objects

    mine = _limited(_summed_by_owner(counts, documents, cfg, world), cfg.max_features)
    parts = gather_objects((_pack(mine.terms), mine.df, mine.tf))
    rows = _joined([_Rows(_unpack(terms), df, tf) for terms, df, tf in parts])
    rows = _limited(rows, cfg.max_features)
    order = sorted(range(len(rows.terms)), key=rows.terms.__getitem__)
    return [rows.terms[i] for i in order], rows.df[np.asarray(order, dtype=np.int64)]


def _limited(rows: _Rows, limit: int | None) -> _Rows:
    """The ``limit`` most frequent rows, ties alphabetical; sorts no more than may be kept."""
    if limit is None or len(rows.terms) <= limit:
        return rows
    least = np.partition(rows.tf, rows.tf.size - limit)[rows.tf.size - limit]
    rows = rows.where(rows.tf >= least)
    order = np.asarray(sorted(range(len(rows.terms)), key=rows.terms.__getitem__), dtype=np.int64)
    kept = np.zeros(order.size, dtype=np.bool_)
    kept[order[most_frequent(rows.tf[order], limit)]] = True
    return rows.where(kept)


def _summed_by_owner(counts: TermCounts, documents: int, cfg: FeaturesConfig, world: World) -> _Rows:
    """The terms that this rank owns and that lie within the bounds, summed over ranks."""
    from xmcdist.parallel.collectives import gather_objects

    ranks = world.world_size
    pieces = ranks * -(-max(gather_objects(len(counts.df))) // (_EXCHANGED * ranks)) if ranks > 1 else 1
    buckets: list[list[str]] = [[] for _ in range(max(pieces, 1))]
    if ranks == 1:
        buckets[0] = list(counts.df)
    else:
        for term in counts.df:
            buckets[_piece(term, len(buckets))].append(term)
    owned = [_Rows([], np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for piece, terms in enumerate(buckets):
        rows = _Rows(terms, _pop(counts.df, terms), _pop(counts.tf, terms))
        buckets[piece] = []
        if ranks > 1:
            parts = gather_objects((_pack(rows.terms), rows.df, rows.tf))
            if piece % ranks != world.rank:
                continue
            rows = _summed([_Rows(_unpack(packed), df, tf) for packed, df, tf in parts])
        owned.append(rows.where(within_bounds(rows.df, documents, cfg)))
    return _joined(owned)


def _piece(term: str, pieces: int) -> int:
    """Python's own ``hash`` of a str differs from process to process."""
    return crc32(_utf8(term)) % pieces


def _pop(table: Counter[str], terms: list[str]) -> I64:
    return np.fromiter(map(table.pop, terms), dtype=np.int64, count=len(terms))


def _summed(parts: list[_Rows]) -> _Rows:
    """Rows of several ranks with each term once."""
    place: dict[str, int] = {}
    for part in parts:
        for term in part.terms:
            place.setdefault(term, len(place))
    df, tf = np.zeros(len(place), np.int64), np.zeros(len(place), np.int64)
    for part in parts:  # a rank has each term once, so fancy indexing adds every count
        at = np.fromiter(map(place.__getitem__, part.terms), dtype=np.int64, count=len(part.terms))
        df[at] += part.df
        tf[at] += part.tf
    return _Rows(list(place), df, tf)


def _joined(parts: list[_Rows]) -> _Rows:
    terms = list(itertools.chain.from_iterable(p.terms for p in parts))
    return _Rows(terms, np.concatenate([p.df for p in parts]), np.concatenate([p.tf for p in parts]))


def _pack(terms: list[str]) -> bytes:
    return _utf8("\n".join(terms))


def _unpack(packed: bytes) -> list[str]:
    return packed.decode("utf-8", "surrogatepass").split("\n") if packed else []


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # half a surrogate pair is no reason to stop
