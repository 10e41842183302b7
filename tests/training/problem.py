"""A small level, and a second trainer for it that shares no code: one process, fp64, plain loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from xmcdist.config.schema import EncoderConfig, EngineConfig, MatcherConfig, OptimizerConfig, ScheduleConfig
from xmcdist.data.batches import GlobalBatches
from xmcdist.encoders.embed import TokenRows
from xmcdist.encoders.hf import Encoder, load_encoder
from xmcdist.matchers.candidates import CandidateSource
from xmcdist.matchers.head import ShardedHead
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.parallel.shards import LabelShard
from xmcdist.training.engine import Engine, open_engine
from xmcdist.training.loop import LevelTask
from xmcdist.training.nonfinite import NonFinite

DOCS, NODES = 25, 11  # neither divides by 2 or 3; the last of four batches of 8 has one document
CHILD_PTR = np.array([0, 2, 5, 5, 11], dtype=np.int64)
SEED, LEVEL = 3, 2


@dataclass(frozen=True)
class Setting:
    """What varies between the runs that must agree."""

    micro_batch: int = 8
    head: str = "adamw"
    scoring: str = "auto"
    loss: str = "weighted_squared_hinge"
    dropout: float = 0.0
    steps: int = 5
    clip: float = 0.5
    weight_decay: float = 0.01
    lr: float = 2e-3
    eps: float = 1e-4  # large: parameters whose gradient is mere rounding (key biases) stay where they are
    validation_fraction: float = 0.0
    eval_every: int = 2
    patience: int = 2
    save_every: int = 0
    nodes: int = NODES
    precision: str = "fp32"
    gradient_checkpointing: bool = False


@dataclass
class Hooks:
    """Remembers what the loop reports; evaluation plays back given values."""

    values: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    saved: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    skipped: list[tuple[NonFinite, bool]] = field(default_factory=list)

    def log(self, values: dict[str, Any]) -> None:
        self.rows.append(values)
        self.seeds.append(torch.initial_seed())

    def save(self, step: int, state: dict[str, Any]) -> None:
        copy = {
            part: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
            for part, values in state.items()
        }
        self.saved.append((step, copy))

    def left_out(self, found: NonFinite, last: bool) -> str | None:
        self.skipped.append((found, last))
        return "some file"

    def evaluate(self, encoder: Encoder, head: ShardedHead) -> float:
        encoder.eval()  # as an evaluation leaves it at worst
        return self.values.pop(0)


def tokens() -> TokenRows:
    rng = np.random.default_rng(0)
    return TokenRows([[2, *rng.integers(5, 300, rng.integers(2, 12)).tolist(), 3] for _ in range(DOCS)], pad_id=0)


def candidates(nodes: int = NODES) -> CandidateSource:
    rng = np.random.default_rng(1)
    parents = rng.random((DOCS, 4)) < 0.5
    counts = rng.integers(1, 4, (DOCS, nodes)) * (rng.random((DOCS, nodes)) < 0.2)
    counts[7], parents[7] = 0, False  # a document without a candidate
    M, Y = sp.csr_matrix(parents.astype(np.float32)), sp.csr_matrix(counts.astype(np.float32))
    child_ptr = CHILD_PTR if nodes == NODES else np.linspace(0, nodes, 5).astype(np.int64)
    return CandidateSource(M, Y, child_ptr, max_active=6, seed=SEED, level=LEVEL)


def encoder(setting: Setting) -> Encoder:
    cfg = EncoderConfig(
        preset="tiny",
        max_length=16,
        dropout=setting.dropout,
        gradient_checkpointing=setting.gradient_checkpointing,
    )
    return load_encoder(cfg, SEED)


def task(setting: Setting, what: TokenRows | None = None, source: CandidateSource | None = None) -> LevelTask:
    made: Any = what or tokens()
    return LevelTask(
        level=LEVEL,
        steps=setting.steps,
        seed=SEED,
        tokens=made,
        batches=GlobalBatches(made.lengths, 8, SEED),
        document_ids=np.arange(len(made.lengths)),
        candidates=source or candidates(setting.nodes),
        matcher=MatcherConfig(
            loss=setting.loss,
            scoring=setting.scoring,
            validation_fraction=setting.validation_fraction,
            eval_every=setting.eval_every,
            patience=setting.patience,
        ),
        optimizer=OptimizerConfig(
            lr=setting.lr,
            head_lr=2.5 * setting.lr,
            clip=setting.clip,
            eps=setting.eps,
            head=setting.head,
            weight_decay=setting.weight_decay,
        ),
        schedule=ScheduleConfig(name="linear", warmup=2),
        log_every=1,
        save_every=setting.save_every,
    )


def engine(setting: Setting, rank: int = 0, world_size: int = 1, shards: int | None = None, **more: Any) -> Engine:
    """An engine on the CPU; ``more``: further fields of `EngineConfig`, such as its name."""
    world = World(rank, world_size, rank, world_size, "cpu")
    cfg = EngineConfig(global_batch=8, micro_batch=setting.micro_batch, precision=setting.precision, **more)
    return open_engine(cfg, Mesh.build(world, shards))


def head(rank: int = 0, world_size: int = 1, nodes: int = NODES, dim: int = 64) -> ShardedHead:
    return ShardedHead(LabelShard(rank, world_size, nodes), dim, seed=SEED, level=LEVEL)


@dataclass
class Reference:
    """What the plain trainer got: losses, gradients before clipping, norms, final weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    first_gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    encoder: dict[str, torch.Tensor] = field(default_factory=dict)
    weight: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    bias: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


def reference(setting: Setting, left_out: frozenset[int] = frozenset()) -> Reference:
    """Train without shards, ranks, micro-batches or float32; some steps are not taken."""
    model, whole, words = encoder(setting).double().train(), head(nodes=setting.nodes), tokens()
    W, b = (torch.nn.Parameter(p.detach().double().clone()) for p in (whole.weight, whole.bias))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": setting.weight_decay},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-4)
    rows = _Rows([W, b], setting)
    out, batches, source = Reference(), GlobalBatches(words.lengths, 8, SEED), candidates(setting.nodes)
    for step in range(setting.steps):
        if step in left_out:
            out.losses.append(math.nan)
            out.norms.append(math.nan)
            continue
        factor = [0.0, 0.5][step] if step < 2 else 1 - (step - 2) / (setting.steps - 2)
        ids = batches.batch(step)
        active = source.of(ids, step)
        loss = torch.zeros((), dtype=torch.float64)
        for place, doc in enumerate(ids.tolist()):
            x, mask = (torch.from_numpy(a) for a in words.batch([doc]))
            e = model(x, mask)[0]
            pairs = range(int(active.doc_ptr[place]), int(active.doc_ptr[place + 1]))
            for k in pairs:
                node, count = int(active.node[k]), float(active.value[k])
                s, y = e @ W[node] + b[node], 1.0 if count else -1.0
                if setting.loss == "bce":
                    one = torch.log1p(torch.exp(-y * s))
                else:
                    one = max(count, 1.0) * torch.clamp(1 - y * s, min=0) ** 2
                loss = loss + one / len(pairs) / len(ids)
        for p in (*trained.values(), W, b):
            p.grad = None
        loss.backward()
        if step == 0:
            out.first_gradients = {n: p.grad.clone() for n, p in trained.items()}
            out.first_gradients |= {"weight": W.grad.clone(), "bias": b.grad.clone()}
        out.losses.append(float(loss.detach()))
        norm = torch.nn.utils.clip_grad_norm_([*trained.values(), W, b], setting.clip or math.inf)
        out.norms.append(float(norm))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * factor
        optimizer.step()
        rows.step(5e-3 * factor)
    out.encoder = {n: p.detach() for n, p in model.state_dict().items()}
    out.weight, out.bias = W.detach(), b.detach()
    return out


class _Rows:
    """AdamW of the head, or Adam of one row after the other that moves only rows with a gradient."""

    def __init__(self, params: list[torch.nn.Parameter], setting: Setting) -> None:
        self.params, self.setting = params, setting
        self.dense = torch.optim.AdamW(params, eps=1e-4, weight_decay=setting.weight_decay)
        self.m = [torch.zeros_like(p.data) for p in params]
        self.v = [torch.zeros_like(p.data) for p in params]
        self.t = [[0] * len(p) for p in params]

    def step(self, lr: float) -> None:
        if self.setting.head == "adamw":
            self.dense.param_groups[0]["lr"] = lr
            self.dense.step()
            return
        for p, m, v, t in zip(self.params, self.m, self.v, self.t, strict=True):
            for i in range(len(p)):
                g = p.grad[i]
                if not bool((g != 0).any()):
                    continue
                t[i] += 1
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g * g
                up = (m[i] / (1 - 0.9 ** t[i])) / ((v[i] / (1 - 0.999 ** t[i])).sqrt() + 1e-4)
                p.data[i] -= lr * up
