"""Small things that matcher and ranker pipelines do alike at each level of a tree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy.sparse as sp

from xmcdist.config.errors import UserError
from xmcdist.config.schema import RunConfig
from xmcdist.trees.label_tree import LabelTree

__all__ = ["matched_levels", "overlapping_trees", "per_level", "root_rows"]

_OVERLAP = re.compile(r"(rank|linear|match)_overlap(\d+)_tree")

V = TypeVar("V")


def per_level(values: Sequence[V], t: int) -> V:
    """The setting of level ``t`` (from 1): a list shorter than the tree repeats its last value."""
    return values[min(t, len(values)) - 1]


def matched_levels(cfg: RunConfig, tree: LabelTree) -> int:
    """How many levels, from the first, the encoder is fine-tuned on.

    Those of at most ``matcher.max_clusters`` nodes; where the matcher finds the clusters at
    prediction (``ranker.clusters_by=matcher``), never the labels' own, which rankers score.

    Raises:
        UserError: there is none.
    """
    most = cfg.matcher.max_clusters
    by_matcher = cfg.ranker.clusters_by == "matcher"
    if by_matcher and tree.depth == 1:
        raise UserError(
            "ranker.clusters_by=matcher needs clusters above the labels, and the tree has none: lower "
            "tree.max_leaf_size, or give a tree.path with a level of clusters"
        )
    if tree.level_size(1) > most:
        raise UserError(
            f"matcher.max_clusters={most} is below the {tree.level_size(1)} nodes of the first "
            "level, so there is nothing to fine-tune: raise it, or lower tree.nr_splits"
        )
    last = tree.depth - 1 if by_matcher else tree.depth
    return max(t for t in range(1, last + 1) if tree.level_size(t) <= most)


def overlapping_trees(stages: Path) -> list[Path]:
    """Finished stages in ``RUN/stages`` of trees with labels in several clusters, what models follow first."""
    found = []
    for path in stages.glob("*_overlap*_tree"):
        name = _OVERLAP.fullmatch(path.name)
        if name and (path / "stage.json").exists():
            found.append((("rank", "linear", "match").index(name[1]), -int(name[2]), path))
    return [path for *_, path in sorted(found)]


def root_rows(rows: int) -> sp.csr_matrix:
    """Every document belongs to the root: ones ``[rows, 1]``."""
    return sp.csr_matrix(np.ones((rows, 1), dtype=np.float32))
