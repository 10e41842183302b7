"""JSONL, CSV and Parquet as one stream of records: a text, its labels, perhaps its split."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xmcdist.config.schema import DatasetConfig
from xmcdist.data.errors import DataError
from xmcdist.data.lines import byte_lines, decode

__all__ = ["Record", "check_columns", "read_records", "read_rows"]

_LARGEST_FIELD = 2**27  # characters of one csv cell; python's own limit is 131072
_PARQUET_ROWS = 256  # rows in memory at once
_PARQUET_BUFFER = 1 << 20  # bytes of a column read ahead, instead of the whole row group


@dataclass(frozen=True, slots=True)
class Record:
    """One document as its file has it; ``where`` names its line or row."""

    text: str
    labels: list[str]
    split: str | None
    where: str


def read_records(path: Path, file_format: str, cfg: DatasetConfig, split_column: str | None) -> Iterator[Record]:
    """Stream the documents of one file.

    Args:
        file_format: jsonl | csv | parquet.
        split_column: the column that says train or test, if one is to be read.

    Raises:
        DataError: invalid UTF-8 or JSON, a missing column, a value of the wrong type;
            names file and line.

    Cost: O(file) time; memory is that of some hundred documents.
    """
    columns = {"dataset.text_column": cfg.text_column, "dataset.labels_column": cfg.labels_column}
    if split_column:
        columns["dataset.split_column"] = split_column
    for where, row in read_rows(path, file_format, columns, _check_types):
        text = row[cfg.text_column]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{where}: dataset.text_column={cfg.text_column} holds {_kind(text)} ({_short(text)}), not a string"
            )
        labels = _labels(row[cfg.labels_column], where, file_format, cfg)
        split = None if split_column is None else row[split_column]
        yield Record(text or "", labels, None if split is None else str(split), where)


def read_rows(
    path: Path,
    file_format: str,
    columns: dict[str, str],
    check_types: Callable[[Any, list[str], Path], None] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the rows of one file, each with its place: ``("a.csv, line 2", {"text": ...})``.

    Args:
        file_format: jsonl | csv | parquet.
        columns: that every row must have, each by the setting that names it.
        check_types: is shown a Parquet file's schema and the columns before anything is read.

    Raises:
        DataError: as `read_records`.
    """
    if file_format == "parquet":
        return _parquet(path, columns, check_types)
    return (_jsonl if file_format == "jsonl" else _csv)(path, columns)


def check_columns(path: Path, file_format: str, cfg: DatasetConfig, split_column: str | None) -> None:
    """Look at the header, schema or first line only.

    Raises:
        DataError: a column is missing or of the wrong type, or there is no document.
    """
    if next(read_records(path, file_format, cfg, split_column), None) is None:
        raise DataError(f"{path} is empty: it holds no documents")


def _labels(value: Any, where: str, file_format: str, cfg: DatasetConfig) -> list[str]:
    field = f"{where}: dataset.labels_column={cfg.labels_column}"
    if value is None:
        return []
    if isinstance(value, str) and file_format != "jsonl":
        value = value.split(cfg.label_separator)
    if not isinstance(value, list):
        raise DataError(f'{field} holds {_kind(value)} ({_short(value)}), not a list of labels: write ["a", "b"]')
    for label in value:
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise DataError(f"{field} holds a label that is {_kind(label)} ({_short(label)}): use strings or integers")
    return [label for label in (str(label).strip() for label in value) if label]


def _jsonl(path: Path, columns: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in byte_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        text = decode(line, path, number)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}): {_short(text)}: every line must be one object") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: {_kind(row)} ({_short(row)}), not an object: every line must be one object")
        _require(columns, row, where)
        yield where, row


def _csv(path: Path, columns: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(_LARGEST_FIELD)  # documents are longer than python expects of a cell
    lines = (decode(line, path, number) for number, line in byte_lines(path, keep_ends=True))
    # strict: otherwise a quote that is never closed swallows the rest of the file unseen.
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    line = 1
    while True:
        where = f"{path}, line {line}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{where}: not CSV ({error}): quote cells with commas, quotes or line ends in them"
            ) from None
        line = reader.line_num + 1
        if header is None:
            header = row
            _require(columns, header, where)
        elif row:
            if len(row) != len(header):
                raise DataError(
                    f"{where}: {len(row)} cells, but the header names {len(header)}: "
                    "quote cells with commas, quotes or line ends in them"
                )
            yield where, dict(zip(header, row, strict=True))


def _parquet(
    path: Path, columns: dict[str, str], check_types: Callable[[Any, list[str], Path], None] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.stat().st_size:
        raise DataError(f"{path} is empty: it holds no documents")
    number = 0
    try:
        with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER) as file:
            schema = file.schema_arrow
            _require(columns, schema.names, str(path))
            names = list(columns.values())
            if check_types is not None:
                check_types(schema, names, path)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}, after row {number}: damaged or no Parquet file ({error}): copy or write it again"
        ) from error


def _check_types(schema: Any, columns: list[str], path: Path) -> None:
    """Text and labels must have types that can be read; schema: pyarrow's."""
    import pyarrow.types as pt

    def plain(kind: Any) -> Any:
        return kind.value_type if pt.is_dictionary(kind) else kind

    def is_text(kind: Any) -> bool:
        return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))

    text, labels = (plain(schema.field(name).type) for name in columns[:2])
    if not is_text(text):
        raise DataError(f"{path}: dataset.text_column={columns[0]} is of type {text}, not string")
    if pt.is_list(labels) or pt.is_large_list(labels) or pt.is_fixed_size_list(labels):
        item = plain(labels.value_type)
        if is_text(item) or pt.is_integer(item) or pt.is_null(item):
            return
    elif is_text(labels):
        return
    raise DataError(
        f"{path}: dataset.labels_column={columns[1]} is of type {labels}: "
        "it must be a list of strings or integers, or a string with dataset.label_separator between labels"
    )


def _require(columns: dict[str, str], there: Iterable[str], where: str) -> None:
    names = list(there)
    for setting, name in columns.items():
        if name not in names:
            listed = ", ".join(names[:20]) or "none"
            raise DataError(f"{where}: no column {name!r}; there are: {listed}: set {setting}")
        if names.count(name) > 1:
            raise DataError(f"{where}: column {name!r} is there twice: rename one")


def _kind(value: Any) -> str:
    names = {str: "a string", int: "an integer", float: "a number", bool: "a truth value", list: "a list"}
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text[:60] + "…") if len(text) > 60 else repr(text) if isinstance(value, str) else text
