"""Features as compiled loops take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.sparse.features import Features

__all__ = ["Matrix", "frozen"]

I64 = NDArray[np.int64]
U32 = NDArray[np.uint32]
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """The arrays of `Features`, one type and one writability for all, so a loop is compiled once.

    Columns are unsigned, which spares the loops a branch for negative indices; a part that
    is missing is empty.
    """

    indptr: I64
    indices: U32
    data: F32
    dense: F32
    num_sparse: int

    @classmethod
    def of(cls, features: Features) -> Matrix:
        """Views of the arrays where they are of the right type already."""
        n = features.num_rows
        A = features.sparse if features.sparse is not None else sp.csr_matrix(np.zeros((n, 0), dtype=np.float32))
        dense = features.dense if features.dense is not None else np.zeros((n, 0), dtype=np.float32)
        columns = A.indices.view(np.uint32) if A.indices.dtype == np.int32 else A.indices.astype(np.uint32)
        return cls(frozen(A.indptr.astype(np.int64)), frozen(columns), frozen(A.data), frozen(dense), int(A.shape[1]))


def frozen(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written through."""
    view = np.ascontiguousarray(array).view(np.ndarray)
    view = view[...]
    view.flags.writeable = False
    return view
