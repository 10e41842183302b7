"""Linear rankers, level by level along a tree; the labels are shared out over the ranks."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from xmcdist.checkpoint.atomic import no_space_is_clear, write_json
from xmcdist.checkpoint.parts import write_csr
from xmcdist.inference.beam import predict_level
from xmcdist.inference.postprocess import PostProcessor
from xmcdist.negatives.schemes import active_parents
from xmcdist.parallel.collectives import all_gather_ragged, all_reduce_array, gather_objects
from xmcdist.parallel.errors import errors_together
from xmcdist.parallel.visible import seen_by_all
from xmcdist.pipelines.levels import per_level, root_rows
from xmcdist.pipelines.run import Run
from xmcdist.rankers.device_solver import ranker_device, solve_level_on_device
from xmcdist.rankers.model import LinearTree
from xmcdist.rankers.partition import level_costs, member_sizes, node_ranges
from xmcdist.rankers.solver import SolverParams, solve_level
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.csr import l1_scales, row_slice
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import open_csr
from xmcdist.trees.label_tree import LabelTree

__all__ = ["rank_stages"]

_BALANCED = 1.25  # CPU seconds of the busiest rank over the mean, above which a level is told
_WORTH_TELLING_S = 1.0


def rank_stages(
    run: Run,
    prefix: str,
    features: Features,
    tree_folder: Path,
    after: tuple[str, ...],
    first_level: int = 1,
    above: Path | None = None,
) -> LinearTree:
    """Train the rankers of every level, or of those below a matcher's, each level a stage of its own.

    Args:
        prefix: stage names are ``<prefix>-<level>``.
        features: of the training documents ``[N, D]`` and/or ``[N, d]``.
        tree_folder: a committed tree stage.
        after: stages that made tree, features and ``above``.
        first_level: that gets rankers.
        above: where it is not 1, the stage of what finds the clusters of the level above: its
            ``P [N, K]`` is what they retrieve for the training documents, with scores in [0, 1].

    Returns:
        The model over these levels, memory-mapped.
    """
    tree = LabelTree.load(tree_folder / "tree")
    r = run.cfg.ranker
    device = ranker_device(r.device, _solver_params(run, 1).solver, run.world.local_rank, run.log.say)
    levels = []
    for t in range(first_level, tree.depth + 1):
        name = f"{prefix}-{t}"
        by_rankers = t > first_level
        above = _level_stage(run, name, t, features, tree, tree_folder, above, by_rankers, after, device)
        after = (*after, name)
        levels.append(LevelWeights.load(above / "weights"))
    return LinearTree(
        tree=tree,
        levels=tuple(levels),
        num_sparse=features.num_sparse,
        num_dense=features.num_dense,
        bias=r.bias,
        post_processor=r.post_processor,
        last_post_processor=r.last_post_processor or r.post_processor,
        first_level=first_level,
        merge=run.cfg.overlap.merge,
    )


def _level_stage(
    run: Run,
    name: str,
    t: int,
    features: Features,
    tree: LabelTree,
    tree_folder: Path,
    above: Path | None,
    by_rankers: bool,
    after: tuple[str, ...],
    device: torch.device | None,
) -> Path:
    cfg, child_ptr = run.cfg.ranker, tree.child_ptr[t - 1]
    later_is_man = any("man" in per_level(cfg.negatives, u) for u in range(t + 1, tree.depth + 1))
    params = _solver_params(run, t)

    def body(folder: Path) -> None:
        Y_t = open_csr(tree_folder / f"Y.level-{t}")
        own = _matching(run, t, per_level(cfg.negatives, t), tree_folder, above)
        write_csr(folder / "M", own, run.world)
        sizes = all_reduce_array(member_sizes(features.rows(*run.own(features.num_rows)), own))
        nodes = node_ranges(level_costs(sizes, features.num_dense, child_ptr), child_ptr, run.world.world_size)
        relevance = _relevance_scales(run, Y_t) if cfg.cost_sensitive else None
        if run.world.is_main:  # parts that a killed run with other ranks may have left
            shutil.rmtree(folder / "weights", ignore_errors=True)
        run.world.barrier()
        M, mine = open_csr(folder / "M"), nodes[run.world.rank]
        before = time.process_time()
        if device is None:
            weights = solve_level(features, Y_t, M, child_ptr, params, relevance, nodes=mine)
        else:
            weights = solve_level_on_device(
                features,
                Y_t,
                M,
                child_ptr,
                params,
                relevance,
                nodes=mine,
                device=device,
                sharers=-(-run.world.local_world_size // max(torch.cuda.device_count(), 1)),
                say=run.log.warn,
            )
        seconds = time.process_time() - before
        with errors_together(), no_space_is_clear(folder):
            weights.astype(cfg.weights_dtype).save(folder / "weights", run.world.rank, run.world.world_size)
        _tell_balance(run, name, t, folder, seconds)
        seen_by_all(folder, run.world)
        if later_is_man:
            _predict(run, folder, features, child_ptr, above, by_rankers)

    return run.stages.run(name, run.inputs("ranker", "seed", after=after, level=t), body)


def _solver_params(run: Run, t: int) -> SolverParams:
    """How level t is solved."""
    cfg = run.cfg.ranker
    return SolverParams(
        solver=cfg.solver,
        Cp=per_level(cfg.Cp, t),
        Cn=per_level(cfg.Cn, t),
        eps=cfg.eps,
        max_iter=cfg.max_iter,
        bias=cfg.bias,
        threshold=cfg.threshold,
        max_nonzeros_per_label=cfg.max_nonzeros_per_label,
        seed=run.cfg.seed,
        weighted_negatives=cfg.negative_weight == "score",
    )


def _predict(
    run: Run,
    folder: Path,
    features: Features,
    child_ptr: NDArray[np.int64],
    above: Path | None,
    by_rankers: bool,
) -> None:
    """P [N, K_t]: what matcher and rankers so far retrieve for each training document; own rows a rank.

    Args:
        by_rankers: ``above`` is a stage of rankers, not of the matcher.
    """
    cfg, post = run.cfg.ranker, PostProcessor.named(run.cfg.ranker.post_processor)
    start, stop = run.own(features.num_rows)
    root = root_rows(stop - start) * post.root_score
    parents = root if above is None else open_csr(above / "P")[start:stop]
    if above is not None and not by_rankers and post.log:  # the matcher's probabilities are no logarithms
        parents.data = np.log(np.maximum(parents.data, np.finfo(np.float32).tiny))
    P = predict_level(
        LevelWeights.load(folder / "weights"),
        features.rows(start, stop),
        parents,
        child_ptr,
        cfg.beam,
        cfg.post_processor,
    )
    write_csr(folder / "P", P, run.world)


def _matching(run: Run, t: int, scheme: str, tree_folder: Path, above: Path | None) -> sp.csr_matrix:
    """M of this rank's documents ``[n, K_{t-1}]``."""
    start, stop = run.own(run.data.num_docs("trn"))
    if t == 1:
        return root_rows(stop - start)
    true = row_slice(open_csr(tree_folder / f"Y.level-{t - 1}"), start, stop)
    found = row_slice(open_csr(above / "P"), start, stop) if above is not None and "man" in scheme else None
    return active_parents(scheme, true, found, weight=run.cfg.ranker.negative_weight)


def _relevance_scales(run: Run, Y_t: sp.csr_matrix) -> NDArray[np.float64]:
    """By what each document's values of Y_t are multiplied to add up to 1, ``[N]``; collective."""
    own = torch.from_numpy(l1_scales(row_slice(Y_t, *run.own(Y_t.shape[0]))))
    return np.concatenate([part.numpy() for part in all_gather_ragged(own)])


def _tell_balance(run: Run, name: str, t: int, folder: Path, seconds: float) -> None:
    """Keep and tell the CPU seconds of every rank's solver; collective."""
    cpu = gather_objects(seconds)
    mean = sum(cpu) / len(cpu)
    balance = max(cpu) / mean if mean else 1.0
    run.log.metrics(
        {"stage": name, "level": t, "ranker_cpu_s": round(sum(cpu), 3), "ranker_balance": round(balance, 3)}
    )
    if not run.world.is_main:
        return
    write_json(folder / "balance.json", {"cpu_seconds": [round(s, 4) for s in cpu], "max_over_mean": round(balance, 4)})
    if balance > _BALANCED and mean > _WORTH_TELLING_S:
        run.log.say(
            f"{name}: work was shared out unevenly: the busiest of {len(cpu)} processes took {max(cpu):.1f} s of CPU "
            f"time, {balance:.2f} times the mean"
        )
