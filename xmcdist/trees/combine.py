"""Label embeddings from two sources: a label's documents and its own text.

Letters: n labels, D sparse and d dense columns.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.sparse.features import Features
from xmcdist.trees.errors import TreeError

__all__ = ["combine"]

F64 = NDArray[np.float64]

_BLOCK = 1 << 14  # labels at a time: bounds the temporary float64 copies


def combine(documents: Features, texts: Features, weight: F64 | None = None) -> Features:
    """PIFA and the vector of the label's text, as one vector of unit length a label.

    Without ``weight`` the parts stand side by side, ``normalise([p_l, t_l])``; with it they are
    added, ``normalise((1 - w_l) p_l + w_l t_l)``.  A label that has only one of both is that one
    alone, whatever its weight, and a label that has neither gets an empty row: never NaN.

    A row depends on nothing but itself, so any range of labels has the bits it has in the whole.

    Args:
        documents: PIFA of n labels, rows of unit or zero length.
        texts: their texts, rows of unit or zero length.
        weight: share of the text ``[n]`` in [0, 1]; None: side by side.

    Returns:
        Side by side: ``[n, D_p + D_t]`` and ``[n, d_p + d_t]``; added: parts as those given.

    Raises:
        TreeError: another number of rows, or vectors of two spaces are to be added.

    Source: amzn/pecos ``LabelEmbeddingFactory.pifa_lf_concat``, ``pifa_lf_convex_combine``.
    """
    n = documents.num_rows
    if texts.num_rows != n:
        raise TreeError(f"embeddings of {n} labels by documents and of {texts.num_rows} by texts")
    if weight is not None and _widths(documents) != _widths(texts):
        raise TreeError(
            f"tree.label_embedding=convex adds vectors of one space, but PIFA has {_say(documents)} and label texts "
            f"have {_say(texts)}: take tree.label_text=tfidf without tree.document_embeddings, or "
            "tree.label_text=encoder with tree.document_embeddings of that encoder's width, or "
            "tree.label_embedding=concat"
        )
    blocks = []
    for start in range(0, max(n, 1), _BLOCK):
        stop = min(start + _BLOCK, n)
        p, t = documents.rows(start, stop), texts.rows(start, stop)
        blocks.append(_side_by_side(p, t) if weight is None else _added(p, t, weight[start:stop]))
    if len(blocks) == 1:
        return blocks[0]
    sparse = [b.sparse for b in blocks if b.sparse is not None]
    dense = [b.dense for b in blocks if b.dense is not None]
    return Features(
        sp.csr_matrix(sp.vstack(sparse, format="csr")) if sparse else None, np.concatenate(dense) if dense else None
    )


def _side_by_side(p: Features, t: Features) -> Features:
    both = (_present(p), _present(t))
    scale = 1.0 / np.sqrt(np.maximum(both[0].astype(np.float64) + both[1], 1.0))
    sparse = [_scaled(part.sparse, scale) for part in (p, t) if part.sparse is not None]
    dense = [part.dense * scale[:, None] for part in (p, t) if part.dense is not None]
    return Features(
        sp.csr_matrix(sp.hstack(sparse, format="csr"), dtype=np.float32) if sparse else None,
        np.concatenate(dense, axis=1).astype(np.float32) if dense else None,
    )


def _added(p: Features, t: Features, weight: F64) -> Features:
    w = np.where(_present(p), np.where(_present(t), weight, 0.0), 1.0)
    square = np.zeros(len(w))
    sparse = dense = None
    if p.sparse is not None and t.sparse is not None:
        sparse = sp.csr_matrix(_scaled(p.sparse, 1.0 - w) + _scaled(t.sparse, w))
        sparse.eliminate_zeros()
        square += np.asarray(sparse.multiply(sparse).sum(axis=1)).ravel()
    if p.dense is not None and t.dense is not None:
        dense = (1.0 - w)[:, None] * p.dense + w[:, None] * t.dense
        square += np.square(dense).sum(axis=1)
    inverse = np.divide(1.0, np.sqrt(square), out=np.zeros_like(square), where=square > 0)
    return Features(
        None if sparse is None else _scaled(sparse, inverse).astype(np.float32),
        None if dense is None else (dense * inverse[:, None]).astype(np.float32),
    )


def _present(x: Features) -> NDArray[np.bool_]:
    """Which rows are not empty, ``[n]``."""
    found = np.zeros(x.num_rows, dtype=bool)
    if x.sparse is not None:
        found |= np.diff(x.sparse.indptr) > 0
    if x.dense is not None:
        found |= np.any(x.dense != 0, axis=1)
    return found


def _scaled(A: sp.csr_matrix, by: F64) -> sp.csr_matrix:
    """Rows times ``by``, float64; a row times 0 stores zeros."""
    data = A.data * np.repeat(by, np.diff(A.indptr))
    return sp.csr_matrix((data, A.indices, A.indptr), shape=A.shape)


def _widths(x: Features) -> tuple[int, int]:
    return x.num_sparse, x.num_dense


def _say(x: Features) -> str:
    parts = [f"{width} {kind}" for width, kind in zip(_widths(x), ("sparse", "dense"), strict=True) if width]
    return f"{' and '.join(parts) or 'no'} columns"
