"""What a launcher is started with to see whom it starts: every rank adds its number to a sum of all."""

from __future__ import annotations

import torch

from xmcdist.parallel.collectives import all_reduce
from xmcdist.parallel.launch import setup, shutdown


def main() -> None:
    world = setup(use_gpu=False, timeout_s=120)
    total = int(all_reduce(torch.tensor([world.rank + 1]))[0])
    place = f"rank {world.rank} of {world.world_size}, local {world.local_rank} of {world.local_world_size}"
    print(f"{place}: sum {total}\n", end="", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
