"""Files of other nodes: what one of them still writes or removes is no matter for the others."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.helpers.ranks import on_ranks
from xmcdist.parallel import visible
from xmcdist.parallel.launch import World


@pytest.mark.distributed
@on_ranks(2)
def test_a_file_that_another_node_is_about_to_remove_is_not_waited_for(
    rank: int, world_size: int, tmp_path: Path
) -> None:
    world = World(rank, world_size, local_rank=0, local_world_size=1, device_type="cpu")  # two nodes
    visible._LIMIT_S = 3.0
    part = tmp_path / f"part-{rank}"
    part.write_bytes(b"rows")
    visible.seen_by_all(tmp_path, world)
    if rank == 0:
        time.sleep(0.5)  # the other looks already, unless it waits
        for r in range(world_size):
            (tmp_path / f"part-{r}").unlink()
        (tmp_path / "whole").write_bytes(b"rowsrows")
    visible.seen_by_all(tmp_path, world)
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]
