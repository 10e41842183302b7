"""Fine-tuning on one level of the tree: read from top to bottom.

A step: every rank encodes its documents; the embeddings travel to the ranks of its replica;
each scores only the candidates whose rows it owns; the gradient of the embeddings is summed
back to the rank of the document; the encoder is updated by its engine, which averages over
all ranks, and each head row by its owner, after a sum over replicas where there are several.

The random state is set anew at each step from (seed, level, step, rank), so a run that goes
on from a checkpoint draws what an undisturbed run would have drawn.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xmcdist.config.errors import UserError
from xmcdist.config.schema import MatcherConfig, OptimizerConfig, ScheduleConfig
from xmcdist.data.batches import GlobalBatches, local
from xmcdist.data.tokens import TokenShards
from xmcdist.encoders.hf import Encoder
from xmcdist.matchers.candidates import Candidates, CandidateSource
from xmcdist.matchers.head import ShardedHead
from xmcdist.matchers.losses import ragged_loss
from xmcdist.parallel import watch
from xmcdist.parallel.collectives import all_gather_embeddings, all_reduce
from xmcdist.schedules.level import LevelSchedule
from xmcdist.training import preemption
from xmcdist.training.ceiling import head_ceiling
from xmcdist.training.engine import Engine
from xmcdist.training.meters import Window
from xmcdist.training.nonfinite import DivergedError, NonFinite, Skips, Trace, describe, diverged
from xmcdist.training.optim import head_optimizer, load_moments, moments, set_lr

__all__ = ["DivergedError", "LevelHooks", "LevelResult", "LevelTask", "train_level"]

_BEST = "best."


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
    save_every: int = 0  # steps; 0: only where a signal asks for it
    folder: Path | None = None  # where its candidates lie


class LevelHooks(Protocol):
    """What the pipeline does with a level's state; every rank calls each hook at the same step.

    ``save`` gets ``encoder`` and ``optimizer`` by parameter name (whole and equal on all ranks,
    or DTensors over all ranks), ``head``: this rank's rows by name, and ``extra``: values for
    JSON.  They may be the live tensors: who keeps them beyond the call copies them.
    """

    def log(self, values: dict[str, Any]) -> None: ...

    def save(self, step: int, state: dict[str, Any]) -> None: ...

    def evaluate(self, encoder: Encoder, head: ShardedHead) -> float | None: ...

    def left_out(self, found: NonFinite, last: bool) -> str | None:
        """A step that was not taken; ``last``: training ends with it.  May return the file that tells of it."""


@dataclass
class LevelResult:
    """How a level went."""

    steps: int
    encoder: Encoder  # trained, whole on every rank, whatever the engine
    losses: list[float]
    stopped_early: bool


@dataclass
class _State:
    """All that changes while a level trains, and the bound that was measured when it began."""

    engine: Engine
    head: ShardedHead
    head_optimizer: torch.optim.Optimizer
    batches: GlobalBatches
    schedule: LevelSchedule
    max_head_lr: float = math.inf
    step: int = 0
    lr: float = 0.0
    head_lr: float = 0.0
    best: float = -math.inf
    best_step: int = 0
    bad: int = 0  # evaluations since the best
    skips: Skips = field(default_factory=Skips)
    asked: str | None = None  # the signal that asked some rank to end
    best_encoder: dict[str, Tensor] = field(default_factory=dict)
    best_head: dict[str, Tensor] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Documents taken so far: the position in the data."""
        epochs, at = divmod(self.step, self.batches.steps_per_epoch)
        return epochs * self.batches.num_docs + at * self.batches.global_batch

    def capture(self) -> dict[str, Any]:
        state = self.engine.state()
        head_moments = moments(self.head_optimizer, self.head)
        steps = {k: float(v) for k, v in head_moments.items() if k.endswith(".step")}
        rows = {"weight": self.head.weight.data, "bias": self.head.bias.data}
        rows |= {k: v for k, v in head_moments.items() if not k.endswith(".step")}
        return {
            "encoder": state["encoder"] | {_BEST + k: v for k, v in self.best_encoder.items()},
            "optimizer": state["optimizer"],
            "head": rows | {_BEST + k: v for k, v in self.best_head.items()},
            "extra": {
                "samples": self.samples,
                "best": self.best if math.isfinite(self.best) else None,
                "best_step": self.best_step,
                "bad": self.bad,
                "skipped": self.skips.total,
                "skipped_in_a_row": self.skips.in_a_row,
                "head_steps": steps,
                "schedule": self.schedule.state(),
                "max_head_lr": self.max_head_lr if math.isfinite(self.max_head_lr) else None,
            },
        }

    def restore(self, saved: dict[str, Any]) -> None:
        encoder, self.best_encoder = _split_best(saved["encoder"])
        rows, self.best_head = _split_best(saved["head"])
        extra = saved["extra"]
        self.engine.load({"encoder": encoder, "optimizer": saved["optimizer"]})
        self.head.load_rows(rows.pop("weight").cpu(), rows.pop("bias").cpu())
        rows |= {k: torch.tensor([v]) for k, v in extra["head_steps"].items()}
        load_moments(self.head_optimizer, self.head, rows)
        self.step, self.best = int(saved["step"]), -math.inf if extra["best"] is None else float(extra["best"])
        self.best_step, self.bad = int(extra["best_step"]), int(extra["bad"])
        self.skips = Skips(int(extra.get("skipped", 0)), int(extra.get("skipped_in_a_row", 0)))
        self.schedule.load(extra["schedule"])
        self.max_head_lr = math.inf if extra["max_head_lr"] is None else float(extra["max_head_lr"])
        if extra["samples"] != self.samples:
            raise UserError(
                f"the checkpoint at step {self.step} has seen {extra['samples']} documents, where this run would have "
                f"seen {self.samples}: engine.global_batch or the data have changed; use another run_dir"
            )

    def keep_best(self, value: float) -> None:
        self.best, self.best_step, self.bad = value, self.step, 0
        self.best_encoder = {k: v.detach().clone() for k, v in self.engine.weights().items()}
        self.best_head = {k: v.detach().clone() for k, v in self.head.state_dict().items()}

    def put_best_back(self) -> None:
        if self.best_encoder:
            self.engine.load_weights(self.best_encoder)
            self.head.load_state_dict(self.best_head)


def _split_best(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The current ones and the best ones, without their prefix."""
    best = {k.removeprefix(_BEST): v for k, v in tensors.items() if k.startswith(_BEST)}
    return {k: v for k, v in tensors.items() if not k.startswith(_BEST)}, best


def train_level(
    engine: Engine,
    encoder: Encoder,
    head: ShardedHead,
    task: LevelTask,
    hooks: LevelHooks,
    resume: dict[str, Any] | None = None,
) -> LevelResult:
    """Fine-tune encoder and head on one level; collective.

    Args:
        encoder: equal on every rank; it is the engine's from here on: the trained one is in
            the result, and may be another object.
        head: this rank's rows of the level (``engine.mesh.label_shard``), changed in place.
        task: data, candidates, settings; ``steps`` optimizer steps are taken, no fewer and
            no more, unless validation stops them earlier.
        hooks: log, save, evaluate.
        resume: what a ``save`` hook was given and the ``step``, with head rows as this rank
            now owns them; from any engine and number of ranks.

    A step whose loss or gradient is not finite is left out: it counts as a step of the schedule,
    which is not told its loss, and data go on behind it.

    Raises:
        DivergedError: too many steps, or too many in a row, could not be taken; on all ranks.
        Preempted: a signal asked one of them to end; a checkpoint has been handed to ``save``.
    """
    wrapped = engine.prepare(encoder, task.optimizer)
    head.to(engine.device)
    schedule = LevelSchedule(task.schedule, task.steps)
    state = _State(engine, head, head_optimizer(head, task.optimizer), task.batches, schedule)
    if resume is None:
        state.max_head_lr = _max_head_lr(engine, head, task)
    else:
        state.restore(resume)
    losses: list[float] = []
    window = Window(state.step)
    wrapped.train()
    preemption.where(f"match-{task.level}", f"this step of level {task.level} is done and saved")
    last: tuple[float, float] | None = None  # loss and norm of the last step that was taken
    while state.step < task.steps and state.bad < task.matcher.patience:
        loss, norm, taken = _step(engine, wrapped, state, task, hooks, window)
        state.step += 1
        losses.append(loss)
        last = (loss, norm) if taken else last
        if taken:
            schedule.trained(state.step - 1, loss)
        if last is not None and (state.step % task.log_every == 0 or state.step == task.steps):
            hooks.log(
                window.flush(
                    {"level": task.level, "step": state.step, "total": task.steps}
                    | {"loss": last[0], "lr": state.lr, "head_lr": state.head_lr, "grad_norm": last[1]}
                    | {"skipped_steps": state.skips.total}
                    | ({"max_head_lr": state.max_head_lr} if math.isfinite(state.max_head_lr) else {})
                )
            )
        if task.matcher.validation_fraction and (state.step % task.matcher.eval_every == 0 or state.step == task.steps):
            with window.apart():
                value = hooks.evaluate(engine.plain(), head)
            wrapped.train()
            if value is not None:
                schedule.evaluated(state.step, value)
            if value is not None and value > state.best:
                state.keep_best(value)
            elif value is not None:
                state.bad += 1
        stopped = state.step == task.steps or state.bad >= task.matcher.patience
        if state.asked or (task.save_every and state.step % task.save_every == 0 and not stopped):
            hooks.save(state.step, state.capture())
        if state.asked:
            raise preemption.Preempted(state.asked, f"match-{task.level}", state.step)
    preemption.where(f"match-{task.level}", f"stage match-{task.level} is committed")
    state.put_best_back()
    result = LevelResult(state.step, engine.plain(), losses, stopped_early=state.bad >= task.matcher.patience)
    engine.release()
    return result


def _max_head_lr(engine: Engine, head: ShardedHead, task: LevelTask) -> float:
    """The upper bound of the head's rate in this level; collective."""
    limit = task.schedule.max_head_lr
    if limit != "auto":
        return math.inf if limit is None else float(limit)
    encoder = engine.plain()
    return head_ceiling(
        encoder,
        head,
        task.tokens,
        task.document_ids,
        task.candidates,
        task.matcher.loss,
        engine.cfg.global_batch,
        engine.world,
        engine.cfg.precision,
    ).rate


def _step(
    engine: Engine, wrapped: nn.Module, state: _State, task: LevelTask, hooks: LevelHooks, window: Window
) -> tuple[float, float, bool]:
    """One optimizer step: the loss over the global batch, the gradient's norm, whether it was taken; alike on all."""
    torch.manual_seed(_seed(task.seed, task.level, state.step, engine.world.rank))
    factor = state.schedule.factor(state.step)
    head_lr = task.optimizer.lr if task.optimizer.head_lr is None else task.optimizer.head_lr
    state.lr, state.head_lr = task.optimizer.lr * factor, min(head_lr * factor, state.max_head_lr)
    set_lr(state.head_optimizer, state.head_lr)
    ids = task.document_ids[task.batches.batch(state.step)]
    per_micro = engine.cfg.micro_batch * engine.world.world_size
    starts = range(0, len(ids), per_micro)
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    trace = Trace()
    for start in starts:
        with engine.accumulate(last=start == starts[-1]):
            loss = _micro_loss(engine, wrapped, state, task, window, trace, ids[start : start + per_micro], len(ids))
            engine.backward(loss)
        loss_sum += loss.detach().double()
    asked = torch.tensor(preemption.counts(), dtype=torch.float64).to(engine.device)
    value, *asked_ranks = all_reduce(torch.cat([loss_sum.reshape(1), asked])).tolist()
    state.asked = preemption.name_of(asked_ranks)
    if engine.mesh.replicas > 1:  # each replica has seen its own documents only
        for p in state.head.parameters():
            if p.grad is None:
                raise AssertionError("a head without a gradient")
            p.grad = all_reduce(p.grad, "sum", engine.mesh.replica_group)
    norm = engine.clip(state.head.parameters(), task.optimizer.clip)
    taken = math.isfinite(value) and math.isfinite(norm)
    if taken:
        engine.step(state.lr)
        state.head_optimizer.step()
        state.skips.taken()
    else:
        _leave_out(engine, state, task, hooks, trace, value, norm)
    state.head_optimizer.zero_grad()
    return value, norm, taken


def _leave_out(
    engine: Engine, state: _State, task: LevelTask, hooks: LevelHooks, trace: Trace, loss: float, norm: float
) -> None:
    """Take no step with this gradient, on any rank; collective.

    Raises:
        DivergedError: it was one too many.
    """
    found = describe(trace, engine, state.head, level=task.level, step=state.step, loss=loss, norm=norm)
    engine.skip()
    why = state.skips.left_out(task.optimizer.max_skipped_steps)
    place = hooks.left_out(found, last=bool(why))
    if why:
        raise diverged(found, why, place)


def _micro_loss(
    engine: Engine,
    wrapped: nn.Module,
    state: _State,
    task: LevelTask,
    window: Window,
    trace: Trace,
    docs: NDArray[np.int64],
    batch: int,
) -> Tensor:
    """This rank's part of the loss of some documents of the global batch; collective.

    Args:
        docs: of all ranks, which part them in rank order.
        batch: documents of the whole optimizer step: the loss is a mean over them.
    """
    started = time.perf_counter()
    mesh, world, shard = engine.mesh, engine.world, state.head.shard
    mine = local(docs, world.rank, world.world_size)
    theirs = docs[slice(*mesh.replica_part(len(docs)))]
    counts = mesh.part_sizes(len(docs))
    # A rank without a document reads one all the same: backward of the encoder waits for every rank.
    some = mine if mine.size else np.zeros(1, dtype=np.int64)
    what = f"level {task.level}, step {state.step}"
    with watch.reading(what, lambda: _files(task, some), engine.cfg.data_timeout_s):
        candidates = task.candidates.of(theirs, state.step).restrict(shard.start, shard.stop)
        tokens, mask = task.tokens.batch(some)
    waited = time.perf_counter() - started
    window.add(len(theirs), int(candidates.counts.sum()), waited, task.tokens.lengths[docs], world.world_size)
    with engine.autocast():
        embedding = wrapped(torch.from_numpy(tokens).to(engine.device), torch.from_numpy(mask).to(engine.device))
    embedding = embedding.float()
    if not mine.size:
        embedding = embedding[:0] + 0.0 * embedding.sum()
    trace.embedded(mine, embedding)
    everyone = embedding
    if len(theirs):  # else the ranks of this replica agree that there is nothing to gather
        everyone = all_gather_embeddings(embedding, counts, mesh.shard_group, world.world_size)
    loss = _loss(state.head, everyone, candidates, task.matcher, batch)
    trace.scored(loss)
    return loss


def _files(task: LevelTask, documents: NDArray[np.int64]) -> str:
    """What a step reads of these documents, for a person."""
    names = ", ".join(map(str, task.tokens.files(documents)))
    return f"{names}, or the candidates of the level in {task.folder}" if task.folder else names


def _loss(head: ShardedHead, embedding: Tensor, candidates: Candidates, cfg: MatcherConfig, documents: int) -> Tensor:
    def tensor(a: NDArray[Any]) -> Tensor:
        return torch.from_numpy(a).to(embedding.device)

    doc, node, value = tensor(candidates.doc()), tensor(candidates.node), tensor(candidates.value)
    scores = head(embedding, doc, node, cfg.scoring)
    counts, weight = tensor(candidates.counts), tensor(candidates.weight)
    loss = ragged_loss(cfg.loss, scores, value, doc, counts, documents, weight)
    # A rank without a candidate has no path to the encoder otherwise.
    return loss + 0.0 * embedding.sum()


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
