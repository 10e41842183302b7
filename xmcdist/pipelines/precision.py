"""What ``engine.precision=auto`` means for a run: decided once, kept in the run folder."""

from __future__ import annotations

from pathlib import Path

from xmcdist.checkpoint.atomic import read_json, write_json
from xmcdist.parallel.collectives import broadcast_object, gather_objects
from xmcdist.parallel.launch import has_bf16
from xmcdist.pipelines.run import Run

__all__ = ["decide_precision"]


def decide_precision(run: Run) -> str:
    """``fp32`` or ``bf16``; collective.

    With ``auto`` the first stage that trains or embeds decides: bf16 when every rank's device
    has it.  Later starts keep to that, whatever their nodes have, so that half a run never
    differs from the other half, and fingerprints hold what was asked for, which is the same
    on every node.

    Returns:
        ``engine.precision``, ``auto`` replaced.
    """
    asked = run.cfg.engine.precision
    if asked != "auto":
        return asked
    path = Path(run.cfg.run_dir) / "precision.json"
    known: str | None = broadcast_object(read_json(path)["precision"] if run.world.is_main and path.exists() else None)
    if known is not None:
        return known
    fast = all(gather_objects(has_bf16(run.world.device_type)))
    chosen = "bf16" if fast else "fp32"
    if run.world.is_main:
        write_json(path, {"precision": chosen})
    run.world.barrier()
    return chosen
