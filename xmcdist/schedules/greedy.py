"""GreedyLR: a rate that rises while a metric falls, and is cut when it does not.

The rate is told as a factor of the configured one, so one instance serves encoder and head.
What it is fed must be the same number on every rank; then so is the rate.

Sources: Subramanian & Ganapathiraman, GreedyLR (arXiv:2512.14527), algorithms 1 to 3;
``transformers.GreedyLR``.  Where the two differ there is a setting.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from xmcdist.config.schema import ScheduleConfig

__all__ = ["Greedy"]

_COMPARES = ("window_before", "previous", "best")
_MODES = ("noise", "rel", "abs")


class Greedy:
    """A factor in ``[min_factor, max_factor]``, 1 at first, that follows a metric; smaller is better.

    A value fed is averaged with those before it, ``window`` at most, into x.  x is *better* when
    x < ref - t, else it is not.  ref is, by ``compare``: the least x that was better (``best``);
    the x of the value before (``previous``); the average of the ``window`` values before those of
    x (``window_before``), and as long as there are not so many, nothing is compared.  t is
    ``threshold`` (``abs``), times abs(ref) (``rel``), or times the standard error of what is compared
    (``noise``): a window's is its standard deviation / sqrt(its length), that of a difference of
    two windows the root of the sum of their squares.

    More than ``patience`` better ones in a row: the factor is divided by ``factor``, as far as
    ``max_factor``, and ``wait_after_raise`` values are waited for.  More than ``patience`` of the
    others in a row: it is multiplied by ``factor``, down to ``min_factor``, and ``wait_after_cut``
    values are waited for.  Cuts that leave it at ``min_factor`` are counted from the last raise;
    the ``reset_after``-th starts all anew.

    ``waiting=all``: while it waits nothing is compared, and both counts stay at 0 (transformers).
    ``waiting=own``: comparing goes on; after a cut only further cuts wait, after a raise only
    further raises (the paper).

    With ``compare=best`` and ``waiting=all`` it is ``transformers.GreedyLR`` with an initial rate
    of 1, but that changes of the rate by less than 1e-8 are made too.

    Raises:
        ValueError: a setting of ``cfg`` that `xmcdist.config.checks` would have refused.

    Cost: O(window) a value.
    """

    def __init__(self, cfg: ScheduleConfig) -> None:
        if not 0 < cfg.factor < 1 or not 0 < cfg.min_factor <= 1 <= cfg.max_factor or cfg.window < 1:
            raise ValueError(
                f"factor={cfg.factor} must be in (0, 1), min_factor={cfg.min_factor} in (0, 1], "
                f"max_factor={cfg.max_factor} at least 1, window={cfg.window} at least 1"
            )
        if cfg.compare not in _COMPARES or cfg.threshold_mode not in _MODES:
            raise ValueError(
                f"compare={cfg.compare} must be one of {', '.join(_COMPARES)}, "
                f"threshold_mode={cfg.threshold_mode} one of {', '.join(_MODES)}"
            )
        self.cfg = cfg
        self.resets_in = cfg.reset_after
        self._start()

    def _start(self) -> None:
        self.factor, self.best = 1.0, math.inf
        self.previous: float | None = None
        self.good = self.bad = self.raises_wait = self.cuts_wait = 0
        two = self.cfg.compare == "window_before"
        self.window: deque[float] = deque(maxlen=(2 if two else 1) * self.cfg.window)

    def feed(self, metric: float) -> float:
        """Take a value of the metric, finite and the same on every rank; gives the factor from here on."""
        self.window.append(float(metric))
        cfg, values = self.cfg, list(self.window)
        now, before = values[-cfg.window :], values[: -cfg.window]
        x = _mean(now)
        ref = self.best if cfg.compare == "best" or self.previous is None else self.previous
        if cfg.compare == "window_before":
            if len(values) < 2 * cfg.window:
                return self.factor
            ref = _mean(before)
        self.previous = x
        if cfg.waiting == "all" and self._wait():
            self.good = self.bad = 0
            return self.factor
        if x < ref - self._margin(ref, now, before):
            self.best, self.good, self.bad = x, self.good + 1, 0
        else:
            self.good, self.bad = 0, self.bad + 1
        if cfg.waiting == "own":
            self._wait_for_own()
        if self.good > cfg.patience:
            self._raise()
        elif self.bad > cfg.patience:
            self._cut()
        return self.factor

    def _margin(self, ref: float, now: list[float], before: list[float]) -> float:
        """By how much a value must be below ``ref``."""
        cfg = self.cfg
        if math.isinf(ref):  # nothing to compare with yet
            return 0.0
        if cfg.threshold_mode == "rel":
            return cfg.threshold * abs(ref)  # a score fed with its sign turned is negative
        if cfg.threshold_mode == "noise":
            return cfg.threshold * math.sqrt(_error_squared(now) + _error_squared(before))
        return cfg.threshold

    def _wait(self) -> bool:
        """One value of a pause goes by, if there is one; the one after a cut first."""
        if self.cuts_wait:
            self.cuts_wait -= 1
        elif self.raises_wait:
            self.raises_wait -= 1
        else:
            return False
        return True

    def _wait_for_own(self) -> None:
        if self.cuts_wait:
            self.cuts_wait, self.bad = self.cuts_wait - 1, 0
        if self.raises_wait:
            self.raises_wait, self.good = self.raises_wait - 1, 0

    def _raise(self) -> None:
        self.factor = min(self.factor / self.cfg.factor, self.cfg.max_factor)
        self.resets_in = self.cfg.reset_after
        self.raises_wait, self.good = self.cfg.wait_after_raise, 0

    def _cut(self) -> None:
        self.factor = max(self.factor * self.cfg.factor, self.cfg.min_factor)
        if self.factor == self.cfg.min_factor:
            self.resets_in -= 1
            if self.resets_in <= 0:
                self.resets_in = self.cfg.reset_after
                self._start()
        self.cuts_wait, self.bad = self.cfg.wait_after_cut, 0

    def state(self) -> dict[str, Any]:
        """All that changes, as values for JSON, which keeps every bit of a float."""
        return {
            "factor": self.factor,
            "best": self.best if math.isfinite(self.best) else None,
            "previous": self.previous,
            "window": list(self.window),
            "counts": [self.good, self.bad, self.raises_wait, self.cuts_wait, self.resets_in],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.factor, self.previous = float(state["factor"]), state["previous"]
        self.best = math.inf if state["best"] is None else float(state["best"])
        self.window = deque(state["window"], maxlen=self.window.maxlen)
        self.good, self.bad, self.raises_wait, self.cuts_wait, self.resets_in = state["counts"]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _error_squared(values: list[float]) -> float:
    """Squared standard error of the mean of some values, as if they were independent; 0 of fewer than two."""
    n = len(values)
    if n < 2:
        return 0.0
    mean = _mean(values)
    return math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n
