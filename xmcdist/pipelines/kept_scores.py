"""What a member of an ensemble answered to the test documents, kept so that nobody has to ask again.

``RUN/test_scores/``: ``scores.npy`` float32 and ``labels.npy`` int32, both ``[N, k]``, best
first; label -1 and score -inf where there are no more.  80 bytes a document for k=10.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.checkpoint.atomic import no_space_is_clear
from xmcdist.checkpoint.parts import write_rows
from xmcdist.parallel.errors import errors_together
from xmcdist.parallel.launch import World
from xmcdist.parallel.visible import wait_for
from xmcdist.sparse.store import open_array

__all__ = ["KeptScores", "open_scores", "scores_of"]

_FOLDER = "test_scores"


class KeptScores:
    """Collects the blocks of one rank, in the order of its documents."""

    def __init__(self) -> None:
        self._scores: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.int32]] = []

    def add(self, scores: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        """Add a block ``[n, k]``."""
        self._scores.append(scores)
        self._labels.append(labels.astype(np.int32))

    def write(self, run_dir: Path, k: int, world: World) -> None:
        """Write all ranks' rows; collective.  The labels come last: without them nothing is there."""
        folder = run_dir / _FOLDER
        with errors_together(), no_space_is_clear(folder):
            if world.is_main:
                folder.mkdir(exist_ok=True)
                (folder / "labels.npy").unlink(missing_ok=True)
        with errors_together():
            wait_for(folder)
        write_rows(folder / "scores.npy", np.concatenate([np.zeros((0, k), np.float32), *self._scores]), world)
        write_rows(folder / "labels.npy", np.concatenate([np.zeros((0, k), np.int32), *self._labels]), world)


def open_scores(run_dir: Path) -> tuple[NDArray[np.float32], NDArray[np.int32]] | None:
    """Scores and labels ``[N, k]``, memory-mapped; None where there are none, or not whole.

    Raises:
        StoreError: a damaged file.
    """
    folder = run_dir / _FOLDER
    if not (folder / "labels.npy").is_file() or not (folder / "scores.npy").is_file():
        return None
    scores, labels = open_array(folder / "scores.npy", "float32", 2), open_array(folder / "labels.npy", "int32", 2)
    return (scores, labels) if scores.shape == labels.shape else None


def scores_of(
    kept: tuple[NDArray[np.float32], NDArray[np.int32]], start: int, stop: int, num_labels: int
) -> sp.csr_matrix:
    """Rows ``start`` to ``stop`` as CSR ``[stop - start, L]`` float32, ids ascending in a row."""
    scores, labels = np.asarray(kept[0][start:stop]), np.asarray(kept[1][start:stop])
    row, place = np.nonzero(labels >= 0)
    ids = labels[row, place]
    order = np.lexsort((ids, row))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=stop - start))])
    return sp.csr_matrix((scores[row, place][order], ids[order], indptr), shape=(stop - start, num_labels))
