"""A label tree as the settings ask for it: given, or clustered from label embeddings.

Letters: N documents, L labels, W ranks.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.config.schema import TreeConfig
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range
from xmcdist.parallel.visible import seen_by_all
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import CsrWriter, open_array, open_csr, save_csr
from xmcdist.trees.combine import combine
from xmcdist.trees.errors import TreeError
from xmcdist.trees.files import read_label_features, read_text_weight, read_tree
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
    texts: Features | None = None,
    start: LabelTree | None = None,
    threads: int | None = None,
) -> LabelTree:
    """The tree of ``cfg``, the same on every rank and for every number of ranks; collective.

    Args:
        features: of the training documents, parts of unit rows.
        Y: their labels ``[N, L]``.
        cfg: a given tree (``path``), given label embeddings (``label_features``), or
            neither: embeddings from the documents, the labels' texts, or both (``label_embedding``).
        world: default one process.
        workdir: shared folder for label embeddings made by several ranks; they are deleted
            after use.  One process needs none.
        texts: vectors of the labels' texts ``[L, any]``, rows of unit or zero length, on every
            rank the whole; read unless ``label_embedding`` is ``pifa``.
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
        Z = _embed(_Source(features, Y, cfg, texts, threads), world, workdir)
    order = None if start is None or not start.is_partition else start.labels
    codes = balanced_kmeans(
        Z, depth, seed=cfg.seed, max_iter=cfg.kmeans_max_iter, order=order, world=world, threads=threads
    )
    if world.world_size > 1 and workdir is not None:
        world.barrier()
        if world.is_main:
            shutil.rmtree(Path(workdir) / "label_embedding", ignore_errors=True)
    return build_tree(codes, depth, nr_splits=cfg.nr_splits, min_codes=cfg.min_codes, flat=cfg.flat)


class _Source:
    """What label embeddings are made of, and any range of them."""

    def __init__(
        self, features: Features, Y: sp.csr_matrix, cfg: TreeConfig, texts: Features | None, threads: int | None
    ) -> None:
        self.how, self.num_labels = cfg.label_embedding, int(Y.shape[1])
        if self.how != "pifa" and texts is None:
            raise ValueError(f"label_embedding={self.how} needs vectors of the labels' texts")
        if texts is not None and texts.num_rows != self.num_labels:
            raise TreeError(f"vectors of {texts.num_rows} label texts for {self.num_labels} labels")
        self.texts = None if self.how == "pifa" else texts
        self.weight: NDArray[np.float64] | None = None
        if self.how == "convex":
            self.weight = read_text_weight(cfg.text_weight, self.num_labels)
        self._documents, self._Y, self._threads = features, Y, threads

    def rows(self, start: int, stop: int) -> Features:
        """Embeddings of labels ``[start, stop)``, the same bits whatever the range."""
        if self.texts is not None and self.how == "text":
            return self.texts.rows(start, stop)
        by_documents = label_embedding(self._documents, self._Y, start, stop, threads=self._threads)
        if self.texts is None:
            return by_documents
        weight = None if self.weight is None else self.weight[start:stop]
        return combine(by_documents, self.texts.rows(start, stop), weight)


def _embed(source: _Source, world: World, workdir: Path | str | None) -> Features:
    """Label embeddings ``[L, ...]``; every rank makes its labels' rows, all map the whole from disk."""
    if source.how == "text" and source.texts is not None:
        return source.texts
    if world.world_size == 1:
        return source.rows(0, source.num_labels)
    if workdir is None:
        raise ValueError("build_label_tree on several ranks needs a workdir that all of them see")
    folder = Path(workdir) / "label_embedding"
    mine = source.rows(*row_range(source.num_labels, world.rank, world.world_size))
    part = _part(folder, world.rank)
    part.mkdir(parents=True, exist_ok=True)
    if mine.sparse is not None:
        save_csr(part / "sparse", mine.sparse)
    if mine.dense is not None:
        np.save(part / "dense.npy", mine.dense)
    seen_by_all(folder, world)
    if world.is_main:
        _join(folder, mine, source.num_labels, world.world_size)
    seen_by_all(folder, world)
    return Features(
        open_csr(folder / "sparse") if mine.sparse is not None else None,
        open_array(folder / "dense.npy", "float32", ndim=2) if mine.dense is not None else None,
    )


def _join(folder: Path, like: Features, num_labels: int, ranks: int) -> None:
    """String the ranks' rows together, streaming; ``like``: one rank's, for the parts and their widths."""
    if like.sparse is not None:
        with CsrWriter(folder / "sparse", like.num_sparse) as writer:
            for rank in range(ranks):
                writer.append(open_csr(_part(folder, rank) / "sparse"))
    if like.dense is not None:
        path = folder / "dense.npy"
        whole = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_labels, like.num_dense))
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
