"""The main story: data, features, tree, matcher, rankers, measures, model folder."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.checkpoint.atomic import write_json
from xmcdist.checkpoint.run_lock import held
from xmcdist.checkpoint.stages import fingerprint
from xmcdist.config.errors import UserError
from xmcdist.config.schema import RunConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.evaluation.table import format_table
from xmcdist.inference.beam import beam_search
from xmcdist.inference.cluster_matcher import ClusterMatcher
from xmcdist.observability.environment import peak_memory_mb, versions
from xmcdist.observability.log import RunLog
from xmcdist.observability.origin import command_line, git_commit, hardware
from xmcdist.observability.trackers import check_trackers, open_tracker
from xmcdist.parallel import watch
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.launch import World, slurm_job
from xmcdist.parallel.mesh import Mesh
from xmcdist.pipelines.evaluation import TABLE_KEYS, label_frequency, measure
from xmcdist.pipelines.export import export_stage
from xmcdist.pipelines.features import features_stage
from xmcdist.pipelines.interruptible import InterruptibleStages
from xmcdist.pipelines.kept_scores import KeptScores
from xmcdist.pipelines.label_embedding import check_label_embedding
from xmcdist.pipelines.levels import matched_levels
from xmcdist.pipelines.overlap import Trained, last_of_matcher, overlap_rank_stages
from xmcdist.pipelines.prepare import prepare_data
from xmcdist.pipelines.ranking import rank_stages
from xmcdist.pipelines.report import draw_report
from xmcdist.pipelines.run import Run, shaping_settings
from xmcdist.pipelines.shapes import log_cluster_sizes, log_label_frequency
from xmcdist.pipelines.together import errors_together, share_cores
from xmcdist.pipelines.tree import tree_stage
from xmcdist.rankers.model import LinearTree
from xmcdist.sparse.csr import without
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import open_csr
from xmcdist.training import preemption
from xmcdist.trees.label_tree import LabelTree

__all__ = ["train"]


def train(
    cfg: RunConfig,
    world: World,
    make: Callable[[Path], PreparedDataset] | None = None,
    then: Callable[[Run], dict[str, Any]] | None = None,
    member_of: Path | None = None,
) -> dict[str, Any]:
    """Run every stage that is not done yet; collective.

    Args:
        make: of the prepared data, as `prepare_data` takes it; None: from ``cfg.dataset``.
        then: further stages of a run that has come to its matcher or beyond; what it returns
            is added to the results, which there are then also where ``until`` ends the run.
        member_of: run folder of the ensemble that this run is a member of.  It is told of a
            pre-emption, its other members lend stages made from the same inputs, and the
            scores of test documents are kept for it.

    Returns:
        What ``results.json`` holds: ``metrics`` and ``baseline`` (percent), ``seconds`` per
        stage, ``peak_memory_mb``, ``world_size``, ``versions``, ``command``, ``commit``,
        ``hardware``, ``config_hash``.  Empty when ``until`` ended the run before its last stage.

    Raises:
        UserError: a fault of settings, data or environment, or another run is using the folder;
            nothing finished is lost.
        Preempted: a signal asked one of the ranks to end; the same settings go on.
    """
    if cfg.members:
        raise ValueError("an ensemble's members are trained by train_members")
    log = RunLog(Path(cfg.run_dir), world)
    with errors_together():
        if world.is_main and (Path(cfg.run_dir) / "members").is_dir():
            raise UserError(f"run_dir={cfg.run_dir} holds an ensemble of several runs: choose another run_dir=...")
    with held(Path(cfg.run_dir), world, log.say, slurm_job()) as guard:
        return _train(cfg, world, log, guard, make, then, member_of)


def _train(
    cfg: RunConfig,
    world: World,
    log: RunLog,
    guard: Callable[[], None],
    make: Callable[[Path], PreparedDataset] | None,
    then: Callable[[Run], dict[str, Any]] | None,
    member_of: Path | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    run_dir = Path(cfg.run_dir)
    share_cores(world, cfg.engine.threads)
    if cfg.encoder.preset != "none" and world.device_type == "cpu":
        _keep_freed_memory()
    with errors_together():
        if world.is_main:
            check_trackers(cfg.tracker)
    preemption.begin(member_of or run_dir, log.say, watch.gone)
    stages = InterruptibleStages(run_dir, world, log.say, verify=cfg.checkpoint.verify, guard=guard)
    if member_of is not None:
        others = [*(member_of / "members").glob("*"), *(member_of / "members").glob(".other/*")]
        stages.lenders = sorted(path for path in others if path != run_dir)
    settings = shaping_settings(cfg)
    stages.check(settings)
    if world.is_main:
        preemption.clear_mark(run_dir)
    if cfg.encoder.preset != "none":
        from xmcdist.encoders.hf import check_available

        check_available(cfg.encoder)
    mesh = Mesh.build(world, cfg.engine.label_shards)
    if cfg.encoder.preset != "none":
        from xmcdist.training.engines.environment import check_launch

        check_launch(cfg.engine.precision)
    data = prepare_data(cfg, world, log.say, make)
    if cfg.encoder.preset != "none" and not data.has_text:
        raise UserError("this data set has features but no texts, so only the linear path is open: set encoder=none")
    stages.remember(settings)
    stages.seconds["prepare"] = time.perf_counter() - started
    run = Run(cfg, world, log, stages, data, mesh, member=member_of is not None)
    check_label_embedding(run)
    _start_trackers(run)
    log.metrics({"stage": "prepare", "seconds": round(stages.seconds["prepare"], 3)}, once=True)
    stages.told = lambda name, seconds: log.metrics({"stage": name, "seconds": round(seconds, 3)})
    log_label_frequency(run)
    log.say(
        f"{data.num_docs('trn')} documents, {data.num_labels} labels, {world.world_size} "
        f"process{'es' if world.world_size > 1 else ''}, run folder {run_dir}"
    )
    try:
        measured = _stages(run)
        added = then(run) if then is not None and cfg.until in (None, "match", "rank") else None
    except preemption.Preempted as stop:
        log.say(str(stop))
        log.close()
        raise
    except BaseException:
        log.close(failed=True)
        raise
    results: dict[str, Any] = {}
    if measured is None and added is None:
        log.say(f"until={cfg.until}: its stages are done; the same command without it, or with a later one, goes on")
    else:
        results = _results(run, *(measured or ({}, {})), time.perf_counter() - started, added or {})
    if world.is_main:
        draw_report(run_dir, log.say)
    log.close()
    return results


def _stages(run: Run) -> tuple[dict[str, float], dict[str, float]] | None:
    """Metrics and baseline; None where ``until`` says to end sooner."""
    cfg, has_test = run.cfg, run.data.has_test
    if cfg.until == "prepare":
        return None
    sparse = features_stage(run)
    X = open_csr(sparse / "X.trn")
    X_test = open_csr(sparse / "X.tst") if has_test else None
    tree = tree_stage(run, "tree", cfg.tree, Features(sparse=X, dense=None), after=("features",))
    log_cluster_sizes(run, tree)
    if cfg.ranker.clusters_by == "matcher":
        matched_levels(cfg, LabelTree.load(tree / "tree"))  # refused here, not after the rankers on TF-IDF alone
    if cfg.until == "tree":
        return None
    linear_only = cfg.encoder.preset == "none"
    baseline: dict[str, float] = {}
    linear = None
    if linear_only or (cfg.evaluation.linear_baseline and has_test):
        linear = rank_stages(run, "linear", Features(sparse=X, dense=None), tree, after=("features", "tree"))
    clustered = linear
    if linear_only and linear is not None and cfg.overlap.copies > 1:
        trained = Trained(linear, tree, ("features", "tree"))
        linear = overlap_rank_stages(run, "linear", Features(sparse=X, dense=None), trained)
    if cfg.until == "linear":
        return None
    if clustered is not None and X_test is not None and cfg.until is None:
        baseline = _measure(run, clustered, Features(sparse=X_test, dense=None))
    if linear_only and linear is not None:
        metrics = baseline
        if linear is not clustered and X_test is not None:
            metrics = _measure(run, linear, Features(sparse=X_test, dense=None))
        export_stage(run, linear, encoder=None, sparse=True)
        return metrics, baseline
    from xmcdist.pipelines.matching import match_stages

    matched = match_stages(run, tree)
    if cfg.until == "match":
        return None
    dense = np.load(matched / "E.trn.npy", mmap_mode="r", allow_pickle=False)
    dense_test = np.load(matched / "E.tst.npy", mmap_mode="r", allow_pickle=False) if has_test else None
    use_sparse, use_dense = cfg.ranker.features != "dense", cfg.ranker.features != "sparse"
    features = Features(sparse=X if use_sparse else None, dense=dense if use_dense else None)
    after: tuple[str, ...] = ("features", "tree", "embed")
    matcher = ClusterMatcher.load(matched / "matcher") if cfg.ranker.clusters_by == "matcher" else None
    if matcher is not None:
        last = matcher.num_levels
        followed, levels = (matched.with_name(name) for name in last_of_matcher(cfg.overlap))
        above, after = levels.with_name(f"{levels.name}-{last}"), (*after, followed.name)
        rankers = rank_stages(run, "rank", features, followed, after=after, first_level=last + 1, above=above)
        trained = Trained(rankers, followed, after, above)
    else:
        start = tree if cfg.ranker.tree_start == "tree" else None
        refined = tree_stage(run, "ranker_tree", cfg.ranker_tree, features, after=after, start=start)
        log_cluster_sizes(run, refined)
        after = (*after, "ranker_tree")
        rankers = rank_stages(run, "rank", features, refined, after=after)
        trained = Trained(rankers, refined, after)
    if cfg.overlap.copies > 1:
        rankers = overlap_rank_stages(run, "rank", features, trained)
    if cfg.until == "rank":
        return None
    metrics = {}
    if has_test:
        test = Features(sparse=X_test if use_sparse else None, dense=dense_test if use_dense else None)
        raw = np.load(matched / "raw.tst.npy", mmap_mode="r", allow_pickle=False) if matcher is not None else None
        metrics = _measure(run, rankers, test, matcher, raw)
    encoder = matched / "encoder" if use_dense or matcher is not None else None
    export_stage(run, rankers, encoder, sparse=use_sparse, matcher=None if matcher is None else matched / "matcher")
    return metrics, baseline


def _measure(
    run: Run,
    rankers: LinearTree,
    features: Features,
    matcher: ClusterMatcher | None = None,
    raw: NDArray[np.float32] | None = None,
) -> dict[str, float]:
    """Metrics on the test documents; where a matcher finds their clusters, from embeddings ``raw [N, d]``."""
    cfg = run.cfg
    Y, known = run.data.Y("trn"), run.data.known("tst")
    topk = max(cfg.ranker.topk, *cfg.evaluation.ks)
    most_known = 0 if known is None else int(np.diff(known.indptr).max())

    def predict(start: int, stop: int) -> sp.csr_matrix:
        found = matcher.clusters(raw[start:stop], cfg.ranker.beam) if matcher is not None and raw is not None else None
        scores = beam_search(
            rankers,
            features.rows(start, stop),
            beam=cfg.ranker.beam,
            topk=topk + most_known,
            post_processor=rankers.post_processor,
            last_post_processor=rankers.last_post_processor,
            start=found,
        )
        return scores if known is None else without(scores, known[start:stop])

    kept = KeptScores()
    metrics = measure(
        predict,
        run.data.Y("tst"),
        label_frequency(Y),
        Y.shape[0],
        cfg.evaluation,
        (cfg.dataset.propensity_a, cfg.dataset.propensity_b),
        run.world,
        keep=kept.add if run.member else lambda scores, labels: None,
    )
    if run.member:
        kept.write(Path(cfg.run_dir), max(cfg.evaluation.ks), run.world)
    return metrics


def _results(
    run: Run, metrics: dict[str, float], baseline: dict[str, float], wall: float, added: dict[str, Any]
) -> dict[str, Any]:
    peaks = gather_objects(peak_memory_mb())
    results = {
        "metrics": metrics,
        "baseline": baseline,
        "seconds": {name: round(s, 3) for name, s in run.stages.seconds.items()},
        "seconds_this_start": round(wall, 3),
        "stages_skipped": run.stages.skipped,
        "peak_memory_mb": round(max(peaks), 1),
        "peak_memory_mb_per_rank": [round(p, 1) for p in peaks],
        "world_size": run.world.world_size,
        "versions": versions(),
        "command": command_line(),
        "commit": git_commit() if run.world.is_main else None,
        "hardware": hardware(),
        "config_hash": fingerprint(shaping_settings(run.cfg)),
        "config": asdict(run.cfg),
        **added,
    }
    run.log.metrics({name: values for name, values in (("test", metrics), ("test_linear_only", baseline)) if values})
    if run.world.is_main:
        write_json(Path(run.cfg.run_dir) / "results.json", results)
        if metrics:
            rows = {"linear only": baseline} if baseline else {}
            if run.cfg.encoder.preset != "none":
                rows["full"] = metrics
            elif run.cfg.overlap.copies > 1:
                rows["disentangled"] = metrics
            print(format_table(rows, TABLE_KEYS), flush=True)
        made = f"model in {Path(run.cfg.run_dir) / 'model'}; " if run.cfg.until is None else ""
        run.log.say(f"{made}{wall:.0f} s since this start")
    run.world.barrier()
    return results


def _keep_freed_memory() -> None:
    """Let glibc keep what a training step frees for the next one.

    By default it hands every large block back to the system, which then clears the pages
    anew each step: a quarter of a CPU step's time with a small encoder.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt(3)
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def _start_trackers(run: Run) -> None:
    cfg, config = run.cfg.tracker, asdict(run.cfg)
    for name in cfg.use:
        run.log.track(partial(open_tracker, name, cfg, Path(run.cfg.run_dir), config), name)
