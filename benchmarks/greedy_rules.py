"""What GreedyLR's average is compared with: rules side by side, from rates that are right and rates that are wrong.

    python benchmarks/greedy_rules.py [--seeds 3] [--steps 2000] [--out FILE.md]

A fixed two-class problem (600 documents, 20 features, squared hinge, batches of 16), so small that
the best constant rate is found by trying.  Each rule starts from that rate times 1/1000 to 1000.
A minute on one core.
"""

from __future__ import annotations

import argparse
import math
import platform
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from xmcdist.config.schema import ScheduleConfig
from xmcdist.schedules.level import LevelSchedule

WRONG = (1e-3, 0.1, 1.0, 10.0, 1e3)
PAPER = {"window": 50, "compare": "best", "threshold": 1e-6, "threshold_mode": "rel", "patience": 10, "factor": 0.95}
TRANSFORMERS = PAPER | {"window": 1, "threshold_mode": "abs"}
NO_MARGIN = {"threshold": 0.0, "threshold_mode": "abs"}
RULES: dict[str, dict[str, Any]] = {
    "default: window before, noise 0.5": {},
    "window before, no threshold": NO_MARGIN,
    "window before, noise 1": {"threshold": 1.0},
    "previous": {"compare": "previous"} | NO_MARGIN,
    "previous, window 50, patience 10, factor 0.95": PAPER | {"compare": "previous"} | NO_MARGIN,
    "best": {"compare": "best"} | NO_MARGIN,
    "best, noise 0.5": {"compare": "best"},
    "the paper's": PAPER | {"waiting": "own"},
    "transformers' defaults": TRANSFORMERS,
}
BOUNDS = {"bounds 1e-5 to 1e5": (1e-5, 1e5), "bounds 0.1 to 10, the default": (0.1, 10.0)}


class Problem:
    """Two classes that a plane parts but for noise."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.X = rng.normal(size=(600, 20)) * np.linspace(0.3, 2, 20)
        self.y = np.sign(self.X @ rng.normal(size=20) / np.sqrt(20) + 0.5 * rng.normal(size=600))

    def loss(self, w: Any, some: Any) -> tuple[float, Any]:
        """Loss and gradient of some documents."""
        gap = np.maximum(0, 1 - self.y[some] * (self.X[some] @ w))
        return float((gap**2).mean()), -2 * self.X[some].T @ (self.y[some] * gap) / len(gap)

    def train(self, optimizer: str, rate: float, cfg: ScheduleConfig, steps: int, seed: int) -> tuple[float, float]:
        """The loss of all documents at the end, and the last factor."""
        rng, schedule = np.random.default_rng(seed), LevelSchedule(cfg, steps)
        w, m, v = np.zeros(20), np.zeros(20), np.zeros(20)
        for step in range(steps):
            value, g = self.loss(w, rng.integers(0, len(self.y), 16))
            if optimizer == "adam":
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                up = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
            else:
                up = g / max(1.0, float(np.linalg.norm(g)))
            w = w - rate * schedule.factor(step) * up
            schedule.trained(step, value)
        return self.loss(w, slice(None))[0], schedule.factor(steps)


def table(seeds: int, steps: int) -> list[str]:
    """One table an optimizer and bounds."""
    problem, lines = Problem(), []
    constant = ScheduleConfig(name="constant", warmup=0)
    for optimizer, title in (("adam", "Adam"), ("clipped", "Gradient descent, norm clipped at 1")):

        def mean(rate: float, cfg: ScheduleConfig, optimizer: str = optimizer) -> tuple[float, float]:
            runs = [problem.train(optimizer, rate, cfg, steps, seed) for seed in range(seeds)]
            return float(np.mean([r for r, _ in runs])), math.exp(float(np.mean([math.log(f) for _, f in runs])))

        least, best = min((mean(float(rate), constant)[0], float(rate)) for rate in 10.0 ** np.arange(-4, 1, 0.5))
        head = [f"rate x {wrong:g}" for wrong in WRONG]
        for bounds, (low, high) in BOUNDS.items():
            lines += [f"## {title}, {bounds}", "", f"Best constant rate {best:.2g}: loss {least:.4f}.", ""]
            lines += ["| rule | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
            rows = {"constant": constant} | {
                name: ScheduleConfig(name="greedy", warmup=0, min_factor=low, max_factor=high, **rule)
                for name, rule in RULES.items()
            }
            for name, cfg in rows.items():
                found = [mean(best * wrong, cfg) for wrong in WRONG]
                lines.append(f"| {name} | " + " | ".join(f"{x / least:.2f} ({f:.0e})" for x, f in found) + " |")
            lines.append("")
    return lines


def main() -> None:
    """Run, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = "\n".join(
        [
            "# What GreedyLR compares with",
            "",
            f"{date.today()}; one core, {platform.machine()}; Python {platform.python_version()}, "
            f"numpy {np.__version__}.",
            "",
            f"    python benchmarks/greedy_rules.py --seeds {args.seeds} --steps {args.steps}",
            "",
            "Loss of all documents at the end over that of the best constant rate, mean over seeds; behind it the last",
            "factor. Window, threshold, patience and factor of the default were chosen on this problem.",
            "",
            *table(args.seeds, args.steps),
        ]
    )
    if args.out:
        args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
