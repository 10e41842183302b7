"""The cost model of `plan` carried on to 8 to 1,024 GPUs and 3 to 100 million labels.

Nothing here was run at that size: docs/scaling.md says what is measured and what is assumed.
Its tables are what `scaling_tables` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from xmcdist.config.schema import EncoderConfig, EngineConfig, MatcherConfig, NegativesConfig, RunConfig, TreeConfig
from xmcdist.encoders.costs import EncoderCosts, encoder_costs
from xmcdist.observability.devices import find_device
from xmcdist.planning.counts import DataCounts
from xmcdist.planning.job import Job, Machine, MatchLevel
from xmcdist.planning.links import NETWORKS
from xmcdist.planning.memory import stages
from xmcdist.planning.timing import StepTime, ranker_seconds, step_time

__all__ = ["Point", "best_shards", "point", "scaling_tables"]

GPUS = (8, 16, 64, 256, 1024)
LABELS = (3_000_000, 10_000_000, 30_000_000, 100_000_000)
PER_NODE = 8
PER_GPU = 32  # documents a GPU and step
UTILISATION = 0.4
LINK_EFFICIENCY = 0.8
CORES_PER_GPU = 12.0
CANDIDATES = 1000
DOCUMENTS_PER_LABEL = 0.6  # as Amazon-3M
_ROOM = 0.92


@dataclass(frozen=True)
class Point:
    """One size: labels, GPUs, documents a step, shards of the label rows, and what follows."""

    labels: int
    gpus: int
    batch: int
    shards: int
    time: StepTime
    memory: float  # bytes a GPU

    @property
    def documents_per_s(self) -> float:
        """Over all GPUs."""
        return self.batch / self.time.total


def _job(labels: int, gpus: int, batch: int, shards: int, network: str, gpu: str, encoder: EncoderCosts) -> Job:
    device = find_device(gpu)
    if device is None:
        raise ValueError(f"no GPU {gpu}")
    cfg = RunConfig(
        encoder=EncoderConfig(preset="hf", name="bert-base-uncased", max_length=128),
        tree=TreeConfig(nr_splits=16, max_leaf_size=100),
        matcher=MatcherConfig(max_clusters=labels, steps=[1], beam=20, scoring="pairs"),
        negatives=NegativesConfig(max_active=CANDIDATES),
        engine=EngineConfig(name="ddp", label_shards=shards, global_batch=batch, micro_batch=PER_GPU, precision="bf16"),
    )
    cfg.checkpoint.every_steps = 0
    counts = DataCounts(int(labels * DOCUMENTS_PER_LABEL), 0, labels, 36.0, 200_000, 50.0, 128.0)
    per_node = min(PER_NODE, gpus)
    machine = Machine(
        gpus,
        per_node,
        device,
        device.flops("bf16"),
        UTILISATION,
        CORES_PER_GPU,
        LINK_EFFICIENCY * device.link,
        NETWORKS[network].of_rank(per_node),
    )
    return Job(cfg, counts, machine, encoder)


def _last_level(job: Job) -> MatchLevel:
    return job.match_levels[-1]


def point(
    labels: int, gpus: int, batch: int, shards: int, encoder: EncoderCosts, network: str = "ndr", gpu: str = "h100"
) -> Point:
    """Step time and memory of training the last level, whose nodes are the labels."""
    job = _job(labels, gpus, batch, shards, network, gpu, encoder)
    level = _last_level(job)
    memory = next(s.device_bytes for s in stages(job) if s.name == f"match-{level.level}")
    return Point(labels, gpus, batch, shards, step_time(job, level), memory)


def best_shards(
    labels: int, gpus: int, batch: int, encoder: EncoderCosts, network: str = "ndr", gpu: str = "h100"
) -> Point | None:
    """The fastest number of shards that fits a GPU's memory; None where none does."""
    device = find_device(gpu)
    if device is None:
        raise ValueError(f"no GPU {gpu}")
    sizes = [s for s in (2**i for i in range(11)) if s <= gpus and gpus % s == 0]
    points = [point(labels, gpus, batch, s, encoder, network, gpu) for s in sizes]
    fitting = [p for p in points if p.memory <= _ROOM * device.memory]
    return min(fitting, key=lambda p: p.time.total, default=None)


def scaling_tables() -> str:
    """Markdown: all tables of docs/scaling.md."""
    encoder = encoder_costs(EncoderConfig(preset="hf", name="bert-base-uncased"))
    parts = [
        "### H100, InfiniBand NDR, 32 documents a GPU\n",
        _weak(encoder),
        "### The same with a global batch of 4,096 at any size\n",
        _strong(encoder),
        "### Other networks: 10 million labels, 32 documents a GPU\n",
        _networks(encoder),
        "### Rankers on CPUs\n",
        _rankers(encoder),
    ]
    return "\n".join(parts)


_COLUMNS = (
    "labels", "GPUs", "batch", "shards", "candidates ms", "encoder ms", "head ms", "gather ms", "reduction ms",
    "optimizer ms", "step ms", "documents/s", "efficiency", "GB a GPU",
)  # fmt: skip


def _header(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"


def _row(p: Point | None, labels: int, gpus: int, batch: int, base: float | None) -> str:
    if p is None:
        return f"| {labels // 10**6} M | {gpus:,} | {batch:,} | none fits | | | | | | | | | | |\n"
    t = p.time
    times = " | ".join(
        f"{1000 * x:.1f}" for x in (t.candidates, t.encoder, t.head, t.gather, t.reduction, t.optimizer, t.total)
    )
    share = "" if base is None else f"{100 * p.documents_per_s / gpus / base:.0f} %"
    return (
        f"| {labels // 10**6} M | {gpus:,} | {batch:,} | {p.shards:,} | {times} | {p.documents_per_s:,.0f} | {share} | "
        f"{p.memory / 1e9:.1f} |\n"
    )


def _weak(encoder: EncoderCosts) -> str:
    """Efficiency is documents a second and GPU against the smallest number of GPUs that holds the labels."""
    out = _header(*_COLUMNS)
    for labels in LABELS:
        base = None
        for gpus in GPUS:
            p = best_shards(labels, gpus, PER_GPU * gpus, encoder)
            if p is not None and base is None:
                base = p.documents_per_s / gpus
            out += _row(p, labels, gpus, PER_GPU * gpus, base)
    return out


def _strong(encoder: EncoderCosts) -> str:
    out = _header(*_COLUMNS)
    for labels in LABELS[:2]:
        base = None
        for gpus in GPUS:
            p = best_shards(labels, gpus, 4096, encoder)
            if p is not None and base is None:
                base = p.documents_per_s / gpus
            out += _row(p, labels, gpus, 4096, base)
    return out


def _networks(encoder: EncoderCosts) -> str:
    out = _header("network", "GPUs", "shards", "gather ms", "reduction ms", "step ms", "documents/s")
    for key, network in NETWORKS.items():
        for gpus in (16, 64, 256):
            p = best_shards(10_000_000, gpus, PER_GPU * gpus, encoder, network=key)
            if p is None:
                continue
            t = p.time
            times = " | ".join(f"{1000 * x:.1f}" for x in (t.gather, t.reduction, t.total))
            out += f"| {network.name} | {gpus} | {p.shards} | {times} | {p.documents_per_s:,.0f} |\n"
    return out


def _rankers(encoder: EncoderCosts) -> str:
    out = _header("labels", "documents", "core hours", "hours on 96 cores", "hours on 12,288 cores")
    for labels in LABELS:
        job = _job(labels, 8, 256, 8, "ndr", "h100", encoder)
        cfg = replace(job.cfg, ranker_tree=TreeConfig(nr_splits=32, max_leaf_size=100))
        job = replace(job, cfg=cfg)
        hours = ranker_seconds(job, job.ranker_tree, encoder.hidden) / 3600
        out += (
            f"| {labels // 10**6} M | {job.counts.documents / 1e6:.1f} M | {hours:,.0f} | {hours / 96:,.1f} | "
            f"{hours / 12288:,.2f} |\n"
        )
    return out
