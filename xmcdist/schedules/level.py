"""The learning rate of one level, whether it follows the step or what the loop measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xmcdist.config.schema import ScheduleConfig
from xmcdist.schedules.greedy import Greedy
from xmcdist.schedules.lr import lr_factor

__all__ = ["LevelSchedule"]


class LevelSchedule:
    """A factor for the rates of encoder and head alike; made anew for each level.

    ``greedy`` is multiplied by the linear rise over the first ``warmup`` steps, too; it is fed
    nothing before their end, as losses at rates near 0 say nothing of the rate that is set.

    Args:
        cfg: which schedule.
        total: optimizer steps of the level.
    """

    def __init__(self, cfg: ScheduleConfig, total: int) -> None:
        self.cfg, self.total = cfg, total
        self.greedy = Greedy(cfg) if cfg.name == "greedy" else None

    def factor(self, step: int) -> float:
        """What to multiply the configured rates by at a step, counted from 0."""
        if self.greedy is None:
            return lr_factor(self.cfg, step, self.total)
        return self.greedy.factor * (step / self.cfg.warmup if step < self.cfg.warmup else 1.0)

    def trained(self, step: int, loss: float) -> None:
        """A step was taken, with this loss of the whole global batch: equal on every rank, finite."""
        if self.greedy is not None and self.cfg.metric == "train_loss" and step >= self.cfg.warmup:
            self.greedy.feed(loss)

    def evaluated(self, step: int, score: float) -> None:
        """An evaluation after so many steps gave this score, equal on every rank; larger is better."""
        if self.greedy is not None and self.cfg.metric == "validation" and step >= self.cfg.warmup:
            self.greedy.feed(-score)

    def state(self) -> dict[str, Any] | None:
        """All that the step does not tell, as values for JSON."""
        return None if self.greedy is None else self.greedy.state()

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what `state` gave."""
        if self.greedy is not None and state is not None:
            self.greedy.load(state)
