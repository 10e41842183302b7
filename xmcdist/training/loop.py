"""Fine-tuning on one level of the tree: read from top to bottom.

A step: every rank encodes its documents; the embeddings travel to all ranks; each scores
only the candidates whose rows it owns; the gradient of the embeddings is summed back to the
rank of the document; the encoder is updated by its engine, each head row by its owner.

The random state is set anew at each step from (seed, level, step, rank), so a run that goes
on from a checkpoint draws what an undisturbed run would have drawn.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmcdist.config.errors import UserError
from xmcdist.config.schema import MatcherConfig, OptimizerConfig, ScheduleConfig
from xmcdist.data.batches import GlobalBatches, local, sizes
from xmcdist.data.tokens import TokenShards
from xmcdist.encoders.hf import Encoder
from xmcdist.matchers.candidates import Candidates, CandidateSource
from xmcdist.matchers.head import ShardedHead
from xmcdist.matchers.losses import ragged_loss
from xmcdist.parallel.collectives import all_gather_embeddings, all_reduce
from xmcdist.schedules.lr import lr_factor
from xmcdist.training.engine import Engine
from xmcdist.training.optim import encoder_optimizer, head_optimizer, load_moments, moments, set_lr

__all__ = ["DivergedError", "LevelHooks", "LevelResult", "LevelTask", "train_level"]

_BEST_HEAD = "best.head."


@dataclass(frozen=True)
class LevelTask:
    """What one level is trained on and how."""

    level: int
    steps: int
    seed: int
    tokens: TokenShards
    batches: GlobalBatches
    document_ids: NDArray[np.int64]  # batches count documents of the training part; these are their row numbers
    candidates: CandidateSource
    matcher: MatcherConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    log_every: int = 20
    save_every: int = 0  # steps; 0: never


class DivergedError(UserError):
    """Training gave a loss or gradient that is no finite number."""


class LevelHooks(Protocol):
    """What the pipeline does with a level's state; every rank calls each hook at the same step."""

    def log(self, values: dict[str, Any]) -> None: ...

    def save(self, step: int, state: dict[str, Any]) -> None: ...

    def evaluate(self, encoder: Encoder, head: ShardedHead) -> float | None: ...


@dataclass
class LevelResult:
    """How a level went."""

    steps: int
    losses: list[float] = field(default_factory=list)
    stopped_early: bool = False


@dataclass
class _State:
    """All that changes while a level trains."""

    encoder: Encoder  # unwrapped
    head: ShardedHead
    encoder_optimizer: torch.optim.Optimizer
    head_optimizer: torch.optim.Optimizer
    step: int = 0
    best: float = -math.inf
    best_step: int = 0
    bad: int = 0  # evaluations since the best
    best_weights: dict[str, Tensor] = field(default_factory=dict)  # "encoder.<name>", "head.weight", "head.bias"

    def capture(self) -> dict[str, Any]:
        head = {"weight": self.head.weight.data, "bias": self.head.bias.data}
        head_moments = moments(self.head_optimizer, self.head)
        steps = {k: float(v) for k, v in head_moments.items() if k.endswith(".step")}
        head |= {k: v for k, v in head_moments.items() if not k.endswith(".step")}
        best = {f"best.{k}": v for k, v in self.best_weights.items()}
        best_encoder = {k: v for k, v in best.items() if not k.startswith(_BEST_HEAD)}
        return {
            "encoder": dict(self.encoder.state_dict()) | best_encoder,
            "optimizer": moments(self.encoder_optimizer, self.encoder),
            "head": head | {k: v for k, v in best.items() if k.startswith(_BEST_HEAD)},
            "extra": {
                "best": self.best if math.isfinite(self.best) else None,
                "best_step": self.best_step,
                "bad": self.bad,
                "head_steps": steps,
            },
        }

    def restore(self, saved: dict[str, Any]) -> None:
        both = saved["encoder"] | saved["head"]
        self.best_weights = {k.removeprefix("best."): v for k, v in both.items() if k.startswith("best.")}
        self.encoder.load_state_dict({k: v for k, v in saved["encoder"].items() if not k.startswith("best.")})
        load_moments(self.encoder_optimizer, self.encoder, saved["optimizer"])
        head = {k: v for k, v in saved["head"].items() if not k.startswith("best.")}
        extra = saved["extra"]
        self.head.load_rows(head.pop("weight"), head.pop("bias"))
        head |= {k: torch.tensor([v]) for k, v in extra["head_steps"].items()}
        load_moments(self.head_optimizer, self.head, head)
        self.step, self.best = int(saved["step"]), -math.inf if extra["best"] is None else float(extra["best"])
        self.best_step, self.bad = int(extra["best_step"]), int(extra["bad"])


def train_level(
    engine: Engine,
    encoder: Encoder,
    head: ShardedHead,
    task: LevelTask,
    hooks: LevelHooks,
    resume: dict[str, Any] | None = None,
) -> LevelResult:
    """Fine-tune encoder and head on one level; both are changed in place; collective.

    Args:
        encoder: plain module: token ids and mask to ``[b, d]``.
        head: this rank's rows of the level.
        task: data, candidates, settings; ``steps`` optimizer steps are taken, no fewer and
            no more, unless validation stops them earlier.
        hooks: log, save, evaluate.
        resume: what a ``save`` hook was given, with head rows as this rank now owns them.

    Raises:
        DivergedError: the loss or the gradient is not finite; names level and step.  All ranks
            raise it, and no step is taken with it.
    """
    wrapped = engine.prepare(encoder)
    head.to(engine.device)
    state = _State(encoder, head, encoder_optimizer(encoder, task.optimizer), head_optimizer(head, task.optimizer))
    if resume is not None:
        state.restore(resume)
    result = LevelResult(steps=state.step)
    window = _Window(state.step)
    wrapped.train()
    while state.step < task.steps:
        loss, norm = _step(engine, wrapped, state, task, window)
        state.step += 1
        result.losses.append(loss)
        if state.step % task.log_every == 0 or state.step == task.steps:
            hooks.log(window.flush(task, state, loss, norm))
        if task.matcher.validation_fraction and (state.step % task.matcher.eval_every == 0 or state.step == task.steps):
            value = hooks.evaluate(state.encoder, head)
            wrapped.train()
            if value is not None and value > state.best:
                state.best, state.best_step, state.bad = value, state.step, 0
                state.best_weights = {k: v.detach().clone() for k, v in _weights(state).items()}
            elif value is not None:
                state.bad += 1
            if state.bad >= task.matcher.patience:
                result.stopped_early = True
                break
        if task.save_every and state.step % task.save_every == 0 and state.step < task.steps:
            hooks.save(state.step, state.capture())
    if state.best_weights:
        _put_weights(state, state.best_weights)
    result.steps = state.step
    engine.release()
    return result


def _step(engine: Engine, wrapped: nn.Module, state: _State, task: LevelTask, window: _Window) -> tuple[float, float]:
    """One optimizer step; returns the loss over the global batch and the gradient norm, equal on all ranks."""
    world, device = engine.world, engine.device
    torch.manual_seed(_seed(task.seed, task.level, state.step, world.rank))
    factor = lr_factor(task.schedule, state.step, task.steps)
    head_lr = task.optimizer.lr if task.optimizer.head_lr is None else task.optimizer.head_lr
    set_lr(state.encoder_optimizer, task.optimizer.lr * factor)
    set_lr(state.head_optimizer, head_lr * factor)
    started = time.perf_counter()
    ids = task.document_ids[task.batches.batch(state.step)]
    per_micro = engine.cfg.micro_batch * world.world_size
    starts = range(0, len(ids), per_micro)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for start in starts:
        docs = ids[start : start + per_micro]
        mine = local(docs, world.rank, world.world_size)
        shard = state.head.shard
        candidates = task.candidates.of(docs, state.step).restrict(shard.start, shard.stop)
        window.add(len(docs), int(candidates.counts.sum()), time.perf_counter() - started)
        with engine.accumulate(wrapped, last=start == starts[-1]):
            with engine.autocast():
                embedding = _encode(wrapped, task.tokens, mine, device)
            everyone = all_gather_embeddings(embedding, sizes(len(docs), world.world_size))
            # The loss is a mean over the global batch, of which this micro-step holds a part.
            loss = _loss(state.head, everyone, candidates, task.matcher, len(ids))
            engine.backward(loss)
        loss_sum += loss.detach().double()
        started = time.perf_counter()
    value = float(all_reduce(loss_sum))
    encoder_params = [p for p in state.encoder.parameters() if p.requires_grad]
    norm = engine.clip(encoder_params, state.head.parameters(), task.optimizer.clip)
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise DivergedError(
            f"level {task.level}, step {state.step}: the loss is {value} and its gradient's norm {norm}; lower "
            "optimizer.lr or optimizer.head_lr, or set engine.precision=fp32"
        )
    for optimizer in (state.encoder_optimizer, state.head_optimizer):
        optimizer.step()
        optimizer.zero_grad()
    return value, norm


def _encode(wrapped: nn.Module, tokens: TokenShards, mine: NDArray[np.int64], device: torch.device) -> Tensor:
    """Embeddings of this rank's documents ``[n, d]``; a rank without any still takes part in backward."""
    some = mine if mine.size else np.zeros(1, dtype=np.int64)
    ids, mask = tokens.batch(some)
    embedding: Tensor = wrapped(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)).float()
    # Data-parallel backward waits for every rank: an empty share is a row of weight zero.
    return embedding if mine.size else embedding[:0] + 0.0 * embedding.sum()


def _loss(head: ShardedHead, embedding: Tensor, candidates: Candidates, cfg: MatcherConfig, documents: int) -> Tensor:
    def tensor(a: NDArray[Any]) -> Tensor:
        return torch.from_numpy(a).to(embedding.device)

    doc, node, value = tensor(candidates.doc()), tensor(candidates.node), tensor(candidates.value)
    scores = head(embedding, doc, node, cfg.scoring)
    loss = ragged_loss(cfg.loss, scores, value, doc, tensor(candidates.counts), documents)
    # A rank without a candidate has no path to the encoder otherwise.
    return loss + 0.0 * embedding.sum()


def _weights(state: _State) -> dict[str, Tensor]:
    both = (("encoder.", state.encoder), ("head.", state.head))
    return {prefix + name: p for prefix, module in both for name, p in module.state_dict().items()}


def _put_weights(state: _State, weights: dict[str, Tensor]) -> None:
    for prefix, module in (("encoder.", state.encoder), ("head.", state.head)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Window:
    """What is averaged between two log lines."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        self.first, self.started = step, time.perf_counter()
        self.documents, self.active, self.waiting = 0, 0, 0.0

    def add(self, documents: int, active: int, waiting: float) -> None:
        self.documents += documents
        self.active += active
        self.waiting += waiting

    def flush(self, task: LevelTask, state: _State, loss: float, norm: float) -> dict[str, Any]:
        took = max(time.perf_counter() - self.started, 1e-9)
        row = {
            "level": task.level,
            "step": state.step,
            "total": task.steps,
            "loss": loss,
            "lr": state.encoder_optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "docs_per_s": self.documents / took,
            "active_candidates": self.active / max(self.documents, 1),
            "data_wait_percent": 100 * self.waiting / took,
            "eta_s": (task.steps - state.step) * took / max(state.step - self.first, 1),
        }
        self.restart(state.step)
        return row
