"""Training a level on 1, 2 and 3 ranks equals one process in fp64; stopping and going on changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from tests.helpers.ranks import on_ranks
from tests.training import problem
from tests.training.problem import LEVEL, NODES, Hooks, Setting
from xmcdist.checkpoint.train_state import StateStore, load_state
from xmcdist.config.errors import UserError
from xmcdist.config.schema import EngineConfig
from xmcdist.encoders.embed import TokenRows, embed
from xmcdist.matchers.candidates import CandidateSource
from xmcdist.matchers.predict import predict_level
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.parallel.shards import LabelShard
from xmcdist.training.engine import Engine, open_engine
from xmcdist.training.loop import LevelResult, train_level

SETTINGS = {
    "accumulated": Setting(micro_batch=2, scoring="dense", clip=4.5),
    "one by one": Setting(micro_batch=1, scoring="pairs", loss="bce", steps=3, clip=0.52),
    "lazy rows": Setting(micro_batch=8, head="sparse_adam", weight_decay=0.0, clip=4.5),
}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 5e-6, 2e-6
WEIGHT_TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of few numbers are slower on several threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _spy(engine: Engine) -> dict[str, torch.Tensor]:
    """Keeps the gradients of an engine's first step, before they are clipped."""
    kept: dict[str, torch.Tensor] = {}
    clip = engine.clip

    def first(head: Any, limit: float) -> float:
        rows = list(head)
        if not kept:
            kept.update({n: p.grad.clone() for n, p in engine.encoder.named_parameters() if p.requires_grad})
            kept.update({n: p.grad.clone() for n, p in zip(("weight", "bias"), rows, strict=True)})
        return clip(rows, limit)

    engine.clip = first  # type: ignore[method-assign]
    return kept


def _worst(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).abs().max()) if got.numel() else 0.0


@on_ranks(1, 2, 3)
def test_equals_one_process_in_fp64(rank: int, world_size: int) -> None:
    shard = slice(LabelShard(rank, world_size, NODES).start, LabelShard(rank, world_size, NODES).stop)
    for name, setting in SETTINGS.items():
        want = problem.reference(setting)
        engine = problem.engine(setting, rank, world_size)
        gradients = _spy(engine)
        encoder, head, hooks = problem.encoder(setting), problem.head(rank, world_size), Hooks()
        before = {n: p.clone() for n, p in encoder.state_dict().items()}
        result = train_level(engine, encoder, head, problem.task(setting), hooks)

        assert np.allclose(result.losses, want.losses, atol=LOSS_TOLERANCE, rtol=0), name
        assert np.allclose([r["grad_norm"] for r in hooks.rows], want.norms, atol=1e-5, rtol=0), name
        assert max(want.norms) > setting.clip > min(want.norms)  # both sides of the limit
        trained = [n for n, p in encoder.named_parameters() if p.requires_grad]
        assert [*trained, "weight", "bias"] == [*gradients]
        for n, g in gradients.items():
            wanted = want.first_gradients[n]
            assert _worst(g, wanted[shard] if n in ("weight", "bias") else wanted) < GRADIENT_TOLERANCE, (name, n)
        for n, p in encoder.state_dict().items():
            assert _worst(p, want.encoder[n]) < WEIGHT_TOLERANCE, (name, n)
        assert _worst(head.weight, want.weight[shard]) < WEIGHT_TOLERANCE, name
        assert _worst(head.bias, want.bias[shard]) < WEIGHT_TOLERANCE, name

        moved = max(_worst(p, before[n]) for n, p in encoder.state_dict().items())
        assert moved > 50 * WEIGHT_TOLERANCE  # so that the tolerance says something
        assert _worst(head.weight, problem.head(rank, world_size).weight) > 50 * WEIGHT_TOLERANCE
        same = gather_objects([p.numpy().tobytes() for p in encoder.state_dict().values()])
        assert all(s == same[0] for s in same), "encoders of the ranks have drifted apart"


@on_ranks(1, 2)
def test_going_on_from_a_checkpoint_is_bit_for_bit(rank: int, world_size: int, tmp_path: Path) -> None:
    mesh = Mesh.build(World(rank, world_size, rank, world_size, "cpu"))
    for kind in ("adamw", "sparse_adam"):
        setting = Setting(micro_batch=2, dropout=0.2, steps=6, save_every=4, head=kind)

        def run(resume: dict[str, Any] | None, hooks: Hooks, setting: Setting) -> tuple[list[Any], list[float]]:
            encoder, own = problem.encoder(setting), problem.head(rank, world_size)
            engine = problem.engine(setting, rank, world_size)
            losses = train_level(engine, encoder, own, problem.task(setting), hooks, resume).losses
            return [*encoder.state_dict().values(), *own.state_dict().values()], losses

        hooks = Hooks()
        straight, losses = run(None, hooks, setting)
        seeds = gather_objects(hooks.seeds)
        assert len(set().union(*seeds)) == 6 * world_size  # every rank and step has its own dropout
        ((step, state),) = hooks.saved
        store = StateStore(tmp_path / kind, mesh, asynchronous=False)
        store.save(step=step, num_rows=NODES, **state)
        place = store.latest()
        assert place is not None
        torch.manual_seed(99)  # the random state of another process
        saved = load_state(place, mesh, encoder_like=problem.encoder(setting).state_dict())
        again, last = run(saved, Hooks(), setting)
        assert last == losses[4:]
        assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))


ACROSS = Setting(micro_batch=3, steps=6, save_every=3)


@on_ranks(2)
def _leave_on_two(rank: int, world_size: int, folder: str) -> None:
    mesh = Mesh.build(World(rank, world_size, rank, world_size, "cpu"))
    hooks = Hooks()
    engine = problem.engine(ACROSS, rank, world_size)
    train_level(engine, problem.encoder(ACROSS), problem.head(rank, world_size), problem.task(ACROSS), hooks)
    step, state = hooks.saved[0]
    StateStore(Path(folder), mesh, asynchronous=False).save(step=step, num_rows=NODES, **state)


@pytest.fixture(scope="module")
def left_by_two(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("by-two")
    _leave_on_two(world=2, folder=str(folder))
    return str(folder)


@on_ranks(1, 3)
def test_another_number_of_ranks_goes_on(rank: int, world_size: int, left_by_two: str) -> None:
    mesh = Mesh.build(World(rank, world_size, rank, world_size, "cpu"))
    place = StateStore(Path(left_by_two), mesh).latest()
    assert place is not None
    encoder, head = problem.encoder(ACROSS), problem.head(rank, world_size)
    state = load_state(place, mesh, encoder_like=encoder.state_dict())
    shard = mesh.label_shard(NODES)
    result = train_level(problem.engine(ACROSS, rank, world_size), encoder, head, problem.task(ACROSS), Hooks(), state)
    want = problem.reference(ACROSS)
    assert np.allclose(result.losses, want.losses[3:], atol=LOSS_TOLERANCE, rtol=0)
    assert max(_worst(p, want.encoder[n]) for n, p in encoder.state_dict().items()) < WEIGHT_TOLERANCE
    assert _worst(head.weight, want.weight[shard.start : shard.stop]) < WEIGHT_TOLERANCE


def _alone(setting: Setting, hooks: Hooks | None = None) -> LevelResult:
    """Train in this process."""
    task, engine = problem.task(setting), problem.engine(setting)
    return train_level(engine, problem.encoder(setting), problem.head(), task, hooks or Hooks())


def test_the_random_state_follows_step_and_level() -> None:
    setting = Setting(dropout=0.3, steps=3)
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        hooks = Hooks()
        runs.append(_alone(setting, hooks))
        assert len(set(hooks.seeds)) == 3  # another dropout at every step
    assert runs[0].losses == runs[1].losses
    plain = Setting(dropout=0.0, steps=3)
    assert _alone(plain).losses != runs[0].losses  # evaluation mode would make them equal


def test_early_stopping_puts_the_best_weights_back() -> None:
    setting = Setting(steps=20, validation_fraction=0.1, eval_every=2, patience=2, save_every=2, dropout=0.1)
    encoder, head, hooks = problem.encoder(setting), problem.head(), Hooks([0.1, 0.5, 0.4, 0.5])
    result = train_level(problem.engine(setting), encoder, head, problem.task(setting), hooks)
    assert result.stopped_early
    assert result.steps == 8
    undisturbed = _alone(Setting(steps=20, dropout=0.1)).losses
    assert result.losses == undisturbed[:8]  # an evaluation leaves no trace: dropout is on again after it
    at_best = dict(hooks.saved)[4]
    assert all(torch.equal(p, at_best["encoder"][n]) for n, p in encoder.state_dict().items())
    assert torch.equal(head.weight, at_best["head"]["weight"])

    # going on after the best: it is in the checkpoint, and so is the count of worse ones
    step, state = hooks.saved[2]
    assert step == 6
    other, own, rest = problem.encoder(setting), problem.head(), Hooks([0.5])
    with torch.no_grad():
        own.weight.zero_()
    again = train_level(problem.engine(setting), other, own, problem.task(setting), rest, {"step": step, **state})
    assert again.stopped_early
    assert again.steps == 8
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), encoder.parameters(), strict=True))
    assert torch.equal(own.weight, head.weight)


def test_what_is_logged() -> None:
    setting = Setting(steps=3)
    hooks = Hooks()
    result = _alone(setting, hooks)
    assert [r["step"] for r in hooks.rows] == [1, 2, 3]
    assert [r["loss"] for r in hooks.rows] == result.losses
    assert [r["lr"] for r in hooks.rows] == [0.0, 1e-3, 2e-3]
    row = hooks.rows[0]
    assert (row["level"], row["total"]) == (LEVEL, 3)
    assert 0 < row["active_candidates"] <= 6
    assert row["docs_per_s"] > 0


def _learnable(shuffled: bool) -> tuple[TokenRows, sp.csr_matrix]:
    """Documents of 120: the first word tells the node, the rest is noise."""
    rng = np.random.default_rng(5)
    nodes = rng.integers(0, NODES, 120)
    rows = [[2, 10 + int(k), *rng.integers(100, 160, 5).tolist(), 3] for k in nodes]
    said = rng.permutation(nodes) if shuffled else nodes
    return TokenRows(rows, 0), sp.csr_matrix((np.ones(120, np.float32), (np.arange(120), said)), shape=(120, NODES))


def _held_out_precision(shuffled: bool) -> tuple[float, float]:
    rows, Y = _learnable(shuffled)
    setting = Setting(steps=80, weight_decay=0.0, clip=1.0, lr=4e-3, eps=1e-8)
    source = CandidateSource(
        sp.csr_matrix(np.ones((120, 1), np.float32)), Y, np.array([0, NODES]), max_active=100, seed=0, level=1
    )
    task = problem.task(setting, rows, source)
    task.batches.__init__(np.asarray(rows.lengths)[:90], 8, 0)
    encoder, head = problem.encoder(setting), problem.head()
    losses = train_level(problem.engine(setting), encoder, head, task, Hooks()).losses
    E = embed(encoder, rows, np.arange(90, 120))
    P = predict_level(E, head, None, np.array([0, NODES]), 1, "l3-hinge", Mesh(World.single()))
    true = _learnable(False)[1][90:]
    return float(np.mean(losses[-10:])), float(P.multiply(true).astype(bool).sum() / 30)


def test_real_labels_are_learnt_and_shuffled_ones_are_not() -> None:
    loss, precision = _held_out_precision(shuffled=False)
    other_loss, other_precision = _held_out_precision(shuffled=True)
    assert precision > 0.8, (loss, precision, other_loss, other_precision)
    assert other_precision < 0.4
    assert loss < 0.6 * other_loss


def test_another_kind_of_job_than_expected_is_an_error() -> None:
    mesh = Mesh(World(0, 2, 0, 2, "cpu"), shards=2)  # a launcher that said two and started one
    with pytest.raises(UserError, match=r"1 rank\(s\).*ACCELERATE_USE_CPU=true"):
        open_engine(EngineConfig(), mesh)
