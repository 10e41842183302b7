"""Label disentanglement as stages: what a model retrieves gives its labels their clusters anew.

A round reads which leaf clusters the model so far retrieves for the training documents,
makes a tree whose labels lie in the clusters retrieved for them most often, lifts the
training labels to its levels, and trains on it again.  The levels of clusters stay as they
are; but a cluster now has other labels below it, so every level is trained again.

Source: Liu et al., NeurIPS 2021; see `xmcdist.trees.overlap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from xmcdist.checkpoint.parts import write_csr
from xmcdist.config.errors import UserError
from xmcdist.config.schema import OverlapConfig
from xmcdist.inference.beam import beam_search
from xmcdist.pipelines.ranking import rank_stages
from xmcdist.pipelines.run import Run
from xmcdist.pipelines.shapes import log_cluster_sizes
from xmcdist.rankers.model import LinearTree
from xmcdist.sparse.csr import row_slice
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import open_csr
from xmcdist.trees.label_tree import LabelTree
from xmcdist.trees.overlap import Assignment, assign, count_matches

__all__ = ["Trained", "last_of_matcher", "overlap_rank_stages", "overlap_tree_stage"]


@dataclass(frozen=True)
class Trained:
    """Rankers, and what they were trained from.

    Attributes:
        rankers: the model.
        tree: the committed tree stage that they follow.
        after: stages that made tree, features and ``found``.
        found: the stage whose ``P`` are the clusters they start from; None: the root.
    """

    rankers: LinearTree
    tree: Path
    after: tuple[str, ...]
    found: Path | None = None


def overlap_rank_stages(run: Run, prefix: str, features: Features, trained: Trained) -> LinearTree:
    """Give labels the clusters that the rankers retrieve, and train rankers again; ``overlap.rounds`` times.

    Stages of round r: ``<prefix>_overlap<r>_tree``, and ``<prefix>_overlap<r>-<level>``.

    Args:
        prefix: of the stages that trained the rankers.
        features: of the training documents, those the rankers were trained on.

    Returns:
        The rankers of the last round.
    """
    first, now = trained.rankers.first_level, trained
    for number in range(1, run.cfg.overlap.rounds + 1):
        name = f"{prefix}_overlap{number}"
        last = f"{prefix if number == 1 else f'{prefix}_overlap{number - 1}'}-{now.rankers.tree.depth}"
        retrieved = partial(_retrieved, run, features, now)
        tree = overlap_tree_stage(run, f"{name}_tree", now.tree, (*now.after, last), retrieved)
        log_cluster_sizes(run, tree)
        after = (*now.after, f"{name}_tree")
        rankers = rank_stages(run, name, features, tree, after, first_level=first, above=now.found)
        now = Trained(rankers, tree, after, now.found)
    return now.rankers


def overlap_tree_stage(
    run: Run, name: str, tree_folder: Path, after: tuple[str, ...], retrieved: Callable[[], sp.csr_matrix]
) -> Path:
    """One new tree, and the training labels lifted to its levels, as `tree_stage` writes them.

    Args:
        tree_folder: a committed tree stage.
        after: what the tree and the retrieved clusters were made by.
        retrieved: gives the leaf clusters of this rank's training documents ``[n, K]``; every
            stored entry counts.  Called on all ranks.

    Raises:
        UserError: the tree has no leaf clusters, or ``overlap.max_cluster_size`` leaves too
            little room for the labels in them.
    """
    cfg = run.cfg.overlap

    def body(folder: Path) -> None:
        tree = LabelTree.load(tree_folder / "tree")
        most = _limit(cfg, tree)
        Y = run.own_rows(run.data.Y("trn"))
        keep = cfg.copies if most is None else None
        counts = count_matches(Y, retrieved(), run.world, keep=keep)
        made = assign(tree, counts, cfg.copies, most, run.world)
        if run.world.is_main:
            made.tree.save(folder / "tree")
        for t in range(1, made.tree.depth + 1):
            write_csr(folder / f"Y.level-{t}", made.tree.lift(Y, t), run.world)
        run.log.say(f"{name}: {_told(made)}")

    made_of = {"copies": cfg.copies, "max_cluster_size": cfg.max_cluster_size, "balance": cfg.balance}
    return run.stages.run(name, run.inputs(after=after, **made_of), body)


def last_of_matcher(cfg: OverlapConfig) -> tuple[str, str]:
    """Names of what the matcher was trained on last: of the tree's stage, and of its levels' before the level."""
    return (f"match_overlap{cfg.rounds}_tree", f"match_overlap{cfg.rounds}") if cfg.fine_tune else ("tree", "match")


def _retrieved(run: Run, features: Features, now: Trained) -> sp.csr_matrix:
    """Leaf clusters that a beam as wide as in prediction holds for this rank's documents."""
    start, stop = run.own(features.num_rows)
    level, model = now.rankers.tree.depth - 1, now.rankers
    begin = None if now.found is None else row_slice(open_csr(now.found / "P"), start, stop)
    if begin is not None and model.first_level > level:
        return begin  # the leaf clusters are those that the matcher finds
    beam = run.cfg.ranker.beam
    return beam_search(model, features.rows(start, stop), beam=beam, topk=beam, upto_level=level, start=begin)


def _limit(cfg: OverlapConfig, tree: LabelTree) -> int | None:
    """Most labels that a cluster is given.

    Raises:
        UserError: the tree has no clusters, or there is too little room in them.
    """
    if tree.depth < 2:
        raise UserError(
            "overlap.copies needs a tree with clusters above the labels, and this one has none: "
            "lower tree.max_leaf_size, or give another tree.path"
        )
    clusters, most = tree.level_size(tree.depth - 1), cfg.max_cluster_size
    if cfg.balance is not None:
        return math.ceil(cfg.balance * cfg.copies * tree.num_labels / clusters)
    if most is not None and most * clusters < tree.num_labels:
        raise UserError(
            f"overlap.max_cluster_size={most} leaves room for {most * clusters} labels in {clusters} clusters, but "
            f"there are {tree.num_labels}: set it to at least {-(-tree.num_labels // clusters)}, or null"
        )
    return most


def _told(made: Assignment) -> str:
    """What the new tree is like, in a line."""
    tree = made.tree
    copies = np.bincount(np.bincount(tree.labels, minlength=tree.num_labels))
    many = ", ".join(f"{n:,} in {c}" for c, n in enumerate(copies) if c and n)
    sizes = np.diff(tree.child_ptr[-1])
    line = f"{tree.num_labels:,} labels have {len(tree.labels):,} places, {many} clusters; "
    line += f"{sizes.min()} to {sizes.max()} labels a cluster"
    if made.unmatched:
        line += f"; {made.unmatched:,} stayed where they were, as nothing is retrieved for them"
    if made.crowded_out:
        line += f"; {made.crowded_out:,} stayed where they were, as all their clusters are full"
    return line
