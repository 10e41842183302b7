"""``python -m xmcdist prepare``: read a data set once, check it, write its memory-mapped form."""

from __future__ import annotations

from pathlib import Path

from xmcdist.cli.app import run
from xmcdist.config.schema import RunConfig


def main() -> None:
    """Prepare the data set of a training configuration."""
    run("train", _prepare)


def _prepare(cfg: RunConfig) -> None:
    from xmcdist.parallel.launch import setup, shutdown
    from xmcdist.pipelines.prepare import prepare_data, prepared_folder

    world = setup(use_gpu=False)
    data = prepare_data(cfg, world, print)
    if world.is_main:
        print(f"prepared in {Path(prepared_folder(cfg))}")
        for name, value in sorted(data.manifest["counts"].items()):
            print(f"  {name}: {value}")
    shutdown()
