"""A label tree as the settings ask for it: given, or clustered from label embeddings.

Letters: N documents, L labels, W ranks.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from xmcdist.config.schema import TreeConfig
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range
from xmcdist.parallel.visible import seen_by_all
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import CsrWriter, open_array, open_csr, save_csr
from xmcdist.trees.files import read_label_features, read_tree
from xmcdist.trees.kmeans import balanced_kmeans
from xmcdist.trees.label_embedding import label_embedding
from xmcdist.trees.label_tree import LabelTree
from xmcdist.trees.levels import binary_depth, build_tree, cluster_levels

__all__ = ["build_label_tree"]


def build_label_tree(
    features: Features,
    Y: sp.csr_matrix,
    cfg: TreeConfig,
    world: World | None = None,
    workdir: Path | str | None = None,
    *,
    start: LabelTree | None = None,
    threads: int | None = None,
) -> LabelTree:
    """The tree of ``cfg``, the same on every rank and for every number of ranks; collective.

    Args:
        features: of the training documents, parts of unit rows.
        Y: their labels ``[N, L]``.
        cfg: a given tree (``path``), given label embeddings (``label_features``), or
            neither: embeddings from the documents.
        world: default one process.
        workdir: shared folder for label embeddings made by several ranks; they are deleted
            after use.  One process needs none.
        start: a tree of the same labels, a place each, that k-means starts from; default random
            members.
        threads: a process; default numba's.

    Raises:
        TreeError: a setting that does not fit the labels, or a given file that does not.
    """
    world = world or World.single()
    num_labels = int(Y.shape[1])
    if cfg.path is not None:
        return read_tree(cfg.path, num_labels)
    depth = binary_depth(num_labels, cfg.max_leaf_size)
    cluster_levels(depth, cfg.nr_splits, cfg.min_codes)  # refuses bad settings before the work
    if cfg.label_features is not None:
        Z = read_label_features(cfg.label_features, num_labels)
    else:
        Z = _embed(features, Y, world, workdir, threads)
    order = None if start is None or not start.is_partition else start.labels
    codes = balanced_kmeans(
        Z, depth, seed=cfg.seed, max_iter=cfg.kmeans_max_iter, order=order, world=world, threads=threads
    )
    if world.world_size > 1 and workdir is not None:
        world.barrier()
        if world.is_main:
            shutil.rmtree(Path(workdir) / "label_embedding", ignore_errors=True)
    return build_tree(codes, depth, nr_splits=cfg.nr_splits, min_codes=cfg.min_codes)


def _embed(
    features: Features, Y: sp.csr_matrix, world: World, workdir: Path | str | None, threads: int | None
) -> Features:
    """Label embeddings ``[L, ...]``; every rank makes its labels' rows, all map the whole from disk."""
    if world.world_size == 1:
        return label_embedding(features, Y, threads=threads)
    if workdir is None:
        raise ValueError("build_label_tree on several ranks needs a workdir that all of them see")
    folder = Path(workdir) / "label_embedding"
    start, stop = row_range(Y.shape[1], world.rank, world.world_size)
    mine = label_embedding(features, Y, start, stop, threads=threads)
    part = _part(folder, world.rank)
    part.mkdir(parents=True, exist_ok=True)
    if mine.sparse is not None:
        save_csr(part / "sparse", mine.sparse)
    if mine.dense is not None:
        np.save(part / "dense.npy", mine.dense)
    seen_by_all(folder, world)
    if world.is_main:
        _join(folder, features, Y.shape[1], world.world_size)
    seen_by_all(folder, world)
    return Features(
        open_csr(folder / "sparse") if features.sparse is not None else None,
        open_array(folder / "dense.npy", "float32", ndim=2) if features.dense is not None else None,
    )


def _join(folder: Path, features: Features, num_labels: int, ranks: int) -> None:
    """String the ranks' rows together, streaming."""
    if features.sparse is not None:
        with CsrWriter(folder / "sparse", features.num_sparse) as writer:
            for rank in range(ranks):
                writer.append(open_csr(_part(folder, rank) / "sparse"))
    if features.dense is not None:
        path = folder / "dense.npy"
        whole = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_labels, features.num_dense))
        with open(path, "r+b") as f:  # on a full disk an error now, and not the end of the process at some page
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
        for rank in range(ranks):
            start, stop = row_range(num_labels, rank, ranks)
            whole[start:stop] = open_array(_part(folder, rank) / "dense.npy", "float32", ndim=2)
        whole.flush()
    for rank in range(ranks):
        shutil.rmtree(_part(folder, rank))


def _part(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank:05d}"
