"""Small things that matcher and ranker pipelines do alike at each level of a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import scipy.sparse as sp

__all__ = ["per_level", "root_rows"]

V = TypeVar("V")


def per_level(values: Sequence[V], t: int) -> V:
    """The setting of level ``t`` (from 1): a list shorter than the tree repeats its last value."""
    return values[min(t, len(values)) - 1]


def root_rows(rows: int) -> sp.csr_matrix:
    """Every document belongs to the root: ones ``[rows, 1]``."""
    return sp.csr_matrix(np.ones((rows, 1), dtype=np.float32))
