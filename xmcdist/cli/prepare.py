"""``python -m xmcdist prepare``: read a data set once, check it, write its memory-mapped form."""

from __future__ import annotations

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
        print(f"prepared in {prepared_folder(cfg)}: {data.num_labels} labels")
        for split, counts in data.manifest["splits"].items():
            print(f"  {split}: " + ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in counts.items()))
    shutdown()
