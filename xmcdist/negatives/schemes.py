"""Which clusters are active for a document: teacher-forced, matcher-aware, consistent.

A level's classifier learns to tell a document's positives from the other children of its
*active parents*.  Teacher-forced negatives (tfn) take the parents of the true labels, so a
positive meets its siblings.  Matcher-aware negatives (man) take the parents that the level
above retrieved, so it meets what it will compete with at prediction.  Consistent negatives
are matcher-aware by class: the wrong parents that the level above retrieved for many of a
true parent's documents are active for all of them, whether or not their own beam held them.

Source: Zhang et al., Fast Multi-Resolution Transformer Fine-tuning for Extreme Multi-label
Text Classification (NeurIPS 2021); same names as amzn/pecos.  Consistent: Chang et al.,
X-Transformer (KDD 2020), as its authors' articles tell it: hard negatives of a class are the
clusters that the matcher consistently predicts for its positives, weighted by the matcher's
probability; their code has binary negatives by document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.observability.compiling import njit

if TYPE_CHECKING:  # merging teacher-forced and matched parents needs no torch
    from xmcdist.negatives.confusions import Confusions

__all__ = ["MATCHER_SCHEMES", "SCHEMES", "WEIGHTS", "active_parents", "consistent_parents", "root_parents"]

SCHEMES = ("tfn", "man", "tfn+man")
"""What needs a document's own true and retrieved clusters only."""

MATCHER_SCHEMES = (*SCHEMES, "consistent", "tfn+man+consistent")
"""All schemes; ``consistent`` is teacher-forced and consistent negatives together."""

WEIGHTS = ("none", "score")

_PARTS = {name: tuple(name.split("+")) for name in MATCHER_SCHEMES} | {"consistent": ("tfn", "consistent")}
_SHARE_UNIT = 1_000_000

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def root_parents(num_docs: int) -> sp.csr_matrix:
    """Active parents of level 1: the root, for every document, so that all nodes compete.

    Returns:
        Ones ``[num_docs, 1]`` float32.
    """
    ones = np.ones(num_docs, dtype=np.float32)
    return sp.csr_matrix((ones, np.zeros(num_docs, np.int32), np.arange(num_docs + 1)), shape=(num_docs, 1))


def active_parents(
    scheme: str,
    tfn: sp.csr_matrix | None,
    man: sp.csr_matrix | None = None,
    consistent: sp.csr_matrix | None = None,
    *,
    weight: str = "none",
) -> sp.csr_matrix:
    """M: whose children are active for each document.

    Args:
        scheme: one of `MATCHER_SCHEMES`.
        tfn: labels lifted to the parents' level ``[N, K]``; a value that is not zero counts.
        man: predictions of the parents' level ``[N, K]``; every stored entry counts, since
            a retrieved cluster's score may have underflowed to zero.
        consistent: `consistent_parents` ``[N, K]``; every stored entry counts.
        weight: ``none``: values of 1.  ``score``: 1 for a true parent, for another the score
            that is stored for it, the largest if there are several; a score of 0 stays stored.

    Returns:
        ``[N, K]`` float32 CSR, indices ascending.  What the scheme leaves out may be None and
        is not looked at.

    Raises:
        ValueError: an unknown scheme or weight, a matrix that the scheme needs is None, or
            shapes differ.

    Cost: O(nnz(tfn) + nnz(man) + nnz(consistent)).
    """
    if scheme not in MATCHER_SCHEMES:
        raise ValueError(f"negatives.scheme={scheme!r} is none of {', '.join(MATCHER_SCHEMES)}")
    if weight not in WEIGHTS:
        raise ValueError(f"negatives.weight={weight!r} is none of {', '.join(WEIGHTS)}")
    M: sp.csr_matrix | None = None
    for name, A in (("tfn", tfn), ("man", man), ("consistent", consistent)):
        if name not in _PARTS[scheme]:
            continue
        if A is None:
            raise ValueError(f"negatives.scheme={scheme} needs the matrix of {name}, and none was given")
        if name == "tfn":
            A = _without_zeros(A)
        part = _valued(A, ones=name == "tfn" or weight == "none")
        M = part if M is None else _union(M, part, name)
    if M is None:
        raise AssertionError("a scheme has at least one part")
    return M


def consistent_parents(
    true_parents: sp.csr_matrix, confusions: Confusions, positives: I64, share: float
) -> sp.csr_matrix:
    """Clusters that the matcher consistently confuses with each document's true ones.

    A wrong cluster w is consistent for true cluster c when it was retrieved for at least
    ``share`` of c's documents; those of all true clusters of a document come together.

    Args:
        true_parents: true clusters of documents ``[n, K]``; a value that is not zero counts.
        confusions: of all K clusters, over all training documents.
        positives: int64 ``[K]``, documents of each cluster, over all training documents.
        share: in (0, 1], to the millionth; compared in integers.

    Returns:
        ``[n, K]`` float32 CSR, indices ascending: mean score of w over the documents of c that
        it was retrieved for, the largest when several c lead to it.  A document's own true
        clusters may be among them, where they confuse each other.

    Raises:
        ValueError: the shapes do not fit together, or ``share`` is not in (0, 1].

    Cost: O(nnz(true_parents) times confusions a cluster, log of that to sort; K).
    """
    num_clusters = true_parents.shape[1]
    if confusions.start != 0 or not confusions.num_clusters == len(positives) == num_clusters:
        raise ValueError(
            f"true clusters {true_parents.shape}, confusions of clusters from {confusions.start} on, "
            f"{confusions.num_clusters} of them, and {len(positives)} counts do not fit together"
        )
    if not 0 < share <= 1:
        raise ValueError(f"negatives.consistent_share={share} must be in (0, 1]")
    least = round(share * _SHARE_UNIT) * np.asarray(positives)[confusions.true()]
    keep = np.asarray(confusions.count) * _SHARE_UNIT >= least
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep, dtype=np.int64)])
    ptr, wrong = before[confusions.ptr], np.asarray(confusions.wrong)[keep]
    score = confusions.mean_score()[keep].astype(np.float32)
    true = _without_zeros(true_parents)
    args = (true.indptr, np.asarray(true.indices), ptr, wrong, score, num_clusters)
    lengths = _gather(*args, np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    out_ptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    node, value = np.empty(out_ptr[-1], np.int32), np.empty(out_ptr[-1], np.float32)
    _gather(*args, out_ptr, node, value)
    return sp.csr_matrix((value, node, out_ptr), shape=true_parents.shape)


def _without_zeros(A: sp.csr_matrix) -> sp.csr_matrix:
    """A without stored zeros; itself when there are none."""
    if np.all(A.data):
        return A
    A = A.copy()
    A.eliminate_zeros()
    return A


def _valued(A: sp.csr_matrix, *, ones: bool) -> sp.csr_matrix:
    """A in float32, or ones where it stores an entry; its index arrays are shared if sorted."""
    data = np.ones(A.nnz, dtype=np.float32) if ones else A.data.astype(np.float32, copy=False)
    out = sp.csr_matrix((data, A.indices, A.indptr), shape=A.shape)
    return out if out.has_sorted_indices else out.sorted_indices()


def _union(A: sp.csr_matrix, B: sp.csr_matrix, name: str) -> sp.csr_matrix:
    """Entries that A or B stores, with the larger value; unlike scipy's maximum, zeros stay."""
    if A.shape != B.shape:
        raise ValueError(f"{name} is {B.shape} where {A.shape} belongs: all must be documents x clusters")
    room = A.nnz + B.nnz
    ptr, node, value = _merge(
        (A.indptr, np.asarray(A.indices), np.asarray(A.data)),
        (B.indptr, np.asarray(B.indices), np.asarray(B.data)),
        np.empty(room, np.int32),
        np.empty(room, np.float32),
    )
    return sp.csr_matrix((value, node, ptr), shape=A.shape)


@njit(cache=True)
def _merge(
    A: tuple[NDArray[Any], NDArray[Any], F32],
    B: tuple[NDArray[Any], NDArray[Any], F32],
    node: NDArray[np.int32],
    value: F32,
) -> tuple[I64, NDArray[np.int32], F32]:
    """Row by row, two ascending lists become one."""
    ptr = np.zeros(A[0].size, np.int64)
    end = 0
    for i in range(ptr.size - 1):
        a, last_a = A[0][i], A[0][i + 1]
        b, last_b = B[0][i], B[0][i + 1]
        while a < last_a or b < last_b:
            from_a = a < last_a and (b >= last_b or A[1][a] <= B[1][b])
            from_b = b < last_b and (a >= last_a or B[1][b] <= A[1][a])
            if from_a:
                node[end], value[end] = A[1][a], A[2][a]
                a += 1
            if from_b:
                if not from_a or B[2][b] > value[end]:
                    node[end], value[end] = B[1][b], B[2][b]
                b += 1
            end += 1
        ptr[i + 1] = end
    return ptr, node[:end].copy(), value[:end].copy()


@njit(cache=True)
def _gather(
    doc_ptr: NDArray[Any],
    true: NDArray[Any],
    ptr: I64,
    wrong: I64,
    score: F32,
    num_clusters: int,
    out_ptr: I64,
    node: NDArray[np.int32],
    value: F32,
) -> I64:
    """Wrong clusters of every document's true ones, each once, with its largest score.

    Returns how many a document has; fills ``node`` and ``value`` if ``out_ptr`` is not empty.
    """
    lengths = np.zeros(doc_ptr.size - 1, np.int64)
    seen = np.full(num_clusters, -1, np.int64)
    best = np.zeros(num_clusters, np.float32)
    for i in range(lengths.size):
        for a in range(doc_ptr[i], doc_ptr[i + 1]):
            for k in range(ptr[true[a]], ptr[true[a] + 1]):
                w = wrong[k]
                if seen[w] != i:
                    seen[w] = i
                    best[w] = score[k]
                    if out_ptr.size:
                        node[out_ptr[i] + lengths[i]] = w
                    lengths[i] += 1
                elif score[k] > best[w]:
                    best[w] = score[k]
        if out_ptr.size:
            node[out_ptr[i] : out_ptr[i + 1]].sort()
            for at in range(out_ptr[i], out_ptr[i + 1]):
                value[at] = best[node[at]]
    return lengths
