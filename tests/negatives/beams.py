"""Beams and true clusters with every odd case in them, and what plain loops count of them."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import numpy as np
import scipy.sparse as sp

DOCS, K = 83, 13
NO_POSITIVE, NEVER_RETRIEVED = 4, 9


def beams(seed: int = 0) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """P and Y ``[DOCS, K]``: equal scores, scores of 0, stored labels of 0, documents without any."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, float]] = []
    true: list[tuple[int, int, float]] = []
    for i in range(DOCS):
        for c in np.sort(rng.choice(K, size=0 if i == 11 else int(rng.integers(1, 7)), replace=False)):
            score = rng.choice([0.0, 0.25, 0.5, 1.0, rng.random(), 2.0**-33, 3 * 2.0**-33])
            if c != NEVER_RETRIEVED:
                rows.append((i, int(c), float(score)))
        own = np.sort(rng.choice(K, size=0 if i in (5, 82) else int(rng.integers(1, 5)), replace=False))
        true += [(i, int(c), 0.0 if c == NO_POSITIVE else float(rng.choice([0.0, 1.0, 3.0]))) for c in own]
    return _csr(rows), _csr(true)


def _csr(entries: list[tuple[int, int, float]]) -> sp.csr_matrix:
    """Zeros stay stored."""
    i, c, v = zip(*entries, strict=True)
    ptr = np.concatenate([[0], np.cumsum(np.bincount(i, minlength=DOCS))])
    return sp.csr_matrix((np.array(v, np.float32), np.array(c, np.int32), ptr), shape=(DOCS, K))


def entries_of(A: sp.csr_matrix, i: int) -> dict[int, float]:
    """What row i stores."""
    a, z = A.indptr[i], A.indptr[i + 1]
    return dict(zip(A.indices[a:z].tolist(), A.data[a:z].tolist(), strict=True))


Pairs = list[list[tuple[int, int, int]]]


def counted(P: sp.csr_matrix, Y: sp.csr_matrix, per_cluster: int) -> tuple[dict[str, list[int]], Pairs]:
    """The statistics, and (wrong, count, mass) of each true cluster, by loops in exact arithmetic."""
    num = P.shape[1]
    stats = {name: [0] * num for name in ("positives", "retrieved", "hits", "false_mass")}
    pairs: list[dict[int, list[int]]] = [defaultdict(lambda: [0, 0]) for _ in range(num)]
    for i in range(P.shape[0]):
        found = entries_of(P, i)
        true = [c for c, v in entries_of(Y, i).items() if v > 0]
        for c in true:
            stats["positives"][c] += 1
            stats["hits"][c] += c in found
        for w, score in found.items():
            mass = round(Fraction(score) * 2**32)
            stats["retrieved"][w] += 1
            if w in true:
                continue
            stats["false_mass"][w] += mass
            for c in true:
                pairs[c][w][0] += 1
                pairs[c][w][1] += mass
    ranked = [
        sorted(((w, n, m) for w, (n, m) in of.items()), key=lambda x: (-x[2], -x[1], x[0]))[:per_cluster]
        for of in pairs
    ]
    return stats, ranked
