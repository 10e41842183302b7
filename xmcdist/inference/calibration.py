"""From a label's score to the probability that the label is right.

A ranker's score orders labels; it is no probability, even where it lies between 0 and 1.
On documents that the model was not trained on, each of a document's best k labels is
either right or not, and a rising function of the score is fitted to that:

* ``isotonic``: the best one of all, piecewise linear between the steps of pool-adjacent-
  violators (Zadrozny and Elkan, KDD 2002).  Wants a few thousand pairs.
* ``platt``: ``1 / (1 + exp(-(a * score + b)))`` with Platt's smoothed targets (Platt,
  Advances in Large Margin Classifiers, 1999).  Two numbers, so few pairs will do.

The probability is an addition: labels stay ordered by score.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.checkpoint.atomic import read_json, write_json
from xmcdist.config.errors import UserError

__all__ = ["FILE", "METHODS", "Calibration", "expected_calibration_error", "fit_calibration"]

METHODS = ("isotonic", "platt")
FILE = "calibration.json"
_FORMAT = 1
_BINS = 15

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fitted function from scores to probabilities.

    Attributes:
        method: one of `METHODS`.
        x: isotonic: scores, rising ``[m]``; platt: ``[a, b]``.
        y: isotonic: probabilities there ``[m]``; platt: empty.
        about: how it was fitted, for people: documents, pairs, errors before and after.
    """

    method: str
    x: F64
    y: F64
    about: dict[str, Any]

    def __post_init__(self) -> None:
        finite = np.isfinite(self.x).all() and np.isfinite(self.y).all()
        if self.method == "isotonic":
            rising = all(np.all(np.diff(a) >= 0) for a in (self.x, self.y))
            fits = self.x.size == self.y.size > 0 and rising
        else:
            fits = self.method == "platt" and self.x.size == 2 and not self.y.size
        if not fits or not finite:
            raise ValueError(f"{self.method}: {self.x.size} and {self.y.size} numbers make no rising function")

    def apply(self, scores: NDArray[Any]) -> F64:
        """Probabilities of scores of any shape; outside the range fitted, those of its ends (isotonic)."""
        s = np.asarray(scores, np.float64)
        if self.method == "isotonic":
            return np.asarray(np.interp(s, self.x, self.y), np.float64)
        return np.asarray(np.exp(-np.logaddexp(0.0, -(self.x[0] * s + self.x[1]))), np.float64)

    def save(self, folder: Path | str) -> None:
        """Write ``calibration.json``, whole or not at all."""
        value = {"format": _FORMAT, "method": self.method, "x": self.x.tolist(), "y": self.y.tolist()}
        write_json(Path(folder) / FILE, {**value, "about": self.about})

    @classmethod
    def load(cls, folder: Path | str) -> Calibration | None:
        """What `save` wrote; None where there is none.

        Raises:
            UserError: the file is damaged, or of a newer format.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        value = read_json(path)
        try:
            if value["format"] != _FORMAT:
                raise ValueError(f"format {value['format']}, this version reads {_FORMAT}")
            x, y = (np.asarray(value[name], np.float64) for name in "xy")
            return cls(str(value["method"]), x, y, dict(value["about"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): delete it, and calibrate again if you want to") from error


def fit_calibration(
    scores: NDArray[Any], hits: NDArray[Any], method: str, about: dict[str, Any] | None = None
) -> Calibration:
    """Fit the function of the score that best tells hits.

    Args:
        scores: ``[n]`` scores of predicted labels.
        hits: ``[n]`` whether the label was right.
        method: one of `METHODS`.
        about: kept with it.

    Raises:
        ValueError: no pair, lengths that differ, or an unknown method.

    Cost: a sort of the scores.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(hits, np.float64)
    if s.shape != y.shape or s.ndim != 1 or not s.size:
        raise ValueError(f"{s.shape} scores and {y.shape} hits: need as many of both, and at least one")
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fit = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(s, y)
        return Calibration(method, np.asarray(fit.X_thresholds_), np.asarray(fit.y_thresholds_), about or {})
    if method == "platt":
        return Calibration(method, _platt(s, y), np.zeros(0), about or {})
    raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")


def _platt(s: F64, y: F64) -> F64:
    """Slope and intercept of the logistic regression on smoothed targets, the slope never negative."""
    from sklearn.linear_model import LogisticRegression

    positive = float(y.sum())
    high, low = (positive + 1) / (positive + 2), 1 / (y.size - positive + 2)
    target = np.where(y > 0, high, low)
    mean, spread = float(s.mean()), float(s.std()) or 1.0
    z = ((s - mean) / spread)[:, None]
    # A pair with target t counts as t of a hit and 1 - t of a miss.
    fit = LogisticRegression(C=np.inf, tol=1e-9, max_iter=1000).fit(
        np.concatenate([z, z]), np.repeat([1, 0], y.size), sample_weight=np.concatenate([target, 1 - target])
    )
    slope, intercept = float(fit.coef_[0, 0]), float(fit.intercept_[0])
    if slope < 0:  # a worse score is not to be more probable: the best rising function is then constant
        slope, intercept = 0.0, float(np.log(target.mean() / (1 - target.mean())))
    return np.array([slope / spread, intercept - slope * mean / spread])


def expected_calibration_error(probabilities: NDArray[Any], hits: NDArray[Any], bins: int = _BINS) -> float:
    """Mean distance between what is said and what comes true, over bins of equal width, 0 to 1.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(hits, np.float64)
    at = np.minimum((p * bins).astype(np.int64), bins - 1)
    said, came = (np.bincount(at, values, minlength=bins) for values in (p, y))
    return float(np.abs(said - came).sum() / max(p.size, 1))
