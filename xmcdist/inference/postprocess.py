"""From a linear ranker's output to a score, and from a node's and its parent's score to one.

====================  ==============================  =================
name                  score of output v               with the parent
====================  ==============================  =================
``noop``              v                               parent is ignored
``sigmoid``           1 / (1 + exp(-v))               multiplied
``log-sigmoid``       log of it                       added
``l{p}-hinge``        exp(-max(0, 1 - v)^p)           multiplied
``log-l{p}-hinge``    -max(0, 1 - v)^p                added
====================  ==============================  =================

p is 1, 2, 3 or 4.  Source: Yu et al., PECOS (arXiv:2010.05878); same names as amzn/pecos.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["NAMES", "PostProcessor"]

NAMES: tuple[str, ...] = (
    "noop",
    "sigmoid",
    "log-sigmoid",
    *(f"l{p}-hinge" for p in range(1, 5)),
    *(f"log-l{p}-hinge" for p in range(1, 5)),
)


@dataclass(frozen=True, slots=True)
class PostProcessor:
    """One row of the table above.

    Attributes:
        kind: noop | sigmoid | hinge.
        power: p of a hinge, else 0.
        log: scores are logarithms and are added.
    """

    kind: str
    power: int = 0
    log: bool = False

    @classmethod
    def named(cls, name: str) -> PostProcessor:
        """The post-processor of that name.

        Raises:
            ValueError: there is none.
        """
        if name not in NAMES:
            raise ValueError(f"post_processor {name!r}: must be one of {', '.join(NAMES)}")
        log = name.startswith("log-")
        hinge = re.fullmatch(r"l(\d)-hinge", name.removeprefix("log-"))
        if hinge:
            return cls("hinge", int(hinge[1]), log)
        return cls(name.removeprefix("log-"), 0, log)

    @property
    def root_score(self) -> float:
        """The score of the root, which changes nothing."""
        return 0.0 if self.log or self.kind == "noop" else 1.0

    def transform(self, v: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores of ranker outputs, any shape."""
        x = np.asarray(v, np.float64)
        if self.kind == "noop":
            out = x
        elif self.kind == "sigmoid":
            out = -np.logaddexp(0.0, -x)
        else:
            out = -(np.maximum(0.0, 1.0 - x) ** self.power)
        return (out if self.log or self.kind == "noop" else np.exp(out)).astype(np.float32)

    def combine(self, score: NDArray[np.float32], parent: NDArray[np.float32]) -> NDArray[np.float32]:
        """Transformed scores with those of the parents; shapes broadcast."""
        if self.kind == "noop":
            return np.broadcast_to(score, np.broadcast_shapes(np.shape(score), np.shape(parent))).astype(np.float32)
        return np.asarray(score + parent if self.log else score * parent, np.float32)
