"""Features of documents or labels: a sparse part, a dense part, or both side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from xmcdist.sparse.csr import row_slice

__all__ = ["Features", "unit_vectors"]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The matrix ``[sparse | dense]`` without its parts being copied together.

    Attributes:
        sparse: ``[N, D]`` float32 canonical CSR, or None.
        dense: ``[N, d]`` float32, or None.  Both may be memory-mapped.

    Raises:
        ValueError: no part, or parts of different length or of another type.
    """

    sparse: sp.csr_matrix | None = None
    dense: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.sparse is None and self.dense is None:
            raise ValueError("features need a sparse or a dense part")
        if self.dense is not None and (self.dense.ndim != 2 or self.dense.dtype != np.float32):
            raise ValueError(f"dense features are {self.dense.ndim}-D {self.dense.dtype}; give 2-D float32")
        if self.sparse is not None and self.sparse.dtype != np.float32:
            raise ValueError(f"sparse features are {self.sparse.dtype}; give float32 (xmcdist.sparse.csr.as_csr)")
        if self.sparse is not None and self.dense is not None and self.sparse.shape[0] != self.dense.shape[0]:
            raise ValueError(f"{self.sparse.shape[0]} rows of sparse and {self.dense.shape[0]} of dense features")

    @property
    def num_rows(self) -> int:
        """N."""
        part = self.sparse if self.sparse is not None else self.dense
        assert part is not None
        return int(part.shape[0])

    @property
    def num_sparse(self) -> int:
        """D, 0 without a sparse part."""
        return 0 if self.sparse is None else int(self.sparse.shape[1])

    @property
    def num_dense(self) -> int:
        """d, 0 without a dense part."""
        return 0 if self.dense is None else int(self.dense.shape[1])

    def rows(self, start: int, stop: int) -> Features:
        """Rows ``[start, stop)`` as views."""
        return Features(
            None if self.sparse is None else row_slice(self.sparse, start, stop),
            None if self.dense is None else self.dense[start:stop],
        )

    def take(self, ids: np.ndarray) -> Features:
        """Rows ``ids`` in that order, copied."""
        return Features(
            None if self.sparse is None else self.sparse[ids],
            None if self.dense is None else np.asarray(self.dense[ids]),
        )


def unit_vectors(x: np.ndarray) -> np.ndarray:
    """Dense rows scaled to l2 length 1 in float32 ``[n, d]``; a zero row stays zero."""
    norm = np.sqrt(np.square(x, dtype=np.float64).sum(axis=1, keepdims=True))
    scaled: np.ndarray = np.divide(x, norm, out=np.zeros(x.shape, dtype=np.float64), where=norm > 0)
    return scaled.astype(np.float32)
