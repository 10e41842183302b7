"""A level saved by some ranks under one engine goes on with others, under another, as if undisturbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.ranks import on_ranks
from tests.training import problem
from tests.training.problem import NODES, Hooks, Setting
from xmcdist.checkpoint.train_state import StateStore, load_state
from xmcdist.config.schema import EngineConfig
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.training.engine import open_engine
from xmcdist.training.loop import train_level

SETTING = Setting(steps=20, micro_batch=3, save_every=1, clip=4.5)
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-4  # fp32 against fp64, 20 steps

Leg = tuple[int, str, int]  # ranks, engine, step at which it is interrupted
ROUTES: dict[str, list[Leg]] = {
    "ranks": [(4, "ddp", 10), (2, "ddp", 14), (3, "ddp", 17), (1, "ddp", 20)],
    "engines": [(4, "ddp", 10), (2, "zero2", 14), (3, "fsdp2", 17), (1, "ddp", 20)],
    "back": [(2, "fsdp2", 8), (3, "zero3", 13), (4, "zero1", 20)],
}


class _Interrupted(Exception):
    """The end of a leg."""


class _Leg(Hooks):
    """Saves at one step, and stops there."""

    def __init__(self, store: StateStore, until: int) -> None:
        super().__init__()
        self.store, self.until = store, until

    def save(self, step: int, state: dict[str, Any]) -> None:
        if step == self.until:
            self.store.save(step=step, num_rows=NODES, **state)
            self.store.finish()
            raise _Interrupted


@on_ranks(1, 2, 3, 4, timeout_s=180)
def _leg(rank: int, world_size: int, folder: str, kind: str, until: int) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    problem.engine(SETTING, rank, world_size)  # sets what launchers set
    mesh = Mesh.build(World(rank, world_size, rank, world_size, "cpu"))
    engine = open_engine(EngineConfig(name=kind, global_batch=8, micro_batch=SETTING.micro_batch), mesh)
    encoder, head = problem.encoder(SETTING), problem.head(rank, world_size)
    store = StateStore(place / "checkpoints", mesh)
    hooks, resume, latest = _Leg(store, until), None, store.latest()
    if latest is not None:
        like = {n: x for n, x in engine.template(encoder).items() if n in encoder.state_dict()}
        resume = load_state(latest, mesh, encoder_like=like, num_rows=NODES)
    try:
        encoder = train_level(engine, encoder, head, problem.task(SETTING), hooks, resume).encoder
        store.finish()
    except _Interrupted:
        assert until < SETTING.steps
    else:
        assert until == SETTING.steps
        torch.save({"weight": head.weight.detach(), "bias": head.bias.detach()}, place / f"head.{rank}.pt")
        if rank == 0:
            torch.save({n: p.detach() for n, p in encoder.state_dict().items()}, place / "encoder.pt")
    if rank == 0:
        with open(place / "losses.txt", "a") as f:
            f.writelines(f"{row['loss']!r}\n" for row in hooks.rows)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("route", [r if r != "ranks" else pytest.param(r, marks=pytest.mark.matrix) for r in ROUTES])
def test_ranks_and_engines_change_on_the_way(route: str, tmp_path: Path) -> None:
    for ranks, kind, until in ROUTES[route]:
        _leg(world=ranks, folder=str(tmp_path), kind=kind, until=until)
    want = problem.reference(SETTING)
    losses = [float(line) for line in (tmp_path / "losses.txt").read_text().splitlines()]
    assert len(losses) == SETTING.steps
    np.testing.assert_allclose(losses, want.losses, atol=LOSS_TOLERANCE, rtol=0)
    encoder = torch.load(tmp_path / "encoder.pt")
    assert encoder.keys() == want.encoder.keys()
    for name, weight in encoder.items():
        np.testing.assert_allclose(weight, want.encoder[name], atol=WEIGHT_TOLERANCE, rtol=0, err_msg=name)
    last = ROUTES[route][-1][0]
    parts = [torch.load(tmp_path / f"head.{rank}.pt") for rank in range(last)]
    for name, whole in (("weight", want.weight), ("bias", want.bias)):
        np.testing.assert_allclose(torch.cat([p[name] for p in parts]), whole, atol=WEIGHT_TOLERANCE, rtol=0)
