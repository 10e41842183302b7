"""Every engine, on 1 to 4 ranks, trains as one process in fp64 does; its state is anyone's.

The processes are what costs, so a start of them runs many checks; the first that fails names
the engine.  CI runs 2 and 3 ranks; all of it, in about five minutes on two cores:

    python -m pytest tests/training/test_engines.py -m "matrix or not matrix"
"""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.helpers.ranks import on_ranks
from tests.training import problem
from tests.training.problem import Hooks, Reference, Setting
from xmcdist.config.errors import UserError
from xmcdist.config.schema import EngineConfig
from xmcdist.encoders.hf import Encoder
from xmcdist.matchers.head import ShardedHead
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.training.engine import ENGINES, Engine, open_engine
from xmcdist.training.engines.deepspeed_config import load_settings
from xmcdist.training.engines.environment import check_launch
from xmcdist.training.engines.tensors import whole
from xmcdist.training.loop import DivergedError, LevelResult, train_level

ALL = ("ddp", "fsdp2", "zero1", "zero2", "zero3")

# Against fp64, in float32: losses are of size 1, norms up to 6, weights move by up to 0.03.
LOSS_TOLERANCE, NORM_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 5e-6, 2e-5, 2e-6, 2e-5
# Between engines in bf16: only the order of float32 sums differs, but that tips roundings to bf16.
BF16_TOLERANCE = 2e-2

CURVE = Setting(micro_batch=2, steps=20, clip=4.5, scoring="dense")  # accumulates; clips some steps and not others
FEW_ROWS = Setting(micro_batch=2, steps=3, clip=1.0, nodes=2)  # fewer rows than three or four ranks
UNCLIPPED = Setting(micro_batch=8, steps=16, clip=0.0, save_every=3)
CHECKPOINTED = Setting(micro_batch=4, steps=3, clip=1.0, gradient_checkpointing=True)
BF16 = replace(CHECKPOINTED, precision="bf16", steps=5)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one process in fp64 gets, worked out once for all ranks; a file's name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("reference") / "all.pkl"
    path.write_bytes(pickle.dumps({s: problem.reference(s) for s in (CURVE, FEW_ROWS, UNCLIPPED, CHECKPOINTED)}))
    torch.set_num_threads(threads)
    return str(path)


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Settings of ZeRO-3 that cut a small encoder's matrices, and leave its short vectors whole."""
    path = tmp_path_factory.mktemp("deepspeed") / "zero3.json"
    settings: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 100}
    path.write_text(json.dumps({"zero_optimization": settings}))
    settings["offload_optimizer"] = {"device": "cpu"}
    path.with_name("offload.json").write_text(json.dumps({"zero_optimization": settings}))
    return str(path)


def _more(name: str, partitioned: str) -> dict[str, Any]:
    return {"name": name, "deepspeed_config": partitioned if name == "zero3" else None}


def _spy(engine: Engine) -> dict[str, torch.Tensor]:
    """Keeps the gradients of an engine's first step, whole, before they are clipped."""
    kept: dict[str, torch.Tensor] = {}
    clip = engine.clip

    def first(head: Any, limit: float) -> float:
        rows = list(head)
        if not kept:
            every = ((n, _gradient(engine, p)) for n, p in engine.encoder.named_parameters())
            kept.update({n: g.clone() for n, g in every if g is not None})
            kept.update({n: p.grad.clone() for n, p in zip(("weight", "bias"), rows, strict=True)})
        return clip(rows, limit)

    engine.clip = first  # type: ignore[method-assign]
    return kept


def _gradient(engine: Engine, p: torch.nn.Parameter) -> torch.Tensor | None:
    if engine.cfg.name.startswith("zero"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(p) if p.requires_grad else None
    return None if p.grad is None else whole(p.grad)


def _worst(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).abs().max()) if got.numel() else 0.0


def _train(
    engine: Engine, setting: Setting, hooks: Hooks, resume: dict[str, Any] | None = None
) -> tuple[LevelResult, ShardedHead]:
    head = problem.head(engine.mesh.shard, engine.mesh.shards, setting.nodes)
    return train_level(engine, problem.encoder(setting), head, problem.task(setting), hooks, resume), head


def _check(
    what: str, engine: Engine, want: Reference, setting: Setting, resume: dict[str, Any] | None = None
) -> tuple[Hooks, LevelResult]:
    """Train, and compare all that the reference has."""
    hooks, first = Hooks(), 0 if resume is None else resume["step"]
    gradients = _spy(engine)
    result, head = _train(engine, setting, hooks, resume)
    assert len(result.losses) == setting.steps - first
    assert np.allclose(result.losses, want.losses[first:], atol=LOSS_TOLERANCE, rtol=0), what
    norms = [row["grad_norm"] for row in hooks.rows]
    assert np.allclose(norms, want.norms[first:], atol=NORM_TOLERANCE, rtol=0), what
    shard = slice(head.shard.start, head.shard.stop)
    if resume is None:
        assert gradients.keys() == want.first_gradients.keys(), what
        for n, g in gradients.items():
            wanted = want.first_gradients[n]
            off = _worst(g, wanted[shard] if n in ("weight", "bias") else wanted)
            assert off < GRADIENT_TOLERANCE, (what, n, off)
    assert type(result.encoder) is Encoder, what
    for n, p in result.encoder.state_dict().items():
        off = _worst(p, want.encoder[n])
        assert off < WEIGHT_TOLERANCE, (what, n, off)
    assert _worst(head.weight, want.weight[shard]) < WEIGHT_TOLERANCE, what
    assert _worst(head.bias, want.bias[shard]) < WEIGHT_TOLERANCE, what
    return hooks, result


def _matrix(rank: int, world_size: int, references: str, partitioned: str) -> None:
    known = pickle.loads(Path(references).read_bytes())
    assert max(known[CURVE].norms) > CURVE.clip > min(known[CURVE].norms)
    for name in ALL:
        for setting in (CURVE, FEW_ROWS, CHECKPOINTED):
            what = f"{name} on {world_size}, {setting.steps} steps of {setting.nodes} nodes"
            engine = problem.engine(setting, rank, world_size, **_more(name, partitioned))
            _, result = _check(what, engine, known[setting], setting)
        same = gather_objects([p.detach().numpy().tobytes() for p in result.encoder.parameters()])
        assert all(s == same[0] for s in same), f"{name}: encoders of the ranks have drifted apart"


@on_ranks(3, timeout_s=300)
def test_every_engine_equals_one_process_in_fp64(rank: int, world_size: int, references: str, partitioned: str) -> None:
    _matrix(rank, world_size, references, partitioned)


@pytest.mark.matrix
@on_ranks(1, 2, 4, timeout_s=600)
def test_every_engine_equals_one_process_in_fp64_elsewhere(
    rank: int, world_size: int, references: str, partitioned: str
) -> None:
    _matrix(rank, world_size, references, partitioned)


def _layouts(rank: int, world_size: int, references: str, names: tuple[str, ...]) -> None:
    known = pickle.loads(Path(references).read_bytes())
    for name in names:
        for shards in (s for s in range(1, world_size + 1) if world_size % s == 0):
            what = f"{name}, {world_size // shards} replicas of {shards} shards"
            engine = problem.engine(CURVE, rank, world_size, shards, name=name)
            assert (engine.mesh.replicas, engine.mesh.shards) == (world_size // shards, shards)
            _check(what, engine, known[CURVE], CURVE)


@on_ranks(4, timeout_s=300)
def test_replicas_of_shards_change_nothing(rank: int, world_size: int, references: str) -> None:
    _layouts(rank, world_size, references, ("ddp",))


@pytest.mark.matrix
@on_ranks(4, timeout_s=600)
def test_replicas_of_shards_change_nothing_elsewhere(rank: int, world_size: int, references: str) -> None:
    _layouts(rank, world_size, references, ("fsdp2", "zero2"))


@on_ranks(2, timeout_s=300)
def test_any_engine_goes_on_from_any_other(rank: int, world_size: int, references: str, partitioned: str) -> None:
    """Also: nothing clips at 1 where clipping is off."""
    want = pickle.loads(Path(references).read_bytes())[UNCLIPPED]
    assert min(want.norms) > 1
    state: dict[str, Any] | None = None
    for name in ("ddp", "zero2", "fsdp2", "zero3", "zero1", "ddp"):
        engine = problem.engine(UNCLIPPED, rank, world_size, **_more(name, partitioned))
        what = f"{name} from step {state['step'] if state else 0}"
        hooks, _ = _check(what, engine, want, UNCLIPPED, state)
        if hooks.saved:
            step, saved = hooks.saved[0]
            assert saved["extra"]["samples"] == 25 * (step // 4) + 8 * (step % 4)
            state = {"step": step, **saved}
    assert state is not None
    assert state["step"] == 15
    state["extra"]["samples"] += 1
    with pytest.raises(UserError, match=r"step 15 has seen .* engine\.global_batch or the data have changed"):
        _train(problem.engine(UNCLIPPED, rank, world_size), UNCLIPPED, Hooks(), state)


class _Watched(Hooks):
    """Remembers the weights that each evaluation was given, and uses them."""

    def evaluate(self, encoder: Encoder, head: ShardedHead) -> float:
        self.seen = [*getattr(self, "seen", []), {n: p.clone() for n, p in encoder.state_dict().items()}]
        self.dim = encoder(*(torch.from_numpy(a) for a in problem.tokens().batch([0, 3]))).shape
        return super().evaluate(encoder, head)


@on_ranks(2, timeout_s=300)
def test_early_stopping_bf16_and_what_a_rank_holds(rank: int, world_size: int, partitioned: str) -> None:
    stopping = Setting(steps=8, validation_fraction=0.1, eval_every=2, patience=2, save_every=6)
    bf16: dict[str, list[float]] = {}
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    offload = Path(partitioned).with_name("offload.json")
    for name in (*ALL, "zero3_offload"):
        more = _more(name, partitioned) if name in ALL else {"name": name, "deepspeed_config": str(offload)}
        if name.startswith("zero"):
            _is_cut_as_its_stage_says(problem.engine(CURVE, rank, world_size, **more), name)
        hooks = _Watched([0.1, 0.5, 0.4, 0.3])
        result, _ = _train(problem.engine(stopping, rank, world_size, **more), stopping, hooks)
        assert (result.stopped_early, result.steps) == (True, 8), name
        assert hooks.dim == (2, 64)
        assert all(torch.equal(p, hooks.seen[1][n]) for n, p in result.encoder.state_dict().items()), name
        assert not all(torch.equal(p, hooks.seen[2][n]) for n, p in result.encoder.state_dict().items()), name
        ((_, saved),) = hooks.saved
        best = {n: whole(saved["encoder"][f"best.{n}"]) for n in hooks.seen[1]}
        assert all(torch.equal(p, hooks.seen[1][n]) for n, p in best.items()), name
        _holds_its_part(name, saved)

        engine = problem.engine(BF16, rank, world_size, **more)
        gradients[name] = _spy(engine)
        bf16[name] = _train(engine, BF16, Hooks())[0].losses
        _stops_when_a_loss_is_not_finite(problem.engine(BF16, rank, world_size, **more), name)
    fp32 = _train(problem.engine(CHECKPOINTED, rank, world_size), replace(BF16, precision="fp32"), Hooks())[0].losses
    assert 1e-6 < abs(bf16["ddp"][0] - fp32[0]) < BF16_TOLERANCE  # bf16 it is, and no more than that
    for name, losses in bf16.items():
        assert np.allclose(losses, bf16["ddp"], atol=BF16_TOLERANCE, rtol=0), (name, losses, bf16["ddp"])
        assert losses[0] == bf16["ddp"][0], name
        for n, g in gradients[name].items():  # sums over ranks are in fp32
            assert _worst(g, gradients["ddp"][n]) < 1e-7, (name, n)


def _stops_when_a_loss_is_not_finite(engine: Engine, name: str) -> None:
    """On all ranks, also where one alone has seen it; and a released engine keeps no encoder alive."""
    head, encoder = problem.head(engine.mesh.shard, engine.mesh.shards), problem.encoder(BF16)
    if engine.world.rank == 1:
        with torch.no_grad():
            head.bias.fill_(math.nan)
    with pytest.raises(DivergedError, match="the loss is nan and its gradient's norm nan"):
        train_level(engine, encoder, head, problem.task(BF16), Hooks())
    engine.release()
    kept = weakref.ref(encoder)
    del encoder, head
    gc.collect()
    assert kept() is None, name


def _holds_its_part(name: str, saved: dict[str, Any]) -> None:
    """Moments, and with them what the engine says it cuts, are cut; accelerate would silently run DDP here."""
    tensors = saved["encoder"] | saved["optimizer"]
    cut = {n for n, x in tensors.items() if isinstance(x, DTensor)}
    everything = {n for n in tensors if not n.endswith(".step")}
    assert cut == (set() if name == "ddp" else everything), name
    for n in cut:
        assert tensors[n].to_local().numel() <= tensors[n].numel() / 2 + 64, (name, n)


def _is_cut_as_its_stage_says(engine: Engine, name: str) -> None:
    """Where accelerate, told to use the CPU, would run DDP and say nothing."""
    task, encoder = problem.task(CURVE), problem.encoder(CURVE)
    total = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    engine.prepare(encoder, task.optimizer)
    assert type(engine.module).__name__ == "DeepSpeedEngine"
    assert engine.module.dp_world_size == engine.world.world_size == 2
    moved = sum(flat.numel() for flat in engine.parts._flat())
    assert total / 2 <= moved < 0.51 * total, name
    here = sum(p.numel() for p in engine.encoder.parameters() if p.requires_grad)
    assert here < 0.01 * total if name.startswith("zero3") else here == total, name
    engine.release()


def test_launchers_that_would_be_ignored_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, instead in (("FSDP", "fsdp2"), ("DEEPSPEED", "zero1, zero2")):
        with monkeypatch.context() as m:
            m.setenv(f"ACCELERATE_USE_{name}", "true")
            with pytest.raises(UserError, match=f"{name} itself.*MULTI_GPU.*engine={instead}"):
                problem.engine(CURVE)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match=r"--mixed_precision fp16, but engine\.precision=fp32 decides"):
        problem.engine(CURVE)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launch("bf16")


def test_one_process_where_several_were_asked_for_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text("from xmcdist.training.engines.environment import check_launch\ncheck_launch('fp32')\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    told = [*launch, "--dynamo_backend", "no", "--cpu", "--num_processes"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    several = subprocess.run([*told, "2", str(script)], capture_output=True, text=True, timeout=120, env=env)
    assert several.returncode != 0
    assert "has started one" in several.stderr
    one = subprocess.run([*told, "1", str(script)], capture_output=True, text=True, timeout=120, env=env)
    assert one.returncode == 0, one.stderr


@pytest.mark.parametrize(
    ("engine", "content", "message"),
    [
        ("zero2", None, "cannot be read: No such file"),
        ("zero2", "{", "is no JSON"),
        ("zero2", "[]", "an object zero_optimization"),
        ("zero2", '{"zero_optimization": {"stage": 3}}', "stage=3, but engine=zero2 is stage 2"),
        ("zero2", '{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}', "decided by optimizer.clip: take"),
        ("zero2", '{"zero_optimization": {"stage": 2}, "bf16": {}}', "decided by engine.precision"),
        ("zero3_offload", '{"zero_optimization": {"stage": 3}}', "lacks zero_optimization.offload_optimizer"),
        (
            "zero3",
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}',
            "has zero_optimization.offload_optimizer",
        ),
    ],
)
def test_deepspeed_settings_that_contradict_the_run_are_refused(
    engine: str, content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_settings(EngineConfig(name=engine, deepspeed_config=str(path)))


def test_shipped_deepspeed_settings_are_sound() -> None:
    for name in (e for e in ENGINES if e.startswith("zero")):
        settings = load_settings(EngineConfig(name=name, precision="bf16"))
        assert settings["gradient_clipping"] == 0.0
        assert settings["torch_autocast"]["enabled"]


def test_an_unknown_engine_is_an_error() -> None:
    with pytest.raises(UserError, match=r"engine\.name=zero4 is none of cpu, ddp"):
        open_engine(EngineConfig(name="zero4"), Mesh(World.single()))
