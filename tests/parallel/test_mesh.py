"""Replicas of label shards: who is with whom."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.ranks import on_ranks
from xmcdist.config.errors import UserError
from xmcdist.parallel.collectives import all_reduce, group_size
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.parallel.shards import row_range


@on_ranks(1, 2, 4)
def test_groups_of_every_layout(rank: int, world_size: int) -> None:
    world = World(rank, world_size, rank, world_size, "cpu")
    for shards in (1, 2, 4):
        if world_size % shards:
            with pytest.raises(UserError, match=rf"label_shards={shards} must divide the {world_size} process"):
                Mesh.build(world, shards)
            continue
        mesh = Mesh.build(world, shards)
        assert (mesh.replica, mesh.shard) == divmod(rank, shards)
        assert mesh.replicas * shards == world_size
        assert group_size(mesh.shard_group) == shards
        me = torch.tensor([10**rank])
        with_me = [r for r in range(world_size) if r // shards == rank // shards]
        assert all_reduce(me, group=mesh.shard_group).item() == sum(10**r for r in with_me)
        if mesh.replicas > 1:
            same_rows = [r for r in range(world_size) if r % shards == rank % shards]
            assert all_reduce(me, group=mesh.replica_group).item() == sum(10**r for r in same_rows)
        for n in (0, 1, 10):
            parts = [row_range(n, r, world_size) for r in with_me]
            assert mesh.part_sizes(n) == [b - a for a, b in parts]
            assert mesh.replica_part(n) == (parts[0][0], parts[-1][1])
        assert len(mesh.label_shard(5)) == [len(c) for c in (*torch.arange(5).chunk(shards), (), (), ())][mesh.shard]


@on_ranks(2)
def test_the_default_is_one_owner_for_every_row(rank: int, world_size: int) -> None:
    mesh = Mesh.build(World(rank, world_size, rank, world_size, "cpu"))
    assert (mesh.shards, mesh.replicas, mesh.replica_group) == (2, 1, None)
