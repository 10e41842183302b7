"""One level of a beam search over one block of documents, and the levels of a whole search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp
from numba import get_num_threads
from numpy.typing import NDArray

from xmcdist.inference import beam_kernels as kernels
from xmcdist.inference import keep_kernels
from xmcdist.inference.postprocess import PostProcessor
from xmcdist.rankers.model import LinearTree
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.features import Features
from xmcdist.trees.label_tree import LabelTree

__all__ = [
    "Block",
    "Rows",
    "Step",
    "Tables",
    "block_size",
    "check_width",
    "each",
    "join_rows",
    "most_scores",
    "root_rows",
    "row_span",
    "search_steps",
    "start_rows",
    "to_csr",
    "widest_row",
]

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
Rows = tuple[I64, I64, F32]  # ragged rows: indptr, ids ascending in a row, scores
T = TypeVar("T")

_BLOCK_SCORES = 1 << 21  # most scores of a block: 8 MB a thread
_BLOCK_DOCS = 2048
_LEAST_DOCS = 64  # fewer are not worth a thread: a cluster's weights should serve many
_FEW_DOCS = 16  # fewer are not worth a table of all features
_KINDS = {"noop": keep_kernels.NOOP, "sigmoid": keep_kernels.SIGMOID, "hinge": keep_kernels.HINGE}
_MERGES = {"max": keep_kernels.MAX, "mean": keep_kernels.MEAN}
_NO_IDS = np.zeros(0, np.int64)
_WHOLE: NDArray[Any] = np.zeros(0, np.float32)
_HALF: NDArray[Any] = np.zeros(0, np.uint16)
_LIKE = {"float32": (_WHOLE, _WHOLE), "mixed": (_WHOLE, _HALF), "float16": (_HALF, _HALF)}


@dataclass(frozen=True, eq=False)
class Step:
    """One level of a search: weights, the children of its clusters, and what is kept.

    Where the weights are a range of the level's nodes, ``child_ptr`` counts the children in
    that range alone.
    """

    weights: LevelWeights
    child_ptr: I64
    post: PostProcessor
    keep: int
    ids: I64  # labels of the nodes, or empty
    merge: int = keep_kernels.MAX  # how the scores of a label's nodes become one

    @classmethod
    def of(
        cls,
        level: LevelWeights,
        child_ptr: NDArray[np.int64],
        post: PostProcessor,
        keep: int,
        ids: I64 = _NO_IDS,
        merge: str = "max",
    ) -> Step:
        """A level, or a range of its nodes.

        Args:
            child_ptr: ``[K+1]`` of the level in the tree.
            keep: nodes, or labels, kept a document.
            ids: labels of the level's nodes; empty: nodes stand for themselves.
            merge: ``max`` or ``mean``: of the scores of a label's nodes.
        """
        if keep < 1:
            raise ValueError(f"beam and topk must be at least 1, not {keep}")
        own = child_ptr
        if level.num_nodes != child_ptr[-1]:
            own = np.clip(child_ptr, level.first_node, level.first_node + level.num_nodes)
        return cls(level, np.ascontiguousarray(own, np.int64), post, min(keep, int(child_ptr[-1])), ids, _MERGES[merge])

    def widest(self, beam: int) -> int:
        """Most scores one document can need here when it comes with ``beam`` clusters."""
        sizes = np.diff(self.child_ptr)
        return int(sizes.sum() if beam >= sizes.size else -np.partition(-sizes, beam)[:beam].sum())


@dataclass(frozen=True, eq=False)
class Tables:
    """Some levels of a search as the compiled loops want them."""

    levels: I64  # [levels, 11], columns `beam_kernels.LEVEL`
    parts: I64  # [parts, 13], columns `beam_kernels.PART`
    like: tuple[NDArray[Any], NDArray[Any]]  # empty, of the types of sparse and dense weights
    steps: tuple[Step, ...]  # own the arrays whose addresses are in the tables

    @classmethod
    def of(cls, steps: Sequence[Step]) -> Tables:
        """Tables of levels that follow each other."""
        levels: list[list[int]] = []
        parts: list[list[int]] = []
        for step in steps:
            first = len(parts)
            for p in step.weights.parts:
                arrays: list[NDArray[Any]] = [p.cluster_ptr, p.chunk_node, p.chunk_ptr, p.entry_start, p.entry_offset]
                arrays += [p.feature, p.child, p.value, p.dense, p.bias]
                parts.append([p.first_cluster, p.num_clusters, p.num_dense, *(a.ctypes.data for a in arrays)])
            post, ids = step.post, step.ids
            place = [step.child_ptr.ctypes.data, step.child_ptr.size - 1, ids.ctypes.data, ids.size]
            kind = [step.keep, _KINDS[post.kind], post.power, int(post.log)]
            levels.append([*place, *kind, first, len(parts), step.merge])
        table = np.array(levels, np.int64).reshape(-1, len(kernels.LEVEL))
        part_table = np.array(parts, np.int64).reshape(-1, len(kernels.PART))
        return cls(table, part_table, _LIKE[steps[0].weights.dtype], tuple(steps))


class Block:
    """Some documents on their way down."""

    def __init__(self, features: Features) -> None:
        n, X, dense = features.num_rows, features.sparse, features.dense
        if X is None:
            sparse = (np.zeros(n + 1, np.int64), np.zeros(0, np.uint32), np.zeros(0, np.float32))
        else:
            words = X.indices.view(np.uint32) if X.indices.dtype == np.int32 else X.indices.astype(np.uint32)
            sparse = (X.indptr.astype(np.int64), _frozen(words), _frozen(X.data))
        rows = np.zeros((n, 0), np.float32) if dense is None else dense
        self.x = (*sparse, _frozen(rows), np.zeros(0 if n < _FEW_DOCS else features.num_sparse, np.uint32))

    def descend(self, tables: Tables, rows: Rows) -> Rows:
        """From the kept nodes above the first of some levels to those of the last."""
        args: Any = (*self.x, *rows)
        best: Rows = kernels.descend(tables.levels, tables.parts, *tables.like, *args)
        return best

    def score(self, tables: Tables, rows: Rows, wanted_ptr: I64, wanted: I64) -> F32:
        """Scores of given nodes of one level whose parents are all among the rows'."""
        args: Any = (*self.x, *rows, wanted_ptr, wanted)
        scores: F32 = kernels.step_to(tables.levels[0], tables.parts, *tables.like, *args)
        return scores


def search_steps(
    model: LinearTree,
    beam: int,
    topk: int,
    post_processor: str | None,
    last_post_processor: str | None,
    upto_level: int | None,
) -> list[Step]:
    """The levels of a search, as `xmcdist.inference.beam.beam_search` describes them.

    Raises:
        ValueError: settings do not fit the model.
    """
    first, depth = model.first_level, model.last_level
    last = depth if upto_level is None else upto_level
    if not first <= last <= depth:
        raise ValueError(f"upto_level ({upto_level}) must be in [{first}, {depth}]")
    name = post_processor or model.post_processor
    last_name = last_post_processor or (model.last_post_processor if post_processor is None else None) or name
    tree, steps = model.tree, []
    for t in range(first, last + 1):
        is_leaf = t == tree.depth
        post = PostProcessor.named(last_name if is_leaf else name)
        ids = np.asarray(tree.labels, np.int64) if is_leaf else _NO_IDS
        keep = topk if t == last else beam
        steps.append(Step.of(model.levels[t - first], tree.child_ptr[t - 1], post, keep, ids, model.merge))
    return steps


def check_width(steps: Sequence[Step], features: Features) -> None:
    """Refuse documents that are not as wide as the weights.

    Raises:
        ValueError: with both widths.
    """
    for level in (step.weights for step in steps):
        if (level.num_sparse, level.num_dense) != (features.num_sparse, features.num_dense):
            raise ValueError(
                f"documents have {features.num_sparse} sparse and {features.num_dense} dense features, "
                f"the rankers were trained on {level.num_sparse} and {level.num_dense}"
            )


def most_scores(steps: Sequence[Step], start: int) -> int:
    """Most scores one document can need on a level, when it comes with ``start`` nodes."""
    width = [start, *(step.keep for step in steps[:-1])]
    return max(1, *(step.widest(w) for step, w in zip(steps, width, strict=True)))


def widest_row(rows: Rows) -> int:
    """Most nodes a document has, at least 1."""
    return int(np.diff(rows[0]).max(initial=1))


def block_size(most: int, docs: int, threads: int | None) -> int:
    """How many of ``docs`` documents one thread takes at a time.

    Args:
        most: as of `most_scores`.
    """
    share = max(-(-docs // workers(threads)), _LEAST_DOCS)  # few documents: all threads, too
    return max(min(_BLOCK_SCORES // most, _BLOCK_DOCS, share), 1)


def workers(threads: int | None) -> int:
    """Threads of a search; default numba's."""
    return max(threads or get_num_threads(), 1)


def each(run: Callable[[int], T], starts: range, threads: int | None) -> list[T]:
    """Results of ``run`` on every block, in order."""
    many = min(workers(threads), len(starts))
    if many <= 1:
        return [run(a) for a in starts]
    with ThreadPoolExecutor(many) as pool:
        return list(pool.map(run, starts))


def root_rows(n: int, post: PostProcessor) -> Rows:
    """Every document at the root."""
    return np.arange(n + 1), np.zeros(n, np.int64), np.full(n, post.root_score, np.float32)


def start_rows(tree: LabelTree, first_level: int, start: sp.csr_matrix | None, n: int, post: PostProcessor) -> Rows:
    """Where a search of n documents begins: at nodes that were found, or at the root.

    Args:
        first_level: of the search.
        start: ``[n, K]`` of the level above; stored entries, 0 included, are the nodes.  None:
            the root.
        post: of the first level.

    Raises:
        ValueError: the search begins below the root and no nodes are given, or another number
            of documents or nodes.
    """
    if start is None:
        if first_level > 1:
            raise ValueError(
                f"the rankers begin at level {first_level}: give the nodes of level {first_level - 1} "
                "that each document starts from"
            )
        return root_rows(n, post)
    must = (n, tree.level_size(first_level - 1))
    if start.shape != must:
        raise ValueError(f"start is {start.shape}, must be {must}")
    kept: Any = start if start.has_sorted_indices else start.sorted_indices()
    return kept.indptr, kept.indices, kept.data  # cast block by block


def row_span(rows: Rows, a: int, b: int) -> Rows:
    """Rows ``[a, b)``."""
    ptr, ids, scores = rows
    span = slice(ptr[a], ptr[b])
    return (ptr[a : b + 1] - ptr[a]).astype(np.int64), ids[span].astype(np.int64), scores[span].astype(np.float32)


def join_rows(done: Sequence[Rows]) -> Rows:
    """Rows of all blocks, in order."""
    lengths = np.concatenate([np.zeros(1, np.int64), *(np.diff(ptr) for ptr, _, _ in done)])
    ids = np.concatenate([np.zeros(0, np.int64), *(i for _, i, _ in done)])
    return np.cumsum(lengths), ids, np.concatenate([np.zeros(0, np.float32), *(s for _, _, s in done)])


def to_csr(rows: Rows, columns: int) -> sp.csr_matrix:
    """Rows as a matrix; scores of exactly 0 stay stored."""
    ptr, ids, scores = rows
    shape: Any = (ptr.size - 1, columns)
    out = sp.csr_matrix(shape, dtype=np.float32)  # arrays are set one by one: checking them takes longer than a search
    index = np.int32 if max(columns, ids.size) < 2**31 else np.int64
    out.indptr, out.indices, out.data = ptr.astype(index), ids.astype(index), scores
    return out


def _frozen(a: NDArray[Any]) -> NDArray[Any]:
    """A read-only view: arrays from memory and from files then compile to one kernel."""
    out = np.ascontiguousarray(a).view(np.ndarray)
    out.flags.writeable = False
    return out
