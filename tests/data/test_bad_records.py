"""Faulty JSONL, CSV and Parquet files: one clear error each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.sources import jsonl, made
from xmcdist.data.errors import DataError

GOOD = '{"text": "a", "labels": ["x"]}\n'


def refused(path: Path, *words: str, **settings: Any) -> None:
    before = sorted(path.parent.iterdir())
    with pytest.raises(DataError) as caught:
        made(path, **settings)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert sorted(path.parent.iterdir()) == before


def source(tmp_path: Path, name: str, raw: str | bytes) -> Path:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return tmp_path / "s"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "b", "labels": ["x"]', ["not JSON", "every line must be one object"]),
        ("b,x", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ('["b", ["x"]]', ["a list", "not an object"]),
        ("3", ["an integer (3), not an object"]),
        ('{"text": "b"}', ["no column 'labels'; there are: text", "set dataset.labels_column"]),
        ('{"body": "b", "labels": []}', ["no column 'text'; there are: body, labels", "set dataset.text_column"]),
        ('{"text": 3, "labels": []}', ["dataset.text_column=text holds an integer (3), not a string"]),
        ('{"text": "b", "labels": "x;y"}', ["dataset.labels_column=labels holds a string ('x;y'), not a list"]),
        ('{"text": "b", "labels": 3}', ["holds an integer (3), not a list"]),
        ('{"text": "b", "labels": {"x": 1}}', ["of type dict", "not a list"]),
        ('{"text": "b", "labels": ["x", 1.5]}', ["a label that is a number (1.5)", "strings or integers"]),
        ('{"text": "b", "labels": [true]}', ["a label that is a truth value (True)"]),
        ('{"text": "b", "labels": [null]}', ["a label that is null"]),
        ('{"text": "b\\ud800", "labels": []}', ["half of a surrogate pair"]),
        ('{"text": "b", "labels": ["\\ud800"]}', ["half of a surrogate pair"]),
    ],
)
def test_bad_jsonl_line(tmp_path: Path, line: str, words: list[str]) -> None:
    refused(source(tmp_path, "train.jsonl", GOOD + line + "\n" + GOOD), "train.jsonl, line 2", *words)


def test_invalid_utf8(tmp_path: Path) -> None:
    raw = GOOD.encode() * 2 + b'{"text": "caf\xe9", "labels": []}\n'
    refused(source(tmp_path, "train.jsonl", raw), "train.jsonl, line 3: byte 0xe9")


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.parquet"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    refused(source(tmp_path, name, ""), f"{name} is empty")


@pytest.mark.parametrize(("name", "raw"), [("train.jsonl", "\n\n"), ("train.csv", "text,labels\n")])
def test_no_documents(tmp_path: Path, name: str, raw: str) -> None:
    refused(source(tmp_path, name, raw), f"{name} is empty: it holds no documents")


def test_no_labels_at_all(tmp_path: Path) -> None:
    refused(source(tmp_path, "train.jsonl", '{"text": "a", "labels": []}\n'), "no training document has a label")


def test_labels_in_test_only(tmp_path: Path) -> None:
    path = source(tmp_path, "train.jsonl", '{"text": "a", "labels": []}\n')
    (path / "test.jsonl").write_text(GOOD)
    refused(path, "no training document has a label")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"body,labels\na,x\n", ["line 1: no column 'text'; there are: body, labels", "dataset.text_column"]),
        (b"text,text,labels\na,b,x\n", ["line 1: column 'text' is there twice"]),
        (b"text,labels\na,x\nb\n", ["line 3: 1 cells, but the header names 2"]),
        (b"text,labels\na,x\nb,c,x\n", ["line 3: 3 cells, but the header names 2", "quote"]),
        (b'text,labels\n"a\nb",x\n"c,x\nd,y\n', ["line 4: not CSV", "unexpected end of data"]),
        (b"text,labels\na,x\ncaf\xe9,x\n", ["line 3: byte 0xe9"]),
    ],
)
def test_bad_csv(tmp_path: Path, raw: bytes, words: list[str]) -> None:
    refused(source(tmp_path, "train.csv", raw), "train.csv", *words)


def test_empty_label_separator(tmp_path: Path) -> None:
    refused(source(tmp_path, "train.csv", "text,labels\na,x\n"), "dataset.label_separator is empty", label_separator="")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"body": ["a"], "labels": [["x"]]}, ["no column 'text'; there are: body, labels"]),
        ({"text": [1], "labels": [["x"]]}, ["dataset.text_column=text is of type int64, not string"]),
        ({"text": ["a"], "labels": [1]}, ["dataset.labels_column=labels is of type int64", "list of strings"]),
        ({"text": ["a"], "labels": [[1.5]]}, ["dataset.labels_column=labels is of type list", "double"]),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, Any], words: list[str]) -> None:
    path = source(tmp_path, "train.parquet", "")
    pq.write_table(pa.table(columns), path / "train.parquet")
    refused(path, "train.parquet", *words)


@pytest.mark.parametrize("keep", [30, -40])
def test_damaged_parquet(tmp_path: Path, keep: int) -> None:
    path = source(tmp_path, "train.parquet", "")
    pq.write_table(pa.table({"text": ["a"] * 99, "labels": [["x"]] * 99}), path / "train.parquet")
    (path / "train.parquet").write_bytes((path / "train.parquet").read_bytes()[:keep])
    refused(path, "train.parquet, after row 0: damaged or no Parquet file")


def test_unknown_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "all.jsonl", [{"text": "a", "labels": ["x"], "fold": f} for f in ("train", "dev")])
    refused(
        path, "all.jsonl, line 2: dataset.split_column=fold says 'dev'", "train, trn, test, tst", split_column="fold"
    )


def test_missing_split_column(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "all.jsonl", [{"text": "a", "labels": ["x"]}])
    refused(path, "no column 'fold'; there are: text, labels: set dataset.split_column", split_column="fold")


def test_nothing_left_for_training(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "all.jsonl", [{"text": "a", "labels": ["x"], "fold": "test"}])
    refused(path, "has no training document", split_column="fold")


def test_plain_and_gzipped_of_one_name(tmp_path: Path) -> None:
    path = source(tmp_path, "train.jsonl", GOOD)
    (path / "train.jsonl.gz").write_bytes(b"x")
    refused(path, "both train.jsonl and train.jsonl.gz")


def test_only_a_test_file(tmp_path: Path) -> None:
    refused(source(tmp_path, "test.jsonl", GOOD), "a test file but no training file")
