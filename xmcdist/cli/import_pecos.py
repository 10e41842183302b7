"""``python -m xmcdist import-pecos``: move over from PECOS with the model one has."""

from __future__ import annotations

from xmcdist.cli.app import run
from xmcdist.config.commands import ImportPecosConfig


def main() -> None:
    """Convert a PECOS XR-Linear folder into a model folder."""
    run("import_pecos", _import)


def _import(cfg: ImportPecosConfig) -> None:
    from xmcdist.pipelines.import_pecos import import_pecos

    first, *notes = import_pecos(cfg)
    print(f"{cfg.output}: {first}")
    for note in notes:
        print(f"note: {note}")
