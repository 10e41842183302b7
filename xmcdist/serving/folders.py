"""Model folders as far as a look into them tells, without opening them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xmcdist.checkpoint.atomic import read_json
from xmcdist.config.errors import UserError
from xmcdist.inference.ensemble_folder import EnsembleFolder

__all__ = ["count_labels", "folders_of", "name_of"]


def folders_of(model: Any) -> list[str]:
    """The folder, or the folders of an ensemble.

    Raises:
        UserError: it is neither a path nor a list of paths.
    """
    if isinstance(model, (str, Path)):
        return [str(model)]
    if not isinstance(model, Sequence) or not model or not all(isinstance(path, (str, Path)) for path in model):
        raise UserError(f"model={model} is neither a folder nor a list of folders, model=[FOLDER,FOLDER]")
    return [str(path) for path in model]


def name_of(model: Any) -> str:
    """What a client is told the model is called: the last two parts of its path, several joined by ``+``."""
    return "+".join("/".join(Path(path).absolute().parts[-2:]) for path in folders_of(model))


def count_labels(model: Any) -> int:
    """Labels of a model.

    Raises:
        UserError: a folder is no model folder.
    """
    counts = []
    folders = list(map(Path, folders_of(model)))
    ensemble = EnsembleFolder.read(folders[0]) if len(folders) == 1 else None
    for path in folders if ensemble is None else ensemble.folders.values():
        told = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        if not isinstance(told.get("num_labels"), int):  # a run folder has a config.json of another kind
            raise UserError(f"{path} is no model folder (a run keeps its model in RUN/model)")
        counts.append(told["num_labels"])
    return int(counts[0])
