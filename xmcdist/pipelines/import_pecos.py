"""``xmcdist import-pecos``: a linear model of PECOS becomes a model folder of xmcdist."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.checkpoint.atomic import no_space_is_clear, replace_folder, write_json
from xmcdist.checkpoint.checksums import files_to_disk, seal_folder
from xmcdist.config.commands import ImportPecosConfig
from xmcdist.config.errors import UserError
from xmcdist.data.lines import byte_lines, decode
from xmcdist.data.texts import TextWriter
from xmcdist.inference.predictor import MODEL_FORMAT
from xmcdist.observability.environment import versions
from xmcdist.rankers.pecos import PecosModel, load_matrix, read_pecos

__all__ = ["import_pecos"]


def import_pecos(cfg: ImportPecosConfig) -> list[str]:
    """Read ``cfg.source``, write the model folder ``cfg.output``.

    The model reads features, and as they are given: PECOS scales none either.

    Returns:
        What a person should know, a sentence each; the first says what was made.

    Raises:
        UserError: as `read_pecos`; the output is there already; or labels or frequencies are
            of another number of labels.
    """
    output = Path(cfg.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} is there already: give a folder that is new or empty")
    made = read_pecos(cfg.source)
    tree = made.rankers.tree
    texts, names_labels = _texts(cfg, made)
    frequency, num_train = _frequency(cfg.label_frequency, tree.num_labels)
    meta: dict[str, Any] = {
        "format": MODEL_FORMAT,
        "tfidf": False,
        "encoder": False,
        "beam": made.beam,
        "topk": made.topk,
        "num_train": num_train,
        "num_labels": tree.num_labels,
        "names_labels": names_labels,
        "unit_features": False,
        "made_from": f"PECOS XR-Linear, {Path(cfg.source).resolve()}",
        "versions": versions(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with no_space_is_clear(output):
            beside.mkdir()
            made.rankers.save(beside / "rankers")
            with TextWriter(beside, "label_texts") as writer:
                for text in texts:
                    writer.append(text)
            if frequency is not None:
                np.save(beside / "label_frequency.npy", frequency)
            write_json(beside / "config.json", meta)
            seal_folder(beside)
            files_to_disk(beside)
            replace_folder(beside, output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [_summary(made), *made.notes, *_missing(names_labels, num_train)]


def _summary(made: PecosModel) -> str:
    tree, rankers = made.rankers.tree, made.rankers
    sizes = " > ".join(str(tree.level_size(t)) for t in range(1, tree.depth + 1))
    return (
        f"{tree.num_labels} labels, levels {sizes}, {sum(level.nnz for level in rankers.levels)} weights of "
        f"{rankers.num_sparse} features; {rankers.post_processor}, beam {made.beam}, top {made.topk}"
    )


def _missing(names_labels: bool, num_train: int | None) -> list[str]:
    said = []
    if not names_labels:
        said.append("labels are named by their numbers: give labels=FILE, a label a line, to name them")
    if num_train is None:
        said.append(
            "how often each label was trained on is not known (label_frequency=Y.npz tells it): "
            "evaluate takes the training part of its data set"
        )
    return said


def _texts(cfg: ImportPecosConfig, made: PecosModel) -> tuple[Iterable[str], bool]:
    """Texts of the labels in their order, and whether they are more than numbers."""
    count = made.rankers.tree.num_labels
    if cfg.labels is None:
        return (made.labels, True) if made.labels is not None else (map(str, range(count)), False)
    path = Path(cfg.labels)
    if not path.is_file():
        raise UserError(f"labels={path} does not exist")
    texts = [decode(raw, path, number) for number, raw in byte_lines(path)]
    if len(texts) != count:
        raise UserError(f"labels={path} has {len(texts)} lines; the model has {count} labels")
    return texts, True


def _frequency(path: str | None, num_labels: int) -> tuple[NDArray[np.int64] | None, int | None]:
    """Training documents of each label, and their number."""
    if path is None:
        return None, None
    Y = load_matrix(Path(path))
    if Y.shape[1] != num_labels:
        raise UserError(f"label_frequency={path} has {Y.shape[1]} columns; the model has {num_labels} labels")
    return np.bincount(Y.indices, minlength=num_labels).astype(np.int64), int(Y.shape[0])
