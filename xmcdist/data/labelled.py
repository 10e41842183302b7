"""Records with labels by name: gives labels their numbers and writes texts and Y.

Labels are numbered in sorted order of their names over the training documents, so the
numbers do not depend on the order of the documents.  A label that only test documents
have cannot be learned or predicted: it is dropped and counted.
"""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from xmcdist.config.schema import DatasetConfig
from xmcdist.data.errors import DataError
from xmcdist.data.records import Record, check_columns, read_records
from xmcdist.data.source import SPLITS, Source
from xmcdist.data.texts import TextWriter
from xmcdist.data.written import Written
from xmcdist.sparse.csr import as_csr
from xmcdist.sparse.store import save_csr

__all__ = ["check_labelled", "held_out", "write_labelled"]

_SPLIT_NAMES = {"train": "trn", "trn": "trn", "test": "tst", "tst": "tst"}


def held_out(seed: int, row: int, fraction: float) -> bool:
    """Whether row ``row`` of a single file is test: a hash of seed and row, so of nothing else."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def check_labelled(source: Source, cfg: DatasetConfig) -> None:
    """Columns of every file, from its header or first record.

    Raises:
        DataError: as `records.check_columns`, or ``dataset.label_separator`` is empty.
    """
    if source.format != "jsonl" and not cfg.label_separator:
        raise DataError("dataset.label_separator is empty: give the text that stands between two labels")
    for role, paths in source.files.items():
        for path in paths:
            check_columns(path, source.format, cfg, cfg.split_column if role == "all" else None)


def write_labelled(source: Source, cfg: DatasetConfig, folder: Path) -> Written:
    """Read every record once; write texts, Y and the label names.

    Raises:
        DataError: a bad record (file and line), no training document, no label at all.

    Cost: texts are streamed; label names and one number a (document, label) pair are in memory.
    """
    out = Written(num_labels=0, has_text=True, splits=[], names_are_labels=True)
    labels = _Labels()
    writers: dict[str, TextWriter] = {}
    for role, paths in source.files.items():
        row = 0
        for path in paths:
            for record in read_records(path, source.format, cfg, cfg.split_column if role == "all" else None):
                split = _split(record, row, cfg) if role == "all" else role
                row += 1
                if split == "trn" and cfg.drop_unlabelled and not record.labels:
                    out.left_out += 1
                    continue
                if split not in writers:
                    writers[split] = TextWriter(folder, f"texts.{split}")
                _add(record, split, writers[split], labels)
    for split, writer in writers.items():
        writer.close()
        out.empty[split] = writer.empty
    out.splits = [split for split in SPLITS if split in writers]
    _refuse_nothing(source, labels, out)
    if cfg.split_column and "all" not in source.files:
        out.warnings.append(f"dataset.split_column={cfg.split_column} has no effect: the files say train and test.")
    labels.write(folder, out)
    return out


def _refuse_nothing(source: Source, labels: _Labels, out: Written) -> None:
    if "trn" not in out.splits:
        raise DataError(f"{source.path} has no training document: check dataset.split_column and drop_unlabelled")
    if not labels.in_training():
        raise DataError(f"{source.path}: no training document has a label: check dataset.labels_column")


def _split(record: Record, row: int, cfg: DatasetConfig) -> str:
    if not cfg.split_column:
        return "tst" if held_out(cfg.split_seed, row, cfg.test_fraction) else "trn"
    split = _SPLIT_NAMES.get((record.split or "").strip().lower())
    if split is None:
        raise DataError(
            f"{record.where}: dataset.split_column={cfg.split_column} says {record.split!r}: "
            "it must be one of train, trn, test, tst"
        )
    return split


def _add(record: Record, split: str, writer: TextWriter, labels: _Labels) -> None:
    try:
        writer.append(record.text)
        labels.add(split, record.labels)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{record.where}: {error.object[error.start : error.end]!r} is half of a surrogate pair, which is no "
            "character: write the file as UTF-8 again"
        ) from None


class _Labels:
    """Label names as first met, and the labels of every document by those numbers."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.trained = bytearray()  # by number: does training have it?
        self.flat = {split: array("i") for split in SPLITS}
        self.ends = {split: array("q", [0]) for split in SPLITS}

    def add(self, split: str, names: list[str]) -> None:
        flat = self.flat[split]
        for name in names:
            number = self.numbers.get(name)
            if number is None:
                name.encode("utf-8")  # refused here, where the line is known, not when names are written
                number = self.numbers[name] = len(self.numbers)
                self.trained.append(0)
            if split == "trn":
                self.trained[number] = 1
            flat.append(number)
        self.ends[split].append(len(flat))

    def in_training(self) -> bool:
        return any(self.trained)

    def write(self, folder: Path, out: Written) -> None:
        """Number the labels of training by sorted name; write names and Y."""
        names = sorted(name for name, number in self.numbers.items() if self.trained[number])
        out.num_labels = len(names)
        out.dropped_labels = len(self.numbers) - len(names)
        final = np.full(len(self.numbers), -1, np.int64)
        with TextWriter(folder, "label_texts") as writer:
            for label, name in enumerate(names):
                final[self.numbers[name]] = label
                writer.append(name)
        for split in out.splits:
            columns = final[np.frombuffer(self.flat[split], np.int32)]
            known = columns >= 0
            ends = np.concatenate([[0], np.cumsum(known)])[np.frombuffer(self.ends[split], np.int64)]
            columns = columns[known]
            out.dropped_entries += len(known) - len(columns)
            shape = (len(ends) - 1, out.num_labels)
            Y = as_csr(sp.csr_matrix((np.ones(len(columns), np.float32), columns, ends), shape=shape), "labels")
            out.duplicates += len(columns) - Y.nnz
            save_csr(folder / f"Y.{split}", Y)
