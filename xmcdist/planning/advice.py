"""What would not fit, and which setting to change; cheapest change first."""

from __future__ import annotations

from dataclasses import replace

from xmcdist.planning.job import Job
from xmcdist.planning.memory import Runtime, Stage, stages

__all__ = ["advice"]

_ROOM = 0.92  # of a device's memory that a run may fill: fragments and libraries take the rest


def advice(job: Job, planned: list[Stage], gpu_memory: float, host_memory: float, runtime: Runtime) -> list[str]:
    """A sentence for each thing that would not fit; empty when all fits.

    Args:
        gpu_memory: bytes of one GPU; 0 without.
        host_memory: bytes of one node; 0: unknown.
        runtime: as given to `stages`.
    """
    out = []
    worst = max(planned, key=lambda s: s.device_bytes)
    if gpu_memory and worst.device_bytes > _ROOM * gpu_memory:
        out.append(_told(job, worst.name, worst.device, gpu_memory, "the GPU", runtime, on_device=True))
    worst = max(planned, key=lambda s: s.host_bytes)
    together = min(job.machine.per_node, job.ranks)
    if host_memory and worst.host_bytes * together > _ROOM * host_memory:
        share = host_memory / together
        out.append(_told(job, worst.name, worst.host, share, "a rank's share of the node", runtime, on_device=False))
    return out


def _told(
    job: Job, stage: str, parts: dict[str, float], limit: float, where: str, runtime: Runtime, on_device: bool
) -> str:
    total = sum(parts.values())
    largest = max(parts, key=lambda name: parts[name])
    helpful = []
    for name, changed in _changes(job, parts):
        peak = max((s.device_bytes if on_device else s.host_bytes) for s in stages(changed, runtime))
        if peak < 0.97 * total:
            helpful.append(f"{name} (then {peak / 1e9:.1f} GB{', fits' if peak <= _ROOM * limit else ''})")
    remedy = "; ".join(helpful) if helpful else "take more processes or a larger machine"
    return (
        f"{stage} needs {total / 1e9:.1f} GB of {where}'s {limit / 1e9:.1f} GB; most is {largest} "
        f"({parts[largest] / 1e9:.1f} GB). Set {remedy}"
    )


def _changes(job: Job, parts: dict[str, float]) -> list[tuple[str, Job]]:
    """Settings that make a run smaller, each alone."""
    cfg, out = job.cfg, []

    def other(name: str, **groups: object) -> None:
        out.append((name, replace(job, cfg=replace(cfg, **groups))))  # type: ignore[arg-type]

    if job.encoder is not None:
        if job.micro > 1:
            half = max(1, job.micro // 4)
            other(f"engine.micro_batch={half}", engine=replace(cfg.engine, micro_batch=half))
        if not cfg.encoder.gradient_checkpointing:
            other("encoder.gradient_checkpointing=true", encoder=replace(cfg.encoder, gradient_checkpointing=True))
        if job.ranks > 1 and cfg.engine.name in ("cpu", "ddp", "zero1", "zero2"):
            other("engine=zero3", engine=replace(cfg.engine, name="zero3"))
        if job.on_gpu and cfg.engine.name != "zero3_offload":
            other("engine=zero3_offload", engine=replace(cfg.engine, name="zero3_offload"))
        if job.replicas > 1:
            other("engine.label_shards=null", engine=replace(cfg.engine, label_shards=None))
        small = cfg.matcher.max_clusters // 8
        if small >= job.tree[0]:
            other(f"matcher.max_clusters={small}", matcher=replace(cfg.matcher, max_clusters=small))
    if cfg.ranker.max_nonzeros_per_label is None:
        other("ranker.max_nonzeros_per_label=200", ranker=replace(cfg.ranker, max_nonzeros_per_label=200))
    columns = job.counts.features // 4
    if columns > 1000 and cfg.features.kind != "given":
        smaller = replace(job.counts, features=columns)
        out.append((f"features.max_features={columns}", replace(job, counts=smaller)))
    if job.ranks < 64:
        more = replace(job.machine, ranks=2 * job.ranks)
        out.append((f"{2 * job.ranks} processes on twice the nodes", replace(job, machine=more)))
    return out
