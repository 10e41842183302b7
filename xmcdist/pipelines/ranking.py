"""Linear rankers, level by level along a tree; clusters are shared out over the ranks."""

from __future__ import annotations

from pathlib import Path

import scipy.sparse as sp

from xmcdist.checkpoint.parts import write_csr
from xmcdist.inference.beam import predict_level
from xmcdist.negatives.schemes import active_parents
from xmcdist.pipelines.levels import per_level, root_rows
from xmcdist.pipelines.run import Run
from xmcdist.rankers.model import LevelWeights, LinearTree, cluster_ranges, estimate_costs
from xmcdist.rankers.solver import SolverParams, solve_level
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
    previous: Path | None = None
    levels = []
    for t in range(1, tree.depth + 1):
        name = f"{prefix}-{t}"
        folder = _level_stage(run, name, t, features, tree, tree_folder, previous, after)
        after, previous = (*after, name), folder
        levels.append(LevelWeights.load(folder / "weights"))
    r = run.cfg.ranker
    return LinearTree(
        tree=tree,
        levels=levels,
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
    previous: Path | None,
    after: tuple[str, ...],
) -> Path:
    cfg, child_ptr = run.cfg.ranker, tree.child_ptr[t - 1]
    scheme = per_level(cfg.negatives, t)
    next_is_man = t < tree.depth and "man" in per_level(cfg.negatives, t + 1)

    def body(folder: Path) -> None:
        Y_t = open_csr(tree_folder / f"Y.level-{t}")
        M = _matching(run, folder, t, scheme, tree_folder, previous)
        costs = estimate_costs(features, M, child_ptr)
        ranges = cluster_ranges(costs, run.world.world_size)
        weights = solve_level(
            features,
            Y_t,
            M,
            child_ptr,
            SolverParams(
                Cp=per_level(cfg.Cp, t),
                Cn=per_level(cfg.Cn, t),
                eps=cfg.eps,
                max_iter=cfg.max_iter,
                bias=cfg.bias,
                threshold=cfg.threshold,
                max_nonzeros_per_label=cfg.max_nonzeros_per_label,
                seed=run.cfg.seed,
            ),
            relevance=l1_rows(Y_t) if cfg.cost_sensitive else None,
            clusters=ranges[run.world.rank],
        )
        weights.save(folder / "weights", part=run.world.rank, parts=run.world.world_size)
        run.world.barrier()
        if next_is_man:
            start, stop = run.own(features.num_rows)
            above = open_csr(previous / "P")[start:stop] if previous is not None and t > 1 else None
            P = predict_level(
                LevelWeights.load(folder / "weights"),
                features.rows(start, stop),
                above,
                child_ptr,
                beam=cfg.beam,
                post_processor=cfg.post_processor,
                bias=cfg.bias,
            )
            write_csr(folder / "P", P, run.world)

    return run.stages.run(name, run.inputs("ranker", "seed", after=after, level=t), body)


def _matching(
    run: Run, folder: Path, t: int, scheme: str, tree_folder: Path, previous: Path | None
) -> sp.csr_matrix:
    """M [N, K_{t-1}]: each rank works out its documents' rows; all open the whole, memory-mapped."""
    start, stop = run.own(run.data.num_docs("trn"))
    if t == 1:
        part = root_rows(stop - start)
    else:
        true = open_csr(tree_folder / f"Y.level-{t - 1}")[start:stop]
        found = open_csr(previous / "P")[start:stop] if previous is not None and "man" in scheme else None
        part = active_parents(scheme, true, found)
    write_csr(folder / "M", part, run.world)
    return open_csr(folder / "M")
