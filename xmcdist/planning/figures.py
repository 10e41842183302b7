"""All figures of a plan as one dictionary for JSON, and as tables for a terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xmcdist.planning.advice import advice
from xmcdist.planning.job import Job
from xmcdist.planning.memory import Runtime, stages
from xmcdist.planning.timing import stage_times, step_time
from xmcdist.planning.traffic import step_traffic

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["figures", "show"]


def figures(job: Job, runtime: Runtime) -> dict[str, Any]:
    """Everything a plan says: bytes, seconds, FLOPs.

    Raises:
        UserError: the settings do not fit each other or the counts.
    """
    planned, times = stages(job, runtime), stage_times(job)
    gpu = job.machine.device.memory if job.machine.device else 0.0
    levels = []
    for level in job.match_levels:
        traffic, step = step_traffic(job, level), step_time(job, level)
        levels.append(
            asdict(level)
            | {"traffic": asdict(traffic) | {"counted": traffic.counted}, "seconds": asdict(step) | {"all": step.total}}
        )
    host = max(s.host_bytes for s in planned)
    device = max(s.device_bytes for s in planned)
    return {
        "counts": asdict(job.counts),
        "machine": {
            "device": job.machine.name,
            "ranks": job.ranks,
            "per_node": job.machine.per_node,
            "flops": job.machine.flops,
            "utilisation": job.machine.utilisation,
            "cores_per_rank": job.machine.cores,
        },
        "encoder": None if job.encoder is None else asdict(job.encoder),
        "precision": job.precision if job.encoder else None,
        "tree": job.tree,
        "ranker_tree": job.ranker_tree,
        "label_shards": job.shards,
        "labels_per_rank": -(-job.counts.labels // job.shards),
        "micro_batch": job.micro if job.encoder else None,
        "accumulation": len(job.micro_steps) if job.encoder else None,
        "levels": levels,
        "stages": [
            {"name": s.name, "host_bytes": s.host_bytes, "device_bytes": s.device_bytes, "host": s.host}
            | {"device": s.device}
            for s in planned
        ],
        "times": [asdict(t) for t in times],
        "peak_host_bytes": host,
        "peak_device_bytes": device,
        "seconds": sum(t.seconds for t in times),
        "flops": sum(t.flops for t in times),
        "steps": sum(t.steps for t in times),
        "does_not_fit": advice(job, planned, gpu, job.machine.memory, runtime),
    }


def show(plan: dict[str, Any], console: Console) -> None:
    """Print a plan."""
    c, m = plan["counts"], plan["machine"]
    console.print(
        f"{c['documents']:,} documents, {c['labels']:,} labels, {c['labels_per_document']:.1f} labels a document, "
        f"{c['features']:,} features ({c['source']})"
    )
    console.print(f"tree: {' > '.join(f'{k:,}' for k in plan['tree'])}")
    if plan["encoder"] is None:
        console.print("no encoder: the linear path alone")
    else:
        e = plan["encoder"]
        if plan["ranker_tree"] != plan["tree"]:
            console.print(f"tree of the rankers: {' > '.join(f'{k:,}' for k in plan['ranker_tree'])}")
        console.print(
            f"encoder: {e['parameters'] / 1e6:.1f} M parameters, {e['layers']} layers, {e['hidden']} wide, "
            f"{plan['precision']}; {plan['micro_batch']} documents a rank at once, {plan['accumulation']} micro-step"
            f"{'s' if plan['accumulation'] != 1 else ''} a step"
        )
    rate = f"{m['flops'] / 1e12:,.2f} TFLOP/s at most, {100 * m['utilisation']:.0f} % of it assumed"
    processes = "process" if m["ranks"] == 1 else "processes"
    console.print(
        f"machine: {m['ranks']} {processes}, {m['per_node']} a node, {m['device']}, {rate}, "
        f"{m['cores_per_rank']:g} cores each; labels in {plan['label_shards']} shards of {plan['labels_per_rank']:,}"
    )
    if plan["levels"]:
        console.print(
            "\na step of the matcher: rows of the head a rank, candidates a document, bytes that leave a rank"
        )
        console.print(_levels(plan))
    console.print(_stages(plan))
    console.print(_parts(plan))
    for sentence in plan["does_not_fit"]:
        console.print(f"does not fit: {sentence}", style="bold")
    if not plan["does_not_fit"]:
        console.print("all of it fits, as far as memory is known")


def _levels(plan: dict[str, Any]) -> Any:
    table = _table("level", "nodes", "rows", "scored", "steps", "sent", "engine", "ms")
    for row in plan["levels"]:
        scored = "dense" if row["dense"] else f"{row['candidates']:,}"
        table.add_row(
            str(row["level"]),
            f"{row['nodes']:,}",
            f"{row['rows']:,}",
            scored,
            f"{row['steps']:,}",
            _bytes(row["traffic"]["counted"]),
            _bytes(row["traffic"]["engine"]),
            f"{1000 * row['seconds']['all']:,.1f}",
        )
    return table


def _stages(plan: dict[str, Any]) -> Any:
    has_gpu = plan["peak_device_bytes"] > 0
    headers = ["stage", "time", "FLOPs", "memory a rank"]
    table = _table(*headers, *(["of it on the GPU"] if has_gpu else []))
    memory = {s["name"]: s for s in plan["stages"]}
    for t in plan["times"]:
        s = memory.get(t["name"])
        row = [t["name"], _seconds(t["seconds"]), f"{t['flops']:.1e}" if t["flops"] else ""]
        row.append(_bytes(s["host_bytes"] + s["device_bytes"]) if s else "")
        table.add_row(*row, *([_bytes(s["device_bytes"]) if s else ""] if has_gpu else []))
    peak = plan["peak_device_bytes"]
    last = ["all", _seconds(plan["seconds"]), f"{plan['flops']:.1e}" if plan["flops"] else ""]
    largest = max(s["host_bytes"] + s["device_bytes"] for s in plan["stages"])
    table.add_row(*last, _bytes(largest), *([_bytes(peak)] if has_gpu else []), style="bold")
    return table


def _parts(plan: dict[str, Any]) -> Any:
    """What fills the memory of the largest stage."""
    table = _table("memory of a rank", "host", "GPU")
    host = max(plan["stages"], key=lambda s: s["host_bytes"])
    device = max(plan["stages"], key=lambda s: s["device_bytes"])
    names = dict.fromkeys([*host["host"], *device["device"]])
    for name in names:
        h, d = host["host"].get(name, 0), device["device"].get(name, 0)
        if max(h, d) >= 1e6:
            table.add_row(name, _bytes(h) if h else "", _bytes(d) if d else "")
    table.add_row(
        f"peak ({host['name']}{', ' + device['name'] if plan['peak_device_bytes'] else ''})",
        _bytes(host["host_bytes"]),
        _bytes(device["device_bytes"]) if plan["peak_device_bytes"] else "",
        style="bold",
    )
    return table


def _table(*headers: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for i, header in enumerate(headers):
        table.add_column(header, no_wrap=True, justify="left" if i == 0 else "right")
    return table


def _bytes(n: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:,.{2 if n < 10 * size else 1}f} {unit}"
    return f"{n:.0f} B"


def _seconds(s: float) -> str:
    if s < 120:
        return f"{s:.1f} s"
    return f"{s / 60:.0f} min" if s < 7200 else f"{s / 3600:,.1f} h"
