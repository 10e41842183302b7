"""What the matcher confuses, as tables that a person reads: tab-separated, heaviest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xmcdist.checkpoint.atomic import no_space_is_clear
from xmcdist.negatives.confusions import SCORE_UNIT, Confusions
from xmcdist.negatives.statistics import ClusterStatistics

__all__ = ["ConfusionRow", "HardClusterRow", "confusion_table", "hardest_table", "write_tsv"]


class ConfusionRow(NamedTuple):
    """A wrong cluster that is retrieved for documents of a true one."""

    position: int  # from 1
    cluster: int
    text: str
    wrong: int
    wrong_text: str
    documents: int  # of the cluster, for which the wrong one was retrieved
    share: float  # of all documents of the cluster
    mass: float  # sum of their scores


class HardClusterRow(NamedTuple):
    """A cluster that is missed, or retrieved where it does not belong."""

    position: int  # from 1
    cluster: int
    text: str
    positives: int
    retrieved: int
    hits: int
    misses: int
    recall: float
    false_mass: float  # sum of the scores of wrong retrievals


def confusion_table(
    statistics: ClusterStatistics, confusions: Confusions, text: Callable[[int], str], *, most: int = 100
) -> list[ConfusionRow]:
    """The heaviest confusions of all.

    Args:
        statistics: of all clusters.
        confusions: of all clusters, or of any range of them.
        text: some label texts of a cluster; called for those in the table only.
        most: rows, at most.

    Returns:
        By falling mass, then falling count, then the smaller true and wrong cluster.

    Cost: O(pairs log pairs).
    """
    true, wrong, count, mass = confusions.true(), confusions.wrong, confusions.count, confusions.mass
    order = np.lexsort((wrong, true, -count, -mass))[:most].tolist()
    return [
        ConfusionRow(
            position,
            c := int(true[k]),
            text(c),
            w := int(wrong[k]),
            text(w),
            int(count[k]),
            int(count[k]) / int(statistics.positives[c]),
            int(mass[k]) / SCORE_UNIT,
        )
        for position, k in enumerate(order, start=1)
    ]


def hardest_table(
    statistics: ClusterStatistics, text: Callable[[int], str], *, by: str, most: int = 100
) -> list[HardClusterRow]:
    """The clusters with the most misses, or the most false-positive mass.

    Args:
        statistics: of all clusters.
        text: some label texts of a cluster.
        by: ``misses`` or ``false_mass``.
        most: rows, at most; clusters with none of it are left out.
    """
    s = statistics
    return [
        HardClusterRow(
            position,
            c,
            text(c),
            int(s.positives[c]),
            int(s.retrieved[c]),
            int(s.hits[c]),
            int(s.misses[c]),
            int(s.hits[c]) / max(int(s.positives[c]), 1),
            float(s.false_score[c]),
        )
        for position, c in enumerate(s.hardest(by, most).tolist(), start=1)
    ]


def write_tsv(path: Path, kind: type[ConfusionRow] | type[HardClusterRow], rows: Sequence[NamedTuple]) -> None:
    """Write rows under a line of column names; tabs and line breaks in texts become spaces.

    Args:
        path: UTF-8, replaced if it is there.
        kind: of the rows, so that an empty table has its names, too.
        rows: of that kind.
    """
    lines = ["\t".join(kind._fields), *("\t".join(map(_cell, row)) for row in rows)]
    with no_space_is_clear(path):
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="replace")


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else " ".join(str(value).split())
