"""Text files of the Extreme Classification Repository: bags of words without texts.

First line ``N D L``; then a line a document, ``l1,l2 f:v f:v``, the labels possibly
missing.  Source: http://manikvarma.org/downloads/XC/XMLRepository.html
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from xmcdist.config.schema import DatasetConfig
from xmcdist.data.errors import DataError
from xmcdist.data.lines import byte_lines, decode
from xmcdist.data.source import SPLITS, Source
from xmcdist.data.text_folder import write_number_names
from xmcdist.data.written import Written
from xmcdist.sparse.csr import as_csr
from xmcdist.sparse.store import CsrWriter

__all__ = ["check_xc", "write_xc"]

_CHUNK_ROWS = 2048
_LARGEST = float(np.finfo(np.float32).max)


class _Rows:
    """Rows of one matrix, written a chunk at a time."""

    def __init__(self, folder: Path, columns: int) -> None:
        self.columns = columns
        self.duplicates = 0
        self.entries = 0
        self._writer = CsrWriter(folder, columns)
        self._clear()

    def add(self, ids: list[int], values: list[float]) -> None:
        self._ids += ids
        self._values += values
        self._ends.append(len(self._ids))
        if len(self._ends) > _CHUNK_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        arrays = (np.array(self._values, np.float32), np.array(self._ids, np.int64), np.array(self._ends, np.int64))
        summed = sp.csr_matrix(arrays, shape=(len(self._ends) - 1, self.columns))
        summed.sum_duplicates()
        self.duplicates += len(self._ids) - summed.nnz
        rows = as_csr(summed, "rows")  # and stored zeros go
        self.entries += rows.nnz
        self._writer.append(rows)
        self._clear()

    def _clear(self) -> None:
        self._ids: list[int] = []
        self._values: list[float] = []
        self._ends = [0]


def check_xc(source: Source) -> None:
    """Headers must be well formed and agree.

    Raises:
        DataError: they are or do not.
    """
    _headers(source)


def write_xc(source: Source, cfg: DatasetConfig, folder: Path) -> Written:
    """Read both files once, line by line; write X and Y.

    Raises:
        DataError: malformed line or number, id out of range, NaN or inf, more or fewer
            documents than the header says, no label at all; names file and line.

    Cost: O(entries); a few thousand rows are in memory.
    """
    headers = _headers(source)
    _, num_features, num_labels = headers["trn"]
    out = Written(num_labels=num_labels, has_text=False, num_features=num_features, splits=list(headers))
    for split, header in headers.items():
        _write_split(source.files[split][0], header, folder, split, cfg.drop_unlabelled and split == "trn", out)
    write_number_names(folder, num_labels)
    return out


def _headers(source: Source) -> dict[str, tuple[int, int, int]]:
    headers = {split: _header(source.files[split][0]) for split in SPLITS if split in source.files}
    if "tst" in headers and headers["trn"][1:] != headers["tst"][1:]:
        raise DataError(
            f"{source.one('tst')}, line 1: {headers['tst'][1]} features and {headers['tst'][2]} labels, but "
            f"{source.one('trn')} has {headers['trn'][1]} and {headers['trn'][2]}: both must number the same"
        )
    return headers


def _header(path: Path) -> tuple[int, int, int]:
    first = next(byte_lines(path), None)
    if first is None:
        raise DataError(f"{path} is empty: its first line must be 'documents features labels'")
    fields = decode(first[1], path, 1).split()
    if len(fields) != 3 or not all(f.isascii() and f.isdigit() for f in fields):
        raise DataError(
            f"{path}, line 1: {_short(first[1])} is no header: it must be three numbers, 'documents features labels'"
        )
    documents, features, labels = (int(f) for f in fields)
    if not documents or not labels:
        raise DataError(f"{path}, line 1: {documents} documents and {labels} labels: both must be positive")
    return documents, features, labels


def _write_split(path: Path, header: tuple[int, int, int], folder: Path, split: str, drop: bool, out: Written) -> None:
    documents, num_features, num_labels = header
    X, Y = _Rows(folder / f"X.{split}", num_features), _Rows(folder / f"Y.{split}", num_labels)
    seen = empty = 0
    for number, line in byte_lines(path):
        if number == 1 or (seen >= documents and not line.strip()):
            continue  # the header; empty lines after the last document
        seen += 1
        if seen > documents:
            continue  # counted for the message
        labels, words, values = _parse(line, path, number, num_features, num_labels)
        if drop and not labels:
            out.left_out += 1
            continue
        empty += not words
        X.add(words, values)
        Y.add(labels, [1.0] * len(labels))
    if seen != documents:
        raise DataError(f"{path}: the header says {documents} documents, {seen} follow: the file was cut or joined")
    X.close()
    Y.close()
    if split == "trn" and not Y.entries:
        raise DataError(f"{path}: no document has a label: there is nothing to learn")
    out.empty[split] = empty
    out.duplicates += X.duplicates + Y.duplicates


def _parse(
    line: bytes, path: Path, number: int, num_features: int, num_labels: int
) -> tuple[list[int], list[int], list[float]]:
    head, _, tail = line.partition(b" ")
    if b":" in head:  # no label part, not even an empty one
        head, tail = b"", line
    labels = [_id(raw, "label", num_labels, path, number) for raw in head.split(b",")] if head.strip() else []
    words, values = [], []
    for pair in tail.split():
        word, colon, value = pair.partition(b":")
        if not colon:
            raise DataError(f"{path}, line {number}: {_short(pair)} is no feature:value pair")
        words.append(_id(word, "feature", num_features, path, number))
        values.append(_value(value, pair, path, number))
    return labels, words, values


def _id(raw: bytes, what: str, limit: int, path: Path, number: int) -> int:
    try:
        value = int(raw)
    except ValueError:
        raise DataError(f"{path}, line {number}: {what} {_short(raw)} is not a whole number") from None
    if not 0 <= value < limit:
        raise DataError(
            f"{path}, line {number}: {what} {value} is out of range: the header says {limit} {what}s, 0 to {limit - 1}"
        )
    return value


def _value(raw: bytes, pair: bytes, path: Path, number: int) -> float:
    try:
        value = float(raw)
    except ValueError:
        raise DataError(f"{path}, line {number}: {_short(pair)} is no feature:value pair") from None
    if not math.fabs(value) <= _LARGEST:  # NaN compares false
        raise DataError(f"{path}, line {number}: {_short(pair)}: the value is not a finite float32: remove or mend it")
    return value


def _short(raw: bytes) -> str:
    return repr(raw[:60].decode("utf-8", "replace"))
