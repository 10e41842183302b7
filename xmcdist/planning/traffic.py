"""Bytes that a rank sends in one optimizer step, by the arithmetic of `xmcdist.parallel.traffic`.

``counted`` is what the collective wrappers count and a run logs as ``sent_bytes_per_step``;
``engine`` is what the data-parallel engine sends of the encoder's gradients and parameters by
itself, as a ring or a reduce-scatter and all-gather would.
"""

from __future__ import annotations

from dataclasses import dataclass

from xmcdist.planning.job import Job, MatchLevel

__all__ = ["StepTraffic", "step_traffic"]

_FLOAT, _DOUBLE = 4, 8
_STEP_SCALARS = 4  # the loss, and the signals that any rank has been sent


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that leave one rank.

    Attributes:
        gather: embeddings, forward.
        scatter: their gradients, backward.
        scalars: loss and norms.
        replicas: gradients of head rows, summed over replicas.
        engine: the encoder's gradients (and parameters under ZeRO-3 and FSDP2).
    """

    gather: int
    scatter: int
    scalars: int
    replicas: int
    engine: float

    @property
    def counted(self) -> int:
        """What a run logs as ``sent_bytes_per_step``."""
        return self.gather + self.scatter + self.scalars + self.replicas


def step_traffic(job: Job, level: MatchLevel) -> StepTraffic:
    """Bytes of one step of a level; nothing of it grows with the number of labels unless rows are replicated."""
    encoder = job.encoder
    if encoder is None:
        raise ValueError("a linear run takes no steps")
    W, S, R = job.ranks, job.shards, job.replicas
    rows = [-(-n // W) for n in job.micro_steps]  # of the rank that has most: the others pad theirs
    block = sum(rows) * encoder.hidden * _FLOAT
    scalars = _all_reduce(_STEP_SCALARS * _DOUBLE, W) + _all_reduce(_DOUBLE, S)
    if job.cfg.engine.name == "fsdp2":
        scalars += _all_reduce(_DOUBLE, W)
    replicas = 0
    if R > 1:
        replicas = _all_reduce(level.rows * encoder.hidden * _FLOAT, R) + _all_reduce(level.rows * _FLOAT, R)
    return StepTraffic(block * (S - 1), block * (S - 1), scalars, replicas, _engine(job))


def _all_reduce(n: int, ranks: int) -> int:
    return 2 * n * (ranks - 1) // ranks


def _engine(job: Job) -> float:
    if job.encoder is None or job.ranks == 1:
        return 0.0
    trained, share = _FLOAT * job.encoder.trained_parameters, (job.ranks - 1) / job.ranks
    if job.cfg.engine.name in ("zero3", "zero3_offload", "fsdp2"):
        # Parameters for forward and for backward of every micro-step, gradients once.
        return (2.0 * len(job.micro_steps) + 1.0) * trained * share
    return 2.0 * trained * share
