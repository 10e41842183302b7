"""Folders of ``X.*.txt``, ``X.*.npz``, ``Y.*.npz`` and ``output-items.txt``.

The form that PECOS and its relatives use: a document a line, labels and features as
scipy matrices ``Y [N, L]`` and ``X [N, D]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xmcdist.config.schema import DatasetConfig
from xmcdist.data.errors import DataError
from xmcdist.data.lines import byte_lines, decode
from xmcdist.data.matrices import Given, npz_shape, read_labels, read_matrix
from xmcdist.data.source import SPLITS, Source
from xmcdist.data.texts import TextWriter
from xmcdist.data.written import Written
from xmcdist.sparse.store import save_csr

__all__ = ["check_text_folder", "write_number_names", "write_text_folder"]


def check_text_folder(source: Source) -> None:
    """What can be told from the shapes alone, before anything is read.

    Raises:
        DataError: a matrix is damaged, or shapes do not fit each other.
    """
    shapes = {role: npz_shape(paths[0]) for role, paths in source.files.items() if role.endswith(".npz")}
    for kind in ("X", "Y"):
        trn, tst = shapes.get(f"{kind}.trn.npz"), shapes.get(f"{kind}.tst.npz")
        if trn and tst and trn[1] != tst[1]:
            raise DataError(
                f"{source.one(f'{kind}.tst.npz')} has {tst[1]} columns but {kind}.trn.npz has {trn[1]}: "
                f"both must number the same {'labels' if kind == 'Y' else 'features'}"
            )
    for split in SPLITS:
        X, Y = shapes.get(f"X.{split}.npz"), shapes.get(f"Y.{split}.npz")
        if X and Y and X[0] != Y[0]:
            raise DataError(_mismatch(source, f"X.{split}.npz", X[0], "rows", split, Y[0]))
        if Y and not Y[0]:
            raise DataError(f"{source.one(f'Y.{split}.npz')} has no rows: it holds no documents")


def write_text_folder(source: Source, cfg: DatasetConfig, folder: Path) -> Written:
    """Read and check everything, write the prepared texts and matrices.

    Raises:
        DataError: as listed in the module's readers; names file and line or row.

    Cost: texts are streamed; one matrix at a time is held in memory.
    """
    out = Written(num_labels=0, has_text="X.trn.txt" in source.files)
    out.splits = [split for split in SPLITS if f"Y.{split}.npz" in source.files]
    for split in out.splits:
        keep = _write_labels(source, cfg, folder, split, out)
        if f"X.{split}.npz" in source.files:
            _write_features(source, folder, split, keep, out)
        if out.has_text:
            _write_texts(source, folder, split, keep, out)
    _write_label_texts(source, folder, out)
    return out


def _write_labels(source: Source, cfg: DatasetConfig, folder: Path, split: str, out: Written) -> NDArray[np.bool_]:
    """Write Y; returns which documents of the split stay, ``[N]``."""
    path = source.files[f"Y.{split}.npz"][0]
    given: Given = read_labels(path)
    Y = given.matrix
    out.duplicates += given.duplicates
    out.num_labels = Y.shape[1]
    keep = np.ones(Y.shape[0], dtype=np.bool_)
    if split == "trn":
        if not Y.nnz:
            raise DataError(f"{path}: no document has a label: there is nothing to learn from an empty label matrix")
        if cfg.drop_unlabelled:
            keep = np.diff(Y.indptr) > 0
            out.left_out = int(len(keep) - keep.sum())
    save_csr(folder / f"Y.{split}", Y if keep.all() else Y[keep])
    return keep


def _write_features(source: Source, folder: Path, split: str, keep: NDArray[np.bool_], out: Written) -> None:
    given = read_matrix(source.files[f"X.{split}.npz"][0])
    X = given.matrix if keep.all() else given.matrix[keep]
    out.duplicates += given.duplicates
    out.num_features = X.shape[1]
    if not out.has_text:
        out.empty[split] = int((np.diff(X.indptr) == 0).sum())
    save_csr(folder / f"X.{split}", X)


def _write_texts(source: Source, folder: Path, split: str, keep: NDArray[np.bool_], out: Written) -> None:
    path = source.files[f"X.{split}.txt"][0]
    number = 0
    with TextWriter(folder, f"texts.{split}") as writer:
        for number, text in _numbered(path):
            if number <= len(keep) and keep[number - 1]:
                writer.append(text)
    if not number:
        raise DataError(f"{path} is empty: it must hold one document a line")
    if number != len(keep):
        raise DataError(_mismatch(source, f"X.{split}.txt", number, "lines", split, len(keep)))
    out.empty[split] = writer.empty


def _write_label_texts(source: Source, folder: Path, out: Written) -> None:
    path = source.one("output-items.txt")
    if path is None:
        write_number_names(folder, out.num_labels)
        return
    with TextWriter(folder, "label_texts") as writer:
        for _, text in _numbered(path):
            writer.append(text)
    if writer.count != out.num_labels:
        raise DataError(
            f"{path} has {writer.count} lines but Y.trn.npz has {out.num_labels} columns: "
            "line l must be the text of the label in column l"
        )


def write_number_names(folder: Path, num_labels: int) -> None:
    """Name labels that have no text by their number."""
    with TextWriter(folder, "label_texts") as writer:
        for label in range(num_labels):
            writer.append(str(label))


def _numbered(path: Path) -> Iterator[tuple[int, str]]:
    return ((number, decode(line, path, number)) for number, line in byte_lines(path))


def _mismatch(source: Source, role: str, count: int, unit: str, split: str, rows: int) -> str:
    return (
        f"{source.one(role)} has {count} {unit} but Y.{split}.npz has {rows} rows: "
        "document i must be line (or row) i of both"
    )
