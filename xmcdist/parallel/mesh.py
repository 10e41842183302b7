"""How the ranks are laid out: replicas of label shards.

W = R x S ranks.  The label rows are cut into S shards and every shard is held R times:

    rank = replica * S + shard

so the S ranks of one replica are neighbours, which launchers put on one node: embeddings
travel inside a node, and only the (small) gradients of label rows between nodes.  R = 1
shares every row over all ranks and reduces nothing; S = 1 is plain data parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xmcdist.config.errors import UserError
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import LabelShard, row_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Mesh"]


@dataclass(frozen=True)
class Mesh:
    """One process's place among replicas and shards.

    Attributes:
        world: who this process is.
        shards: S, ranks that hold one copy of all label rows between them.
        device_mesh: torch's ``[R, S]`` mesh with axes ``replica`` and ``shard``; None on one process.
        shard_group: the S ranks of this replica: gathers of embeddings, merges of top-k.  None: all.
        replica_group: the R ranks with the same rows: sums of their gradients.  None: no other.
    """

    world: World
    shards: int = 1
    device_mesh: DeviceMesh | None = None
    shard_group: ProcessGroup | None = None
    replica_group: ProcessGroup | None = None

    @classmethod
    def build(cls, world: World, shards: int | None = None) -> Mesh:
        """Make the groups; collective.

        Args:
            shards: S; None: all ranks, so that every row has one owner.

        Raises:
            UserError: S does not divide the number of ranks.
        """
        size = world.world_size
        shards = size if shards is None else shards
        if shards < 1 or size % shards:
            raise UserError(
                f"engine.label_shards={shards} must divide the {size} process{'es' if size > 1 else ''}: each replica "
                f"of the label rows takes so many. Possible here: {', '.join(map(str, _divisors(size)))}"
            )
        if size == 1:
            return cls(world)
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(world.device_type, (size // shards, shards), mesh_dim_names=("replica", "shard"))
        return cls(
            world,
            shards,
            mesh,
            None if shards == size else mesh.get_group("shard"),
            None if shards == size else mesh.get_group("replica"),
        )

    @property
    def replicas(self) -> int:
        """R."""
        return self.world.world_size // self.shards

    @property
    def shard(self) -> int:
        """Which shard of the rows this rank holds."""
        return self.world.rank % self.shards

    @property
    def replica(self) -> int:
        """Which copy of the rows this rank belongs to."""
        return self.world.rank // self.shards

    def label_shard(self, num_labels: int) -> LabelShard:
        """The rows of this rank."""
        return LabelShard(self.shard, self.shards, num_labels)

    def replica_part(self, n: int) -> tuple[int, int]:
        """Half-open range of ``n`` documents that the ranks of this replica have between them.

        Documents are parted over all ranks in rank order, so those of one replica are neighbours.
        """
        first = row_range(n, self.replica * self.shards, self.world.world_size)[0]
        return first, row_range(n, (self.replica + 1) * self.shards - 1, self.world.world_size)[1]

    def part_sizes(self, n: int) -> list[int]:
        """How many of ``n`` documents each rank of this replica has, ``[S]``."""
        ranks = range(self.replica * self.shards, (self.replica + 1) * self.shards)
        return [stop - start for start, stop in (row_range(n, r, self.world.world_size) for r in ranks)]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
