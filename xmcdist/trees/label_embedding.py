"""Label embeddings from training documents: what the label tree clusters.

Letters: N documents, D sparse and d dense features, L labels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
from numba import get_num_threads, njit
from numpy.typing import NDArray

from xmcdist.sparse.features import Features
from xmcdist.trees.errors import TreeError
from xmcdist.trees.matrix import U32, Matrix, join_csr

__all__ = ["label_embedding", "pifa"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_WORK = 1 << 22  # values one task may make: bounds its buffer, and evens out threads


def pifa(X: sp.csr_matrix, Y: sp.csr_matrix, labels: range | None = None) -> sp.csr_matrix:
    """Positive instance feature aggregation over sparse features; see `label_embedding`.

    Args:
        X: document features ``[N, D]`` float32.
        Y: document labels ``[N, L]``.
        labels: default all.

    Returns:
        ``[len(labels), D]`` float32 CSR, sorted, rows of unit or zero length.

    Raises:
        TreeError: X and Y hold different numbers of documents, or a range of labels that are not there.
    """
    wanted = range(Y.shape[1]) if labels is None else labels
    sparse = label_embedding(Features(sparse=X), Y, wanted.start, wanted.stop).sparse
    assert sparse is not None
    return sparse


def label_embedding(
    features: Features, Y: sp.csr_matrix, start: int = 0, stop: int | None = None, *, threads: int | None = None
) -> Features:
    """A label as the direction of its documents, for labels ``[start, stop)``.

    The row of label l is the sum of ``Y[i, l] / ||Y[i]|| * x_i`` over documents i, scaled to
    l2 length 1 over its sparse and dense part together.  A document with many labels counts
    less for each of them.  A label without documents gets an empty row, never NaN.

    Sums run in float64 over rising document ids, so a row does not depend on which range it
    was asked for with, nor on the number of threads.

    Args:
        features: of the documents, used as they are: scale parts to unit rows beforehand.
        Y: ``[N, L]``; stored values are weights, 1 for plain labels.
        start: first label.
        stop: default L.
        threads: default numba's.

    Returns:
        Parts as those given, ``[stop - start, D]`` and ``[stop - start, d]``.

    Raises:
        TreeError: another number of documents in Y, or a range of labels that are not there.

    Cost: O(sum over i of nnz(Y[i]) * (nnz(X[i]) + d)); the result may be far denser than X.

    Source: Yu et al., PECOS (arXiv:2010.05878); weighting as in amzn/pecos
    ``LabelEmbeddingFactory.pifa``.
    """
    stop = Y.shape[1] if stop is None else stop
    if features.num_rows != Y.shape[0]:
        raise TreeError(f"features of {features.num_rows} documents for labels of {Y.shape[0]}")
    if not 0 <= start <= stop <= Y.shape[1]:
        raise TreeError(f"labels {start}..{stop} are not among the {Y.shape[1]} labels")
    x, y = Matrix.of(features), Matrix.of(Features(sparse=Y.astype(np.float32, copy=False)))
    ptr, docs, weights = _documents_of(y.indptr, y.indices, y.data, start, stop)
    room = _row_room(x.indptr, ptr, docs, features.num_sparse)
    dense = np.zeros((stop - start, features.num_dense), dtype=np.float32)

    def run(piece: tuple[int, int]) -> tuple[I64, U32, F32]:
        first, last = piece
        return _aggregate(
            x.indptr, x.indices, x.data, x.dense, ptr, docs, weights, first, last, room[last] - room[first],
            x.num_sparse, dense,
        )  # fmt: skip

    with ThreadPoolExecutor(max(1, threads or get_num_threads())) as pool:
        parts = list(pool.map(run, _pieces(room, np.diff(ptr) * features.num_dense)))
    sparse = join_csr(parts, features.num_sparse) if features.sparse is not None else None
    return Features(sparse, dense if features.dense is not None else None)


def _pieces(room: I64, dense_work: I64) -> list[tuple[int, int]]:
    """Label ranges of about `_WORK` values each."""
    work = room + np.concatenate([[0], np.cumsum(dense_work)])
    cuts = np.searchsorted(work, np.arange(_WORK, max(int(work[-1]), _WORK), _WORK))
    edges = np.unique(np.concatenate([[0], cuts, [len(room) - 1]])).tolist()
    return list(pairwise(edges))


@njit(cache=True, nogil=True)
def _documents_of(indptr: I64, indices: U32, data: F32, start: int, stop: int) -> tuple[I64, I64, F64]:
    """Documents of each label of a range, rising, with weights ``y / ||y of the document||``."""
    ptr = np.zeros(stop - start + 1, dtype=np.int64)
    for k in range(indices.shape[0]):
        label = np.int64(indices[k])
        if start <= label < stop:
            ptr[label - start + 1] += 1
    for i in range(stop - start):
        ptr[i + 1] += ptr[i]
    fill = ptr[:-1].copy()
    docs = np.empty(ptr[-1], dtype=np.int64)
    weights = np.empty(ptr[-1], dtype=np.float64)
    for i in range(indptr.shape[0] - 1):
        square = 0.0
        for k in range(indptr[i], indptr[i + 1]):
            square += np.float64(data[k]) * np.float64(data[k])
        for k in range(indptr[i], indptr[i + 1]):
            label = np.int64(indices[k])
            if start <= label < stop:
                docs[fill[label - start]] = i
                weights[fill[label - start]] = data[k] / np.sqrt(square) if square > 0 else 0.0
                fill[label - start] += 1
    return ptr, docs, weights


@njit(cache=True, nogil=True)
def _row_room(indptr: I64, ptr: I64, docs: I64, num_sparse: int) -> I64:
    """Running upper bound of values the label rows need, ``[labels + 1]``."""
    room = np.zeros(ptr.shape[0], dtype=np.int64)
    for label in range(ptr.shape[0] - 1):
        values = np.int64(0)
        for k in range(ptr[label], ptr[label + 1]):
            values += indptr[docs[k] + 1] - indptr[docs[k]]
        room[label + 1] = room[label] + min(values, num_sparse)
    return room


@njit(cache=True, nogil=True)
def _aggregate(
    indptr: I64,
    indices: U32,
    data: F32,
    dense: F32,
    ptr: I64,
    docs: I64,
    weights: F64,
    first: int,
    last: int,
    room: int,
    num_sparse: int,
    out: F32,
) -> tuple[I64, U32, F32]:
    """Rows ``first..last``: their lengths, columns and values; dense parts go into ``out``."""
    lengths = np.zeros(last - first, dtype=np.int64)
    columns, values = np.empty(room, dtype=np.uint32), np.empty(room, dtype=np.float32)
    acc, seen = np.zeros(num_sparse, dtype=np.float64), np.full(num_sparse, -1, dtype=np.int64)
    row = np.zeros(dense.shape[1], dtype=np.float64)
    used = 0
    for label in range(first, last):
        begin = used
        row[:] = 0.0
        for k in range(ptr[label], ptr[label + 1]):
            doc, weight = docs[k], weights[k]
            for e in range(indptr[doc], indptr[doc + 1]):
                column = indices[e]
                if seen[column] != label:
                    seen[column] = label
                    acc[column] = 0.0
                    columns[used] = column
                    used += 1
                acc[column] += weight * data[e]
            for j in range(dense.shape[1]):
                row[j] += weight * dense[doc, j]
        columns[begin:used] = np.sort(columns[begin:used])
        square = 0.0
        for k in range(begin, used):
            square += acc[columns[k]] * acc[columns[k]]
        for j in range(dense.shape[1]):
            square += row[j] * row[j]
        inverse = 1.0 / np.sqrt(square) if square > 0 else 0.0
        for k in range(begin, used):
            values[k] = acc[columns[k]] * inverse
        for j in range(dense.shape[1]):
            out[label, j] = row[j] * inverse
        lengths[label - first] = used - begin
    return lengths, columns[:used].copy(), values[:used].copy()
