from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import on_ranks
from xmcdist.checkpoint.train_state import latest, load_state, save_state
from xmcdist.config.errors import UserError
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range

ROWS = 11
HEAD = torch.arange(ROWS * 2, dtype=torch.float32).reshape(ROWS, 2)


def _save(folder: Path, rank: int, world_size: int, step: int) -> None:
    start, stop = row_range(ROWS, rank, world_size)
    save_state(
        folder,
        step=step,
        encoder={"w": torch.full((2,), float(step))},
        optimizer={"w.exp_avg": torch.zeros(2)},
        head={"rows": HEAD[start:stop] + step},
        rows=(start, stop),
        extra={"best": 0.5},
        world=World(rank, world_size, rank, world_size, "cpu"),
    )


@on_ranks(1, 2, 3)
def test_rows_written_by_any_ranks_are_read_by_any_owner(rank: int, world_size: int, tmp_path: Path) -> None:
    _save(tmp_path, rank, world_size, 3)
    for readers in (1, 2, 3, 4):
        for reader in range(readers):
            rows = row_range(ROWS, reader, readers)
            state = load_state(tmp_path / "step-3", rows)
            assert torch.equal(state["head"]["rows"], HEAD[rows[0] : rows[1]] + 3)
    assert (state["step"], state["extra"]["best"]) == (3, 0.5)


def test_the_newest_whole_checkpoint_is_taken_and_older_ones_go(tmp_path: Path) -> None:
    _save(tmp_path, 0, 1, 3)
    _save(tmp_path, 0, 1, 10)
    (tmp_path / "step-20.partial").mkdir()
    (tmp_path / "step-30").mkdir()  # no state.json: its writer died
    assert latest(tmp_path, World.single()) == tmp_path / "step-10"
    assert not (tmp_path / "step-3").exists()


def test_damage_and_missing_rows_are_named(tmp_path: Path) -> None:
    _save(tmp_path, 0, 1, 3)
    with pytest.raises(UserError, match=r"holds 11 of the rows 0\.\.12"):
        load_state(tmp_path / "step-3", (0, 12))
    path = tmp_path / "step-3" / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="is damaged"):
        load_state(tmp_path / "step-3", (0, 2))
