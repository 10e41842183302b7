"""How many bytes this rank's collectives send, by collective.

Counted is the payload that leaves a rank under the usual algorithms, with n bytes of its own
tensor and W ranks in the group:

    all_gather        n (W - 1)          every other rank gets it
    reduce_scatter    n (W - 1) / W      n: the whole input
    all_reduce        2 n (W - 1) / W    a reduce-scatter and an all-gather
    all_to_all        what goes to other ranks
    broadcast         n (W - 1) at the source, 0 elsewhere

Gradients that a data-parallel engine reduces by itself are not among them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["TRAFFIC", "Traffic"]


@dataclass
class Traffic:
    """Totals since the process began, or between two moments.

    Attributes:
        sent: bytes by collective.
        calls: calls by collective.
        seconds: time spent waiting in collectives; with NCCL only in starting them.  What a
            data-parallel engine sends within a backward pass is not among them.
    """

    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Bytes of all collectives."""
        return sum(self.sent.values())

    def add(self, op: str, sent: int, seconds: float) -> None:
        """Count one call."""
        self.sent[op] += sent
        self.calls[op] += 1
        self.seconds += seconds

    def include(self, other: Traffic) -> None:
        """Add what was counted elsewhere."""
        self.sent += other.sent
        self.calls += other.calls
        self.seconds += other.seconds

    def copy(self) -> Traffic:
        """This moment, to subtract later."""
        return Traffic(Counter(self.sent), Counter(self.calls), self.seconds)

    def since(self, before: Traffic) -> Traffic:
        """What came after an earlier moment's copy."""
        return Traffic(self.sent - before.sent, self.calls - before.calls, self.seconds - before.seconds)


TRAFFIC = Traffic()
"""Of this process."""
