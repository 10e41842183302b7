"""Peak memory of one rank, stage by stage and part by part, in bytes.

What is exact: weights, gradients, moments, head, gathered embeddings, checkpoint copies,
mapped files.  What is a bound: candidates, activations (every document as long as
``encoder.max_length``).  What is measured: the interpreter with its libraries, and the room
that allocators keep; see benchmarks/plan_memory.md.

On a CPU all of it is one memory.  On a GPU `Stage.device` is the GPU's and `Stage.host` the
rank's share of the node's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xmcdist.encoders.costs import EncoderCosts
from xmcdist.planning.job import Job, MatchLevel

__all__ = ["Runtime", "Stage", "label_values", "stages"]

_FLOAT = 4
_MOMENTS = 2  # of Adam
_CUDA_CONTEXT = 600e6  # driver, cuBLAS workspaces and NCCL buffers of one process
_BUCKET = 50_000_000  # elements that DeepSpeed reduces at once (launch/deepspeed/*.json)
_LEFT_BY_ZERO = {
    "zero1": 2.5,
    "zero2": 2.5,
    "zero3": 4.0,
    "zero3_offload": 4.0,
}  # copies of the encoder, a level before
_EMBED_TOKENS = 8192  # padded tokens embedded at once
_PAIR_BYTES = 60  # document, node, value, weight, score, gradient, and their copies as tensors
_CSR_BYTES = 8
_TERM_BYTES = 150  # a word and its count in a dictionary
_WEIGHT_BYTES = 5  # of a ranker's weight on disk; building takes as much again


@dataclass(frozen=True)
class Runtime:
    """Bytes of a process before it has any data, measured with a CPU build of torch; a CUDA build takes more.

    Attributes:
        linear: interpreter, numpy, numba, torch as the linear path has them.
        encoder: what transformers and torch.distributed add.
        deepspeed: what DeepSpeed adds.
        kernels: compiled kernels, once used.
    """

    linear: float = 350e6
    encoder: float = 120e6
    deepspeed: float = 110e6
    kernels: float = 115e6


@dataclass
class Stage:
    """What one stage holds at its peak, by part."""

    name: str
    host: dict[str, float] = field(default_factory=dict)
    device: dict[str, float] = field(default_factory=dict)

    @property
    def host_bytes(self) -> float:
        """All of the rank's host memory."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> float:
        """All of the rank's GPU memory."""
        return sum(self.device.values())


def stages(job: Job, runtime: Runtime | None = None) -> list[Stage]:
    """Every stage of a run, in order.

    Raises:
        UserError: the settings do not fit each other or the counts.
    """
    runtime = runtime or Runtime()
    base = {"runtime": runtime.linear, "compiled kernels": runtime.kernels}
    out = [_features(job, base), _tree(job, base, "tree", dense=False)]
    linear = job.encoder is None
    if linear or (job.cfg.evaluation.linear_baseline and job.counts.test_documents):
        out.append(_rank(job, base, "linear", job.tree, dense=False))
    copies = job.cfg.overlap.copies
    if job.encoder is None:
        if copies > 1:
            out.append(_rank(job, base, "linear_overlap", job.tree, dense=False, copies=copies))
        return out
    base = base | {"runtime": runtime.linear + runtime.encoder}
    if job.cfg.engine.name.startswith("zero"):
        base["runtime"] += runtime.deepspeed
    out += [_match(job, base, level, job.encoder) for level in job.match_levels]
    kept = _kept_after_training(out[-1])
    dense = job.cfg.ranker.features != "sparse"
    if not job.by_matcher:
        out.append(_tree(job, base | kept, "ranker_tree", dense=dense))
    out.append(_rank(job, base | kept, "rank", job.ranker_tree, dense=dense))
    if copies > 1:
        out.append(_rank(job, base | kept, "rank_overlap", job.ranker_tree, dense=dense, copies=copies))
    return out


def _kept_after_training(last: Stage) -> dict[str, float]:
    """Freed blocks that a CPU run keeps for its next steps are in nobody's way, but stay resident."""
    if last.device:
        return {}
    work = sum(v for k, v in last.host.items() if k in _REUSED)
    return {"kept by the allocator": work}


_REUSED = (
    "encoder weights",
    "gradients",
    "moments",
    "engine buffers",
    "head and its moments",
    "activations",
    "embedding pass",
    "scores",
)


def _features(job: Job, base: dict[str, float]) -> Stage:
    c, f = job.counts, job.cfg.features
    terms = 0.0 if f.hashing_bits is not None else 2.0 * c.features * _TERM_BYTES
    own = c.feature_values / job.ranks
    return Stage("features", base | {"TF-IDF": terms + 2 * own * _CSR_BYTES, "mapped data": float(c.text_bytes)})


def _mapped(job: Job, dense: bool) -> float:
    """Pages of X, E and Y that a rank reads."""
    c = job.counts
    size = (c.feature_values + 2 * c.label_entries) * _CSR_BYTES
    if dense and job.encoder is not None:
        size += c.documents * job.encoder.hidden * _FLOAT
    return size


def label_values(job: Job) -> float:
    """Stored values of the label embeddings: a label's documents share many of their words."""
    c = job.counts
    often = max(c.label_entries / c.labels, 1.0)
    return c.labels * min(float(c.features), c.values_per_document * float(often**0.75))


def _tree(job: Job, base: dict[str, float], name: str, dense: bool) -> Stage:
    c = job.counts
    rows = label_values(job) * _CSR_BYTES
    wide = c.labels * job.encoder.hidden * _FLOAT if dense and job.encoder is not None else 0.0
    packed = min(rows / 2, job.machine.cores * 4.0 * (1 << 23))
    parts = {"mapped data": _mapped(job, dense), "label embeddings": rows + wide, "k-means": packed + 40.0 * c.labels}
    return Stage(name, base | parts)


def _rank(job: Job, base: dict[str, float], prefix: str, sizes: list[int], dense: bool, copies: int = 1) -> Stage:
    c, r = job.counts, job.cfg.ranker
    d = job.encoder.hidden if dense and job.encoder is not None else 0
    sparse = r.features != "dense" or job.encoder is None
    per_label = min(float(c.features), label_values(job) / c.labels) if sparse else 0.0
    if r.max_nonzeros_per_label is not None:
        per_label = min(per_label, r.max_nonzeros_per_label)
    own = copies * c.labels / job.ranks
    weights = own * (2.0 * per_label * _WEIGHT_BYTES + 2 * d * _FLOAT)
    above = sizes[-2] if len(sizes) > 1 else 1
    parents = copies * job.true_nodes(above) + (r.beam if any("man" in n for n in r.negatives) else 0)
    members = c.documents * min(parents, above) * 12.0 / job.ranks
    top = c.documents * (c.values_per_document * _CSR_BYTES if sparse else 0.0)
    at_once = min(0.5 * top, 2 * job.machine.cores * top * min(parents / above, 1.0))
    parts = {
        "mapped data": _mapped(job, dense),
        "rankers": weights,
        "negatives": members,
        "clusters' documents": at_once,
    }
    return Stage(prefix, base | parts)


def _match(job: Job, base: dict[str, float], level: MatchLevel, e: EncoderCosts) -> Stage:
    stage = Stage(f"match-{level.level}")
    encoder = _encoder_parts(job, e)
    head = _head_parts(job, level, e)
    work = _work_parts(job, level, e)
    c = job.counts
    own = c.documents / job.ranks
    host = base | {
        "mapped data": c.documents * (c.tokens_per_document * 2 + 8) + 2 * c.label_entries * _CSR_BYTES,
        "embeddings of all documents": own * e.hidden * _FLOAT,
        "order of the documents": 8.0 * c.documents,
        "checkpoint copy": _checkpoint_copy(job, level, e),
    }
    if not job.on_gpu:
        stage.host = host | encoder | head | work
        return stage
    offloaded = encoder.pop("moments") if job.cfg.engine.name == "zero3_offload" else 0.0
    stage.host = host | ({"moments": offloaded} if offloaded else {})
    stage.device = {"CUDA context": _CUDA_CONTEXT} | encoder | head | work
    return stage


def _encoder_parts(job: Job, e: EncoderCosts) -> dict[str, float]:
    """Weights, gradients, moments and buffers of the encoder under its engine."""
    whole, trained, ranks, name = _FLOAT * e.parameters, _FLOAT * e.trained_parameters, job.ranks, job.cfg.engine.name
    best = whole if job.cfg.matcher.validation_fraction else 0
    if name in ("cpu", "ddp"):
        # DDP copies gradients into buckets of its own, once.
        buffers = trained if ranks > 1 else 0
        return _parts(whole, trained, _MOMENTS * trained, buffers + best)
    cut = trained / ranks
    bucket = float(min(_BUCKET * _FLOAT, trained))
    if name in ("zero1", "zero2"):
        # Weights lie in one flat tensor; beside it an fp32 part with its gradient, a bucket, and what is reduced.
        gradients = 2 * trained if name == "zero1" else cut + bucket
        return _parts(whole, gradients, _MOMENTS * cut, trained + bucket + 2 * cut + best + _left_by_zero(job, e))
    layer = (e.parameters - e.embedding_parameters) / max(e.layers, 1)
    live = _FLOAT * (e.embedding_parameters + 2 * layer)  # gathered for their forward and backward
    if name == "fsdp2":
        return _parts(whole / ranks, cut, _MOMENTS * cut, live + best)
    # ZeRO-3 keeps parameters, their fp32 part, and gathers ahead up to a bucket.
    gathered = min(live + bucket, float(whole))
    kept = gathered + bucket + best + _left_by_zero(job, e)
    return _parts(2 * whole / ranks, cut + bucket, _MOMENTS * cut, kept)


def _left_by_zero(job: Job, e: EncoderCosts) -> float:
    """What DeepSpeed leaves in a CPU process: the whole encoder that a level ends with, and buffers of levels before.

    Fitted to MiniLM under zero1 and zero3 on four ranks, see benchmarks/plan_memory.md.
    """
    if job.on_gpu:
        return 0.0
    before = len(job.match_levels) - 1
    return _FLOAT * e.trained_parameters * (1.0 + before * _LEFT_BY_ZERO[job.cfg.engine.name])


def _parts(weights: float, gradients: float, moments: float, buffers: float) -> dict[str, float]:
    return {"encoder weights": weights, "gradients": gradients, "moments": moments, "engine buffers": buffers}


def _head_parts(job: Job, level: MatchLevel, e: EncoderCosts) -> dict[str, float]:
    """Rows, gradients and moments of the largest shard; lazy Adam counts steps a row, plain descent has no moments."""
    row = (e.hidden + 1) * _FLOAT
    size = float(level.rows * row * (2 + (0 if job.cfg.optimizer.head == "sgd" else _MOMENTS)))
    if job.cfg.optimizer.head == "sparse_adam":
        size += 2 * _FLOAT * level.rows
    if job.cfg.matcher.validation_fraction:
        size += level.rows * row
    return {"head and its moments": size}


def _work_parts(job: Job, level: MatchLevel, e: EncoderCosts) -> dict[str, float]:
    """What lives within a micro-step."""
    tokens = job.micro * job.length
    kept = e.activation_bytes(
        job.micro,
        job.length,
        job.precision,
        fused=job.on_gpu,
        checkpointing=job.cfg.encoder.gradient_checkpointing,
    )
    # Backward holds the gradient of the widest layer and of attention's probabilities beside what is kept.
    wide = 2.0 * tokens * e.intermediate * _FLOAT
    if not job.on_gpu and e.dropout:
        wide += 2.0 * job.micro * e.heads * job.length**2 * _FLOAT
    gathered = 3.0 * job.gathered * e.hidden * _FLOAT
    scored = 2.0 * job.gathered * level.rows * _FLOAT if level.dense else 0.0
    pairs = float(level.pairs * _PAIR_BYTES) + 2.0 * job.gathered * level.candidates * 20
    passing = _EMBED_TOKENS * (2 * e.intermediate + 6 * e.hidden) * _FLOAT
    return {
        "activations": kept + wide,
        "embedding pass": max(passing - kept - wide, 0.0),
        "gathered embeddings": gathered,
        "scores": scored,
        "candidates": pairs,
    }


def _checkpoint_copy(job: Job, level: MatchLevel, e: EncoderCosts) -> float:
    """The host copy that is written while training goes on: each rank's share of all state."""
    steps = job.cfg.checkpoint.every_steps
    if not steps or steps >= level.steps:
        return 0.0
    best = 2 if job.cfg.matcher.validation_fraction else 1
    encoder = _FLOAT * (best * e.parameters + _MOMENTS * e.trained_parameters) / job.ranks
    return encoder + level.rows * (e.hidden + 1) * _FLOAT * (best + _MOMENTS)
