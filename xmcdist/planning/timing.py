"""How long a run's stages take: FLOPs over rates, bytes over links, and measured CPU costs.

The encoder's part is FLOPs over a stated share of the device's rate.  What runs on CPUs
(features, trees, rankers) goes by constants measured on two cores of an EPYC server
(benchmarks/linear_vs_pecos.md); they hold within a factor of two elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from xmcdist.planning.job import Job, MatchLevel
from xmcdist.planning.traffic import step_traffic

__all__ = ["StageTime", "StepTime", "ranker_seconds", "stage_times", "step_time"]

# Seconds of one core; see the module's text.
TFIDF_VALUE_S = 1.2e-6  # a stored value, read from text twice
KMEANS_VALUE_S = 2.5e-9  # a stored value of the label embeddings, an iteration and a halving
KMEANS_ITERATIONS = 8  # of a halving until no label moves
RANKER_VALUE_S = 2.0e-9  # a stored value of a cluster's documents, a node
RANKER_DOCUMENT = 25.0  # stored values that a document costs beside its own
RANKER_DENSE = 0.45  # of a stored value: a dense one
TOKEN_S = 4e-6  # a token, tokenised
CANDIDATE_S = 50e-9  # a candidate found, drawn and kept: 42 to 70 ns measured on one core, 256 and 2048 documents
_CACHE, _SLOWEST = 1 << 24, 5.0  # as `xmcdist.rankers.partition` weighs clusters beyond the cache
_LATENCY_S = 20e-6  # of a collective
_HIDDEN = 0.5  # of the encoder's time that its gradients' reduction overlaps with
_HOST_BANDWIDTH = 10e9  # bytes a second to a core's memory


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the busiest rank.

    ``reduction`` is what the engine's traffic and the replicas' rows add beyond what backward
    hides, ``candidates`` what the host takes to find the candidates of its replica's documents.
    """

    candidates: float
    encoder: float
    head: float
    gather: float
    reduction: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.candidates + self.encoder + self.head + self.gather + self.reduction + self.optimizer


@dataclass(frozen=True)
class StageTime:
    """One stage: seconds by the clock, FLOPs of all ranks, optimizer steps."""

    name: str
    seconds: float
    flops: float = 0.0
    steps: int = 0


def step_time(job: Job, level: MatchLevel) -> StepTime:
    """One optimizer step of a level, from rates, links and sizes."""
    e, m = job.encoder, job.machine
    if e is None:
        raise ValueError("a linear run takes no steps")
    rate = m.flops * m.utilisation
    encoder = e.training_flops(job.local_batch, job.length, checkpointing=job.cfg.encoder.gradient_checkpointing) / rate
    head = _head_seconds(job, level, e.hidden)
    traffic = step_traffic(job, level)
    across = min(m.link, m.network * m.per_node)  # rings use every port of a node, and cross it once a round
    gather = (traffic.gather + traffic.scatter) / (m.link if job.shards <= m.per_node else across)
    waits = 0 if job.ranks == 1 else 2 * len(job.micro_steps) + 2
    hidden = _HIDDEN * encoder
    reduction = max(0.0, traffic.engine / (m.link if job.ranks <= m.per_node else across) - hidden)
    if job.replicas > 1:  # ranks with the same rows are on different nodes, those of one node send side by side
        beside = max(m.per_node / job.shards, 1.0)
        reduction += traffic.replicas / (m.link if job.ranks <= m.per_node else min(m.link, m.network * beside))
    state = e.trained_parameters / (job.ranks if job.cfg.engine.name not in ("cpu", "ddp") else 1)
    moved = 28.0 * (state + level.rows * (e.hidden + 1))  # reads of 4 arrays, writes of 3, float32
    found = job.cfg.engine.global_batch / job.replicas * level.candidates * CANDIDATE_S
    return StepTime(found, encoder, head, gather + waits * _LATENCY_S, reduction, moved / _bandwidth(job))


def _bandwidth(job: Job) -> float:
    return 0.7 * job.machine.device.bandwidth if job.machine.device else _HOST_BANDWIDTH


def _head_seconds(job: Job, level: MatchLevel, width: int) -> float:
    """Scores, and gradients of documents and rows: matrix products, or gathered rows by bandwidth."""
    micro_steps = len(job.micro_steps)
    if level.dense:
        flops = 3 * 2.0 * job.gathered * level.rows * width
        return micro_steps * flops / (job.machine.flops * job.machine.utilisation)
    return micro_steps * 5.0 * level.pairs * width * 4 / _bandwidth(job)


def stage_times(job: Job) -> list[StageTime]:
    """Every stage in order; those of the CPU share their work over all cores of all ranks."""
    c, cores = job.counts, job.machine.cores * job.ranks
    out = [StageTime("features", c.feature_values * TFIDF_VALUE_S / cores)]
    out.append(StageTime("tree", _kmeans(job, 0) / cores))
    if job.encoder is None or (job.cfg.evaluation.linear_baseline and c.test_documents):
        out.append(StageTime("linear", ranker_seconds(job, job.tree, 0) / cores))
    e, again = job.encoder, job.cfg.overlap.rounds if job.cfg.overlap.copies > 1 else 0
    if e is None:
        if again:
            out.append(StageTime("linear_overlap", again * ranker_seconds(job, job.tree, 0, again=True) / cores))
        return out
    tokens = (c.documents + c.test_documents) * c.tokens_per_document
    out.append(StageTime("tokens", tokens * TOKEN_S / cores))
    rate = job.machine.flops * job.machine.utilisation * job.ranks
    for level in job.match_levels:
        train = level.steps * e.training_flops(job.cfg.engine.global_batch, job.length)
        embed = e.forward_flops(c.documents, c.tokens_per_document)
        seconds = level.steps * step_time(job, level).total + embed / rate
        out.append(StageTime(f"match-{level.level}", seconds, train + embed, level.steps))
    if job.cfg.overlap.fine_tune:
        passes = [s for s in out if s.name.startswith("match-")]
        seconds, flops = (again * sum(x) for x in ((s.seconds for s in passes), (s.flops for s in passes)))
        out.append(StageTime("match_overlap", seconds, flops, again * sum(s.steps for s in passes)))
    embed = e.forward_flops(c.test_documents, c.tokens_per_document)
    out.append(StageTime("embed", embed / rate, embed))
    dense = e.hidden if job.cfg.ranker.features != "sparse" else 0
    if not job.by_matcher:
        out.append(StageTime("ranker_tree", _kmeans(job, dense) / cores))
    first = len(job.match_levels) + 1 if job.by_matcher else 1
    out.append(StageTime("rank", ranker_seconds(job, job.ranker_tree, dense, first) / cores))
    if again:
        seconds = again * ranker_seconds(job, job.ranker_tree, dense, first, again=True)
        out.append(StageTime("rank_overlap", seconds / cores))
    return out


def _kmeans(job: Job, dense: int) -> float:
    from math import log2

    from xmcdist.planning.memory import label_values

    depth = max(1.0, log2(max(job.counts.labels / job.cfg.tree.max_leaf_size, 2)))
    values = label_values(job) + job.counts.labels * dense
    return values * depth * KMEANS_ITERATIONS * KMEANS_VALUE_S


def ranker_seconds(job: Job, sizes: list[int], dense: int, first: int = 1, *, again: bool = False) -> float:
    """Values of every cluster's documents times its children, over all levels from the first.

    Args:
        again: on the tree whose labels lie in several clusters.
    """
    c, r, above, work = job.counts, job.cfg.ranker, 1, 0.0
    copies = job.cfg.overlap.copies if again else 1
    sizes = [*sizes[:-1], copies * sizes[-1]]
    sparse = 0.0 if r.features == "dense" and dense else c.values_per_document
    for t, nodes in enumerate(sizes, start=1):
        if t < first:
            above = nodes
            continue
        parents = copies * job.true_nodes(above)
        if t > 1 and "man" in r.negatives[min(t, len(r.negatives)) - 1]:
            parents += r.beam
        a_document = sparse + RANKER_DENSE * dense + RANKER_DOCUMENT
        members = c.documents * min(parents, above)
        in_memory = members / above * (8 * sparse + 4 * dense)  # bytes of a cluster's documents
        slow = min(1.0 + in_memory / _CACHE, _SLOWEST)
        work += members * a_document * slow * nodes / above
        above = nodes
    return work * RANKER_VALUE_S
