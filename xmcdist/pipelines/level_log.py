"""What a level tells while it trains: a line and a row a window, its validation, what it costs.

Letters: n documents of this rank, K nodes of the level, W ranks.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from xmcdist.encoders.costs import EncoderCosts
from xmcdist.encoders.errors import EncoderError
from xmcdist.encoders.hf import Encoder
from xmcdist.inference.beam import top_k_arrays
from xmcdist.observability.devices import measured_peak_flops, peak_flops
from xmcdist.observability.environment import peak_memory_mb
from xmcdist.parallel.collectives import all_reduce, all_reduce_array, gather_objects
from xmcdist.pipelines.levels import per_level
from xmcdist.pipelines.run import Run
from xmcdist.training.engine import Engine

__all__ = ["LevelLog", "beam_metrics", "memory_mb", "steps_before", "utilisation"]

_KS = (1, 3, 5)
_PEAK_S = 0.1


def steps_before(run: Run, t: int) -> int:
    """``global_step`` at which level t begins: the steps that all levels above may take.

    One that validation ends sooner leaves a gap, so that a level is found at the same place always.
    """
    return sum(per_level(run.cfg.matcher.steps, u) for u in range(1, t))


class LevelLog:
    """Rows and lines of one level; made and used by all ranks alike, told by rank 0.

    Args:
        encoder: plain, before the engine has it.
        precision: as it was decided: ``fp32`` or ``bf16``.
        step: optimizer steps of this level that a checkpoint brought.

    Cost: one document through the encoder; on a CPU 0.1 s of matrix products, once a process.
    """

    def __init__(self, run: Run, engine: Engine, t: int, encoder: Encoder, precision: str, step: int) -> None:
        """Work out what a document costs and what the devices can do; collective."""
        self.run, self.engine, self.t, self.dim = run, engine, t, encoder.dim
        self.steps, self.before, self._validated = per_level(run.cfg.matcher.steps, t), steps_before(run, t), step
        try:
            self.costs: EncoderCosts | None = EncoderCosts.from_model(encoder.model, run.cfg.encoder.pooling)
        except (EncoderError, AttributeError):  # an encoder of its own kind trains all the same
            self.costs = None
        measured_now = _peak.cache_info().currsize == 0
        peaks = gather_objects(_peak(run.world.device_type, precision))
        self.peak: float | None = None if None in peaks else float(sum(p or 0.0 for p in peaks))
        if measured_now and self.peak is not None and run.world.device_type == "cpu":
            run.log.say(
                f"MFU counts as 100 % what this computer was just measured to multiply matrices at: "
                f"{self.peak / 1e9:.0f} GFLOP/s over all processes"
            )

    def window(self, values: dict[str, Any]) -> None:
        """Tell one window; collective.

        Args:
            values: of `training.meters.Window.flush`, this rank's.
        """
        row = {"global_step": self.before + values["step"], **values}
        squared = row.pop("length_squared", 0.0)
        norms = dict(zip(("encoder_grad_norm", "head_grad_norm"), self.engine.norms, strict=True))
        row |= self._of_all_ranks(row) | norms
        row["mfu_percent"] = None
        if self.costs is not None and self.peak:
            row["mfu_percent"] = utilisation(
                self.costs,
                self.peak,
                docs_per_s=row["docs_per_s"],
                tokens_per_s=row["tokens_per_s"],
                squared=squared,
                active=row["active_candidates"],
                dim=self.dim,
            )
        self.run.log.metrics(row)
        self.run.log.say(line_of(row, self.run.world.world_size))

    def validation(self, found: dict[str, float]) -> None:
        """Tell one evaluation; they come every ``matcher.eval_every`` steps and at the end."""
        every = self.run.cfg.matcher.eval_every
        self._validated = min((self._validated // every + 1) * every, self.steps)
        place = {"global_step": self.before + self._validated, "level": self.t, "step": self._validated}
        self.run.log.metrics(place | {f"validation_{name}": value for name, value in found.items()})
        shown = "  ".join(f"{name} {100 * value:.1f} %" for name, value in found.items())
        self.run.log.say(f"level {self.t} step {self._validated}/{self.steps}  validation: {shown}")

    def _of_all_ranks(self, row: dict[str, Any]) -> dict[str, float]:
        """The largest memory and data wait, and the mean time in collectives, of all ranks; collective."""
        mine = [memory_mb(self.engine.device), row["data_wait_percent"], row["collective_percent"], row["collective_s"]]
        world = self.run.world
        table = torch.zeros(world.world_size, len(mine), dtype=torch.float64)
        table[world.rank] = torch.tensor(mine, dtype=torch.float64)
        table = all_reduce(table.to(self.engine.device)).cpu()
        (memory, wait), (percent, seconds) = table[:, :2].amax(0).tolist(), table[:, 2:].mean(0).tolist()
        names = ("memory_mb", "data_wait_percent", "collective_percent", "collective_s")
        return {name: round(x, 4) for name, x in zip(names, (memory, wait, percent, seconds), strict=True)}


def utilisation(
    costs: EncoderCosts,
    peak: float,
    *,
    docs_per_s: float,
    tokens_per_s: float,
    squared: float,
    active: float,
    dim: int,
) -> float:
    """Model FLOP utilisation in percent: useful work over what all devices could do.

    Useful are real tokens (no padding), the encoder's forward and backward pass (without what
    checkpointing repeats), and the head's scores of active candidates with their two gradients.

    Args:
        costs: of the encoder.
        peak: FLOP a second of all ranks' devices together.
        docs_per_s: over all ranks, as ``tokens_per_s``.
        squared: mean of the squares of the documents' lengths.
        active: candidates a document.
        dim: d, of a head row.

    Source: Chowdhery et al., PaLM (arXiv:2204.02311), appendix B.
    """
    if not docs_per_s:
        return 0.0
    encoder = costs.training_flops(1.0, tokens_per_s / docs_per_s, squared)
    return 100.0 * docs_per_s * (encoder + 6.0 * dim * active) / peak


def beam_metrics(P: sp.csr_matrix, Y: sp.csr_matrix, beam: int) -> dict[str, float]:
    """Recall of the beam and P@k of a level's nodes, as shares, over all ranks; collective.

    Args:
        P: what this rank's documents retrieve, with scores ``[n, K]``.
        Y: their true nodes ``[n, K]``, where not zero.
        beam: nodes kept a document; ``P@k`` is told for k up to it.

    Returns:
        ``beam_recall``: share of the true nodes that were retrieved; ``P@1``, ``P@3``, ``P@5``:
        mean over documents with true nodes.
    """
    true = sp.csr_matrix((Y.data != 0, Y.indices, Y.indptr), shape=Y.shape)
    _, nodes = top_k_arrays(P, beam)
    ks = [k for k in _KS if k <= min(beam, P.shape[1])]
    hits = np.zeros(nodes.shape, dtype=np.int64)
    rows, places = np.nonzero(nodes >= 0)
    if rows.size:
        hits[rows, places] = np.asarray(true[rows, nodes[rows, places]]).ravel()
    documents = int(np.count_nonzero(np.diff(true.indptr)))
    counts = [int(hits.sum()), int(true.sum()), documents, *(int(hits[:, :k].sum()) for k in ks)]
    found, positives, documents, *at_k = all_reduce_array(np.array(counts, dtype=np.int64)).tolist()
    precision = {f"P@{k}": n / max(documents * k, 1) for k, n in zip(ks, at_k, strict=True)}
    return {"beam_recall": found / max(positives, 1), **precision}


def memory_mb(device: torch.device) -> float:
    """What this process holds, in MiB: a GPU's reserved memory at its highest, else resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    if not sys.platform.startswith("linux"):
        return peak_memory_mb()
    with open("/proc/self/status", encoding="ascii", errors="replace") as f:
        kib = next(line.split()[1] for line in f if line.startswith("VmRSS:"))
    return int(kib) / 1024


def line_of(row: dict[str, Any], world_size: int) -> str:
    """The line of a window that a person reads."""
    mfu = row["mfu_percent"]
    parts = [
        f"level {row['level']} step {row['step']}/{row['total']}",
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"grad {row['grad_norm']:.2f}",
        f"{row['docs_per_s']:.0f} docs/s",
        "MFU -" if mfu is None else f"MFU {mfu:.1f} %",
        f"waiting {row['data_wait_percent']:.0f} %",
    ]
    if world_size > 1:
        sent = row["sent_bytes_per_step"]
        size = f"{sent / 1e6:.1f} MB" if sent >= 1e5 else f"{sent / 1e3:.1f} kB"
        parts.append(f"collectives {row['collective_percent']:.0f} %, {size} a step")
    return "  ".join([*parts, f"{row['memory_mb']:.0f} MB", f"ETA {_duration(row['eta_s'])}"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@cache
def _peak(device_type: str, precision: str) -> float | None:
    """FLOP a second that this rank's device can do at most; None of a GPU that is not tabled."""
    if device_type == "cpu":
        return measured_peak_flops(precision, seconds=_PEAK_S)
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(), "tf32" if tf32 else precision)
