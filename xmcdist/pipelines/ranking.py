"""Linear rankers, level by level along a tree; the labels are shared out over the ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.checkpoint.parts import write_csr
from xmcdist.inference.beam import predict_level
from xmcdist.inference.postprocess import PostProcessor
from xmcdist.negatives.schemes import active_parents
from xmcdist.pipelines.levels import per_level, root_rows
from xmcdist.pipelines.run import Run
from xmcdist.rankers.model import LinearTree
from xmcdist.rankers.partition import estimate_costs, node_ranges
from xmcdist.rankers.solver import SolverParams, solve_level
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.csr import l1_rows
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import open_csr
from xmcdist.trees.label_tree import LabelTree

__all__ = ["rank_stages"]


def rank_stages(run: Run, prefix: str, features: Features, tree_folder: Path, after: tuple[str, ...]) -> LinearTree:
    """Train the rankers of every level, each level a stage of its own.

    Args:
        prefix: stage names are ``<prefix>-1`` .. ``<prefix>-T``.
        features: of the training documents ``[N, D]`` and/or ``[N, d]``.
        tree_folder: a committed tree stage.
        after: stages that made tree and features.

    Returns:
        The model over all levels, memory-mapped.
    """
    tree = LabelTree.load(tree_folder / "tree")
    above: Path | None = None
    levels = []
    for t in range(1, tree.depth + 1):
        name = f"{prefix}-{t}"
        above = _level_stage(run, name, t, features, tree, tree_folder, above, after)
        after = (*after, name)
        levels.append(LevelWeights.load(above / "weights"))
    r = run.cfg.ranker
    return LinearTree(
        tree=tree,
        levels=tuple(levels),
        num_sparse=features.num_sparse,
        num_dense=features.num_dense,
        bias=r.bias,
        post_processor=r.post_processor,
        last_post_processor=r.last_post_processor or r.post_processor,
    )


def _level_stage(
    run: Run,
    name: str,
    t: int,
    features: Features,
    tree: LabelTree,
    tree_folder: Path,
    above: Path | None,
    after: tuple[str, ...],
) -> Path:
    cfg, child_ptr = run.cfg.ranker, tree.child_ptr[t - 1]
    later_is_man = any("man" in per_level(cfg.negatives, u) for u in range(t + 1, tree.depth + 1))
    params = SolverParams(
        Cp=per_level(cfg.Cp, t),
        Cn=per_level(cfg.Cn, t),
        eps=cfg.eps,
        max_iter=cfg.max_iter,
        bias=cfg.bias,
        threshold=cfg.threshold,
        max_nonzeros_per_label=cfg.max_nonzeros_per_label,
        seed=run.cfg.seed,
    )

    def body(folder: Path) -> None:
        Y_t = open_csr(tree_folder / f"Y.level-{t}")
        M = _matching(run, folder, t, per_level(cfg.negatives, t), tree_folder, above)
        ranges = node_ranges(estimate_costs(features, M, child_ptr), child_ptr, run.world.world_size)
        relevance = l1_rows(Y_t) if cfg.cost_sensitive else None
        if run.world.is_main:  # parts that a killed run with other ranks may have left
            shutil.rmtree(folder / "weights", ignore_errors=True)
        run.world.barrier()
        weights = solve_level(features, Y_t, M, child_ptr, params, relevance, nodes=ranges[run.world.rank])
        weights.save(folder / "weights", run.world.rank, run.world.world_size)
        run.world.barrier()
        if later_is_man:
            _predict(run, folder, features, child_ptr, above)

    return run.stages.run(name, run.inputs("ranker", "seed", after=after, level=t), body)


def _predict(run: Run, folder: Path, features: Features, child_ptr: NDArray[np.int64], above: Path | None) -> None:
    """P [N, K_t]: what the rankers so far retrieve for each training document; own rows a rank."""
    cfg = run.cfg.ranker
    start, stop = run.own(features.num_rows)
    root = root_rows(stop - start) * PostProcessor.named(cfg.post_processor).root_score
    parents = root if above is None else open_csr(above / "P")[start:stop]
    P = predict_level(
        LevelWeights.load(folder / "weights"),
        features.rows(start, stop),
        parents,
        child_ptr,
        cfg.beam,
        cfg.post_processor,
    )
    write_csr(folder / "P", P, run.world)


def _matching(run: Run, folder: Path, t: int, scheme: str, tree_folder: Path, above: Path | None) -> sp.csr_matrix:
    """M [N, K_{t-1}]: each rank works out its documents' rows; all open the whole, memory-mapped."""
    start, stop = run.own(run.data.num_docs("trn"))
    if t == 1:
        part = root_rows(stop - start)
    else:
        true = open_csr(tree_folder / f"Y.level-{t - 1}")[start:stop]
        found = open_csr(above / "P")[start:stop] if above is not None and "man" in scheme else None
        part = active_parents(scheme, true, found)
    write_csr(folder / "M", part, run.world)
    return open_csr(folder / "M")
