"""Which clusters are active for a document: teacher-forced, matcher-aware, or both.

A level's classifier learns to tell a document's positives from the other children of its
*active parents*.  Teacher-forced negatives (tfn) take the parents of the true labels, so a
positive meets its siblings.  Matcher-aware negatives (man) take the parents that the level
above retrieved, so it meets what it will compete with at prediction.

Source: Zhang et al., Fast Multi-Resolution Transformer Fine-tuning for Extreme Multi-label
Text Classification (NeurIPS 2021); same names as amzn/pecos.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

__all__ = ["SCHEMES", "active_parents", "root_parents"]

SCHEMES = ("tfn", "man", "tfn+man")


def root_parents(num_docs: int) -> sp.csr_matrix:
    """Active parents of level 1: the root, for every document, so that all nodes compete.

    Returns:
        Ones ``[num_docs, 1]`` float32.
    """
    return _pattern(
        sp.csr_matrix((np.ones(num_docs), np.zeros(num_docs), np.arange(num_docs + 1)), shape=(num_docs, 1))
    )


def active_parents(scheme: str, tfn: sp.csr_matrix | None, man: sp.csr_matrix | None = None) -> sp.csr_matrix:
    """M: whose children are active for each document.

    Args:
        scheme: ``tfn``, ``man`` or ``tfn+man``.
        tfn: labels lifted to the parents' level ``[N, K]``; a value that is not zero counts.
        man: predictions of the parents' level ``[N, K]``; every stored entry counts, since
            a retrieved cluster's score may have underflowed to zero.

    Returns:
        ``[N, K]`` float32 CSR of ones, indices ascending.  What the scheme leaves out may be
        None and is not looked at.

    Raises:
        ValueError: an unknown scheme, a matrix that the scheme needs is None, or shapes differ.

    Cost: O(nnz(tfn) + nnz(man)).
    """
    if scheme not in SCHEMES:
        raise ValueError(f"negatives.scheme={scheme!r} is none of {', '.join(SCHEMES)}")
    parts = []
    for name, A in (("tfn", tfn), ("man", man)):
        if name not in scheme.split("+"):
            continue
        if A is None:
            raise ValueError(f"negatives.scheme={scheme} needs the matrix of {name}, and none was given")
        if name == "tfn" and not np.all(A.data):
            A = A.copy()
            A.eliminate_zeros()
        parts.append(_pattern(A))
    if len(parts) == 1:
        return parts[0]
    if parts[0].shape != parts[1].shape:
        raise ValueError(f"tfn is {parts[0].shape} and man is {parts[1].shape}: both must be documents x clusters")
    return _pattern(sp.csr_matrix(parts[0] + parts[1]))


def _pattern(A: sp.csr_matrix) -> sp.csr_matrix:
    """Ones where A stores an entry; A itself is left as it was, its index arrays are shared if sorted."""
    out = sp.csr_matrix((np.ones(A.nnz, dtype=np.float32), A.indices, A.indptr), shape=A.shape)
    if not out.has_sorted_indices:
        out = out.sorted_indices()
    return out
