"""A stage that one node has left while another still writes it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.helpers.ranks import on_ranks
from xmcdist.checkpoint import stages
from xmcdist.parallel.launch import World


@pytest.mark.distributed
@on_ranks(2)
def test_files_are_put_on_disk_once_all_nodes_have_written(rank: int, world_size: int, tmp_path: Path) -> None:
    world = World(rank, world_size, local_rank=0, local_world_size=1, device_type="cpu")  # two nodes
    listed: list[bool] = []

    def files_to_disk(folder: Path) -> None:
        listed.append((folder / "whole").exists() and not (folder / "whole.tmp").exists())

    def body(folder: Path) -> None:
        if rank == 0:
            (folder / "whole.tmp").write_bytes(b"rows")
            time.sleep(0.5)
            (folder / "whole.tmp").rename(folder / "whole")

    stages.files_to_disk = files_to_disk
    stages.StageStore(tmp_path, world, lambda _: None).run("a", {}, body)
    assert listed == [True]
