"""Histograms of what a run is made of: how often labels occur, and how large clusters are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xmcdist.pipelines.evaluation import label_frequency
from xmcdist.pipelines.run import Run
from xmcdist.trees.label_tree import LabelTree

__all__ = ["histogram_of_counts", "log_cluster_sizes", "log_label_frequency"]

_BINS = 32


def log_label_frequency(run: Run) -> None:
    """Training documents of each label, once a run, in bins that double; told by rank 0."""
    if run.world.is_main:
        run.log.histogram("label_frequency", *histogram_of_counts(label_frequency(run.data.Y("trn"))))


def log_cluster_sizes(run: Run, stage: Path) -> None:
    """Labels below each node of every level but the last, once a run; told by rank 0.

    Args:
        stage: a committed tree stage; its name tells the label tree from the refined one.
    """
    if not run.world.is_main:
        return
    tree = LabelTree.load(stage / "tree")
    for t in range(1, tree.depth):
        sizes = np.diff(tree.slot_ptr(t))
        edges = np.unique(np.linspace(sizes.min(), sizes.max() + 1, _BINS + 1).round().astype(np.int64))
        counts, _ = np.histogram(sizes, bins=edges)
        run.log.histogram(f"cluster_size/{stage.name}/level-{t}", counts.tolist(), edges.tolist())


def histogram_of_counts(values: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """How many values lie in [0, 1), [1, 2), [2, 4), [4, 8), ..: counts ``[n]`` and edges ``[n + 1]``."""
    top = int(values.max(initial=0))
    edges = [0, *(2**k for k in range(top.bit_length() + 1))]
    counts, _ = np.histogram(values, bins=edges)
    return counts.tolist(), edges
