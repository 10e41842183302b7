"""Which parents' children compete with a document's positives.

M ``[N, K]`` has an entry where the children of that node are candidates for the document:
teacher-forced (``tfn``: the true nodes of the level above), matcher-aware (``man``: what the
model so far retrieved there), or both together.  Source: Yu et al., PECOS
(arXiv:2010.05878), section 4; Zhang et al., XR-Transformer (arXiv:2110.00685), section 3.
"""

from __future__ import annotations

import scipy.sparse as sp

from xmcdist.sparse.csr import binarize

__all__ = ["active_parents"]


def active_parents(scheme: str, true: sp.csr_matrix, found: sp.csr_matrix | None) -> sp.csr_matrix:
    """M of some documents.

    Args:
        scheme: ``tfn``, ``man`` or ``tfn+man``.
        true: true nodes of the level above ``[n, K]``, any positive counts.
        found: retrieved nodes of the level above ``[n, K]``, any scores, zeros included;
            needed where the scheme says ``man``.

    Returns:
        ``[n, K]`` of ones.

    Raises:
        ValueError: unknown scheme, or ``man`` without ``found``.
    """
    if scheme not in ("tfn", "man", "tfn+man"):
        raise ValueError(f"negatives scheme {scheme!r} is none of tfn, man, tfn+man")
    if scheme == "tfn":
        return binarize(true)
    if found is None:
        raise ValueError(f"negatives scheme {scheme!r} needs what the model retrieved on the level above")
    stored = sp.csr_matrix(found, copy=True)
    stored.data[:] = 1.0  # a score of exactly 0 was retrieved too
    return stored if scheme == "man" else binarize(binarize(true) + stored)
