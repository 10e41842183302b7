"""Labels by how often they were seen in training: head, torso, tail."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["BANDS", "label_bands"]

BANDS = ("head", "torso", "tail")


def label_bands(frequency: npt.NDArray[np.int64], head_share: float, tail_below: int) -> npt.NDArray[np.int8]:
    """Band of every label as its index in `BANDS`, ``[L]``.

    * head: the ``round(head_share * L)`` labels with the most training documents, ties to
      the smaller label id.
    * tail: labels outside the head with fewer than ``tail_below`` training documents.
    * torso: the others.

    Args:
        frequency: training documents of each label ``[L]``.
        head_share: share of the number of labels, not of their documents.
        tail_below: training documents; 0 makes no label tail.
    """
    band = np.where(frequency < tail_below, BANDS.index("tail"), BANDS.index("torso")).astype(np.int8)
    most_frequent = np.argsort(-frequency, kind="stable")
    band[most_frequent[: round(head_share * frequency.size)]] = BANDS.index("head")
    return band
