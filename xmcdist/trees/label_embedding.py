"""Label embeddings from training documents: what the label tree clusters.

Letters: N documents, D sparse and d dense features, L labels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from numba import get_num_threads
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit
from xmcdist.sparse.features import Features
from xmcdist.trees.errors import TreeError
from xmcdist.trees.matrix import Matrix

__all__ = ["label_embedding", "pifa"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

_WORK = 1 << 20  # values one task may read: evens out threads

_U1, _SIX, _LOW = np.uint64(1), np.uint32(6), np.uint32(63)
# The lowest bit of a word, times this number, has the bit's position in its top six bits (Leiserson et al., 1998).
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_POSITION = np.zeros(64, dtype=np.uint64)
_POSITION[[((int(_DE_BRUIJN) << i) % 2**64) >> 58 for i in range(64)]] = np.arange(64)


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
    indptr = x.indptr.view(np.uint64)
    ptr, docs, weights = _documents_of(y.indptr, y.indices, y.data, start, stop)
    work = _work(indptr, ptr, docs, x.num_sparse) + ptr * features.num_dense
    pieces = list(pairwise(_edges(work)))
    lengths = np.zeros(stop - start + 1, dtype=np.int64)
    dense = np.zeros((stop - start, features.num_dense), dtype=np.float32)

    def count(piece: tuple[int, int]) -> None:
        _count_columns(indptr, x.indices, ptr, docs, *piece, x.num_sparse, lengths)

    def fill(piece: tuple[int, int]) -> None:
        _aggregate(
            indptr, x.indices, x.data, x.dense, ptr, docs, weights, *piece, x.num_sparse, row_ptr, columns, values,
            dense,
        )  # fmt: skip

    with ThreadPoolExecutor(max(1, threads or get_num_threads())) as pool:
        list(pool.map(count, pieces))
        row_ptr = np.cumsum(lengths)
        columns, values = np.empty(row_ptr[-1], dtype=np.int32), np.empty(row_ptr[-1], dtype=np.float32)
        list(pool.map(fill, pieces))
    if features.sparse is None:
        return Features(None, dense)
    sparse = sp.csr_matrix((values, columns, row_ptr), shape=(stop - start, x.num_sparse), copy=False)
    sparse.has_canonical_format = True
    return Features(sparse, dense if features.dense is not None else None)


def _edges(work: I64) -> list[int]:
    """Where to cut labels, so that a piece is about `_WORK` values; ``work`` runs up, ``[labels + 1]``."""
    cuts = np.searchsorted(work, np.arange(_WORK, max(int(work[-1]), _WORK), _WORK))
    edges: list[int] = np.unique(np.concatenate([[0], cuts, [len(work) - 1]])).tolist()
    return edges


@njit(nogil=True)
def _documents_of(indptr: I64, indices: U32, data: F32, start: int, stop: int) -> tuple[I64, U32, F64]:
    """Documents of each label of a range, rising, with weights ``y / ||y of the document||``."""
    ptr = np.zeros(stop - start + 1, dtype=np.int64)
    for k in range(indices.shape[0]):
        label = np.int64(indices[k])
        if start <= label < stop:
            ptr[label - start + 1] += 1
    for i in range(stop - start):
        ptr[i + 1] += ptr[i]
    fill = ptr[:-1].copy()
    docs = np.empty(ptr[-1], dtype=np.uint32)
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


@njit(nogil=True)
def _work(indptr: U64, ptr: I64, docs: U32, num_sparse: int) -> I64:
    """Running number of values that are read for the label rows, ``[labels + 1]``."""
    work = np.zeros(ptr.shape[0], dtype=np.int64)
    for label in range(ptr.shape[0] - 1):
        work[label + 1] = work[label]
        for k in range(ptr[label], ptr[label + 1]):
            doc = np.uint64(docs[k])
            work[label + 1] += np.int64(indptr[doc + _U1] - indptr[doc])
    return work


@njit(nogil=True)
def _count_columns(
    indptr: U64, indices: U32, ptr: I64, docs: U32, first: int, last: int, num_sparse: int, lengths: I64
) -> None:
    """``lengths[label + 1]`` becomes the number of columns of each label row ``first..last``."""
    bits = np.zeros(num_sparse // 64 + 1, dtype=np.uint64)
    for label in range(first, last):
        found = np.uint64(0)
        for k in range(ptr[label], ptr[label + 1]):
            doc = np.uint64(docs[k])
            for e in range(indptr[doc], indptr[doc + _U1]):
                word, bit = indices[e] >> _SIX, np.uint64(indices[e] & _LOW)
                found += (~bits[word] >> bit) & _U1
                bits[word] |= _U1 << bit
        for k in range(ptr[label], ptr[label + 1]):
            doc = np.uint64(docs[k])
            for e in range(indptr[doc], indptr[doc + _U1]):
                bits[indices[e] >> _SIX] = 0
        lengths[label + 1] = found


@njit(nogil=True)
def _lowest(bits: np.uint64) -> Any:
    """Position of the lowest bit that is set; one must be."""
    return _POSITION[((bits & (~bits + _U1)) * _DE_BRUIJN) >> np.uint64(58)]


@njit(nogil=True)
def _sorted_columns(bits: U64, words: U64, columns: I32) -> None:
    """Columns whose bits are set, rising, and clear the bits; ``words`` has a bit for each word that has any."""
    at = np.uint64(0)
    for block in range(np.uint64(words.shape[0])):
        left = words[block]
        words[block] = 0
        while left:
            word = (block << np.uint64(6)) + _lowest(left)
            left &= left - _U1
            rest = bits[word]
            bits[word] = 0
            while rest:
                columns[at] = (word << np.uint64(6)) + _lowest(rest)
                rest &= rest - _U1
                at += _U1


@njit(nogil=True)
def _aggregate(
    indptr: U64,
    indices: U32,
    data: F32,
    dense: F32,
    ptr: I64,
    docs: U32,
    weights: F64,
    first: int,
    last: int,
    num_sparse: int,
    row_ptr: I64,
    columns: I32,
    values: F32,
    out: F32,
) -> None:
    """Label rows ``first..last`` into their places in ``columns`` and ``values``, their dense parts into ``out``."""
    acc, row = np.empty(num_sparse, dtype=np.float64), np.empty(dense.shape[1], dtype=np.float64)
    bits = np.zeros(num_sparse // 64 + 1, dtype=np.uint64)
    words = np.zeros(bits.shape[0] // 64 + 1, dtype=np.uint64)
    for label in range(first, last):
        row[:] = 0.0
        for k in range(ptr[label], ptr[label + 1]):
            doc, weight = np.uint64(docs[k]), weights[k]
            for e in range(indptr[doc], indptr[doc + _U1]):
                column = indices[e]
                word, bit = column >> _SIX, np.uint64(column & _LOW)
                if (bits[word] >> bit) & _U1:
                    acc[column] += weight * data[e]
                else:
                    acc[column] = weight * data[e]
                    bits[word] |= _U1 << bit
                    words[word >> _SIX] |= _U1 << np.uint64(word & _LOW)
            for j in range(dense.shape[1]):
                row[j] += weight * dense[doc, j]
        mine, found = columns[row_ptr[label] : row_ptr[label + 1]], values[row_ptr[label] : row_ptr[label + 1]]
        _sorted_columns(bits, words, mine)
        square = 0.0
        for k in range(mine.shape[0]):
            square += acc[np.uint32(mine[k])] * acc[np.uint32(mine[k])]
        for j in range(dense.shape[1]):
            square += row[j] * row[j]
        inverse = 1.0 / np.sqrt(square) if square > 0 else 0.0
        for k in range(mine.shape[0]):
            found[k] = acc[np.uint32(mine[k])] * inverse
        for j in range(dense.shape[1]):
            out[label, j] = row[j] * inverse
