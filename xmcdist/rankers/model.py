"""A label tree with linear rankers on every level, or on those below some, and its folder on disk.

``model.json`` names the settings; ``tree/`` holds the tree; ``level-<t>/`` holds the weights of
level t, one file per part (see `xmcdist.rankers.weights`).  ``model.json`` is written last, so a
folder without it is not a model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xmcdist.rankers.partition import cluster_ranges, estimate_costs, node_ranges
from xmcdist.rankers.weights import LevelWeights
from xmcdist.trees.label_tree import LabelTree

__all__ = ["MERGES", "LevelWeights", "LinearTree", "cluster_ranges", "estimate_costs", "node_ranges"]

MERGES = ("max", "mean")
"""How the scores of a label's slots become one: the largest, or the mean of the retrieved ones."""

_VERSION = 2


@dataclass(frozen=True, eq=False)
class LinearTree:
    """What a beam search needs.

    Attributes:
        tree: T levels.
        levels: of adjoining levels, usually all T, coarse to fine; of each all nodes, or one
            rank's range of them (`part`).
        num_sparse: sparse features D.
        num_dense: dense width d.
        post_processor: of the inner levels, see `xmcdist.inference.postprocess`.
        last_post_processor: of the last level; None: the same.
        bias: value of the bias feature the rankers were solved with.
        first_level: of the tree, to which ``levels[0]`` belongs; where it is not 1, something
            else finds the nodes of the level above, and a search starts from these.
        merge: how a label in several clusters gets its score, one of `MERGES`; slots of clusters
            that the beam lost have no part in it.
    """

    tree: LabelTree
    levels: Sequence[LevelWeights]
    num_sparse: int
    num_dense: int
    post_processor: str = "l3-hinge"
    last_post_processor: str | None = None
    bias: float = 1.0
    first_level: int = 1
    merge: str = "max"

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.merge not in MERGES:
            raise ValueError(f"merge={self.merge!r} is none of {', '.join(MERGES)}")
        if self.first_level < 1 or self.last_level > self.tree.depth:
            raise ValueError(
                f"{len(self.levels)} levels of weights from level {self.first_level} on, "
                f"for a tree of {self.tree.depth} levels"
            )
        for t, level in enumerate(self.levels, start=self.first_level):
            if level.first_node + level.num_nodes > self.tree.level_size(t):
                raise ValueError(
                    f"level {t}: weights of {level.num_nodes} nodes from {level.first_node}, "
                    f"the tree has {self.tree.level_size(t)}"
                )
            if (level.num_sparse, level.num_dense) != (self.num_sparse, self.num_dense):
                raise ValueError(
                    f"level {t}: weights for {level.num_sparse} sparse and {level.num_dense} dense features, "
                    f"the model has {self.num_sparse} and {self.num_dense}"
                )
            if level.dtype != self.levels[0].dtype:
                raise ValueError(
                    f"level {t}: {level.dtype} weights, level {self.first_level} has {self.levels[0].dtype}"
                )

    @property
    def last_level(self) -> int:
        """Of the tree, to which ``levels[-1]`` belongs."""
        return self.first_level + len(self.levels) - 1

    @property
    def is_whole(self) -> bool:
        """Whether every node of its levels is here."""
        sizes = (self.tree.level_size(t) for t in range(self.first_level, self.last_level + 1))
        return all(level.num_nodes == size for level, size in zip(self.levels, sizes, strict=True))

    def part(self, rank: int, world_size: int) -> LinearTree:
        """What one of several ranks holds: of every level a contiguous range of nodes.

        The ranges adjoin in rank order and have near-equal numbers of stored weights; they may
        cut a cluster.  On a memory-mapped model nothing is read but one pointer a cluster, and
        the weights of the clusters that are cut.

        Returns:
            The same tree with fewer weights, for `xmcdist.inference.sharded`.
        """
        if not self.is_whole:
            raise ValueError("only a whole model can be shared out, this is a part of one")
        levels = []
        for level, child_ptr in zip(self.levels, self.tree.child_ptr[self.first_level - 1 :], strict=False):
            start, stop = node_ranges(level.node_weights(child_ptr), child_ptr, world_size)[rank]
            levels.append(level.cut(start, stop, child_ptr))
        return replace(self, levels=tuple(levels))

    def save(self, folder: Path | str) -> None:
        """Write the whole model, from one process; ``model.json`` last."""
        if not self.is_whole:
            raise ValueError("only a whole model is saved, this is a part of one")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").unlink(missing_ok=True)
        for t, level in enumerate(self.levels, start=self.first_level):
            shutil.rmtree(folder / f"level-{t}", ignore_errors=True)
            level.save(folder / f"level-{t}")
        self.tree.save(folder / "tree")
        settings = {
            "version": _VERSION,
            "levels": len(self.levels),
            "num_sparse": self.num_sparse,
            "num_dense": self.num_dense,
            "post_processor": self.post_processor,
            "last_post_processor": self.last_post_processor,
            "bias": self.bias,
            "merge": self.merge,
            **({"first_level": self.first_level} if self.first_level > 1 else {}),
        }
        unfinished = folder / ".model.json.tmp"
        unfinished.write_text(json.dumps(settings, indent=1))
        os.replace(unfinished, folder / "model.json")

    @classmethod
    def load(cls, folder: Path | str, *, verify: bool = False) -> LinearTree:
        """Open a model; weights are memory-mapped, so this takes milliseconds whatever their size.

        Sizes and types are checked always.

        Args:
            verify: also read every byte and compare with the checksums, as one does where a
                model comes from elsewhere.  About a second for 2 GB.

        Raises:
            ValueError: a file is missing or damaged, or files do not belong together.
        """
        folder = Path(folder)
        head = folder / "model.json"
        try:
            settings = json.loads(head.read_text())
            version, count = settings.pop("version"), int(settings.pop("levels"))
            first = int(settings.get("first_level", 1))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{head}: not a linear tree model ({error!r}); train or copy it again") from error
        if version != _VERSION:
            raise ValueError(f"{head}: version {version}, this program reads {_VERSION}; train it again")
        tree = LabelTree.load(folder / "tree")
        levels = tuple(LevelWeights.load(folder / f"level-{t}", verify=verify) for t in range(first, first + count))
        try:
            model = cls(tree=tree, levels=levels, **settings)
            if not model.is_whole:
                raise ValueError(f"{[level.num_nodes for level in levels]} nodes do not fill the tree's levels")
            return model
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: files do not belong together ({error}); train or copy it again") from error

    def truncate(self, level: int) -> LinearTree:
        """The model whose last level is ``level``."""
        return replace(self, tree=self.tree.truncate(level), levels=self.levels[: level - self.first_level + 1])
