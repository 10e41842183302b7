"""JSONL, CSV and Parquet."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.preprocessing import MultiLabelBinarizer

from tests.data.sources import dense, jsonl, made
from xmcdist.data.labelled import held_out

TRAIN: list[tuple[str, list[str]]] = [
    ("red wool hat", ["warm", "wool"]),
    ('says "hi", twice\nand goes on', ["light"]),
    ("", ["wool"]),
    ("größer & 日本 \u2028 x", []),
    ("x" * 200_000, ["ä", "Zebra", "warm"]),
]
TEST: list[tuple[str, list[str]]] = [("grey scarf", ["wool", "unseen", "unseen too"]), ("b", ["unseen"])]
NAMES = ["Zebra", "light", "warm", "wool", "ä"]  # sorted by code point


def write(path: Path, rows: list[tuple[str, list[str]]], kind: str) -> None:
    path.parent.mkdir(exist_ok=True)
    if kind == "jsonl":
        jsonl(path, [{"text": t, "labels": y} for t, y in rows])
    elif kind == "parquet":
        pq.write_table(pa.table({"labels": [y for _, y in rows], "text": [t for t, _ in rows]}), path, row_group_size=2)
    else:
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(["id", "text", "labels"])
        writer.writerows([i, t, "; ".join(y)] for i, (t, y) in enumerate(rows))
        path.write_bytes(out.getvalue().encode())


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("names", [("train", "test"), ("shop.trn", "shop.tst"), ("train-00000-of-00001", "test-0")])
def test_agrees_with_scikit_learn(tmp_path: Path, kind: str, names: tuple[str, str]) -> None:
    for name, rows in zip(names, (TRAIN, TEST), strict=True):
        write(tmp_path / "s" / f"{name}.{kind}", rows, kind)
    data = made(tmp_path / "s")
    binarizer = MultiLabelBinarizer().fit([y for _, y in TRAIN])
    assert list(data.label_texts()) == NAMES == sorted(binarizer.classes_)
    columns = [list(binarizer.classes_).index(name) for name in NAMES]
    np.testing.assert_array_equal(dense(data.Y("trn")), binarizer.transform([y for _, y in TRAIN])[:, columns])
    assert dense(data.Y("tst")).tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert list(data.texts("trn")) == [t for t, _ in TRAIN]
    assert list(data.texts("tst")) == [t for t, _ in TEST]
    assert data.manifest["dropped_test_labels"] == {"labels": 2, "entries": 3}
    assert any("2 labels occur in test documents only; their 3 entries were dropped" in w for w in data.warnings)
    assert [*(data.label_ids() or [])] == NAMES


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_gzipped(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "s" / f"train.{kind}", TRAIN, kind)
    plain = tmp_path / "s" / f"train.{kind}"
    plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    data = made(tmp_path / "s")
    assert list(data.texts("trn")) == [t for t, _ in TRAIN]
    assert not data.has_test


def test_several_files_of_a_split_are_read_by_name(tmp_path: Path) -> None:
    for i in (1, 0):
        write(tmp_path / "s" / f"train-{i}.jsonl", [(f"doc {i}", ["a"])], "jsonl")
    assert list(made(tmp_path / "s").texts("trn")) == ["doc 0", "doc 1"]


def test_integer_labels_and_other_column_names(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "trn.json", [{"title": "a", "target": [10, 2]}, {"title": None, "target": None}])
    jsonl(tmp_path / "tst.json", [{"title": "b", "target": ["2"]}])
    data = made(path.parent, text_column="title", labels_column="target")
    assert list(data.label_texts()) == ["10", "2"]
    assert list(data.texts("trn")) == ["a", ""]
    assert dense(data.Y("tst")).tolist() == [[0, 1]]


def test_jsonl_blank_lines_windows_ends_no_final_newline(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    raw = b'\xef\xbb\xbf{"text": "a\\u2028b", "labels": ["x"]}\r\n\r\n{"text": "c", "labels": []}'
    (tmp_path / "s" / "train.jsonl").write_bytes(raw)
    assert list(made(tmp_path / "s").texts("trn")) == ["a\u2028b", "c"]


def test_label_names_are_stripped_and_repeats_summed(tmp_path: Path) -> None:
    jsonl(tmp_path / "s" / "train.jsonl", [{"text": "a", "labels": [" x", "x ", "", "y"]}])
    data = made(tmp_path / "s")
    assert list(data.label_texts()) == ["x", "y"]
    assert dense(data.Y("trn")).tolist() == [[2, 1]]
    assert data.manifest["summed_duplicate_entries"] == 1


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_label_separator(tmp_path: Path, kind: str) -> None:
    (tmp_path / "s").mkdir()
    if kind == "csv":
        (tmp_path / "s" / "train.csv").write_bytes(b"text,labels\r\nt,a b|c|\r\n\r\nu,\r\n")
    else:
        pq.write_table(pa.table({"text": ["t", "u"], "labels": ["a b|c|", None]}), tmp_path / "s" / "train.parquet")
    data = made(tmp_path / "s", label_separator="|")
    assert list(data.label_texts()) == ["a b", "c"]
    assert dense(data.Y("trn")).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("item", [pa.int32(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_parquet_label_types(tmp_path: Path, item: Any) -> None:
    values = [[1, 2], [2]] if item == pa.int32() else [["1", "2"], ["2"]]
    labels = pa.array([["1", "2"], ["2"]], pa.list_(pa.string())).cast(pa.list_(pa.string()))
    labels = pa.array(values, pa.large_list(item)) if item == pa.int32() else labels.cast(pa.large_list(item))
    (tmp_path / "s").mkdir()
    table = pa.table({"text": pa.array(["a", "b"], pa.large_string()), "labels": labels})
    pq.write_table(table, tmp_path / "s" / "train.parquet")
    data = made(tmp_path / "s")
    assert list(data.label_texts()) == ["1", "2"]
    assert dense(data.Y("trn")).tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("where", ["folder", "file"])
def test_single_file_with_split_column(tmp_path: Path, where: str) -> None:
    said = ["TRAIN", "tst", " trn ", "Test"]
    path = jsonl(
        tmp_path / "s" / "all.jsonl", [{"text": str(i), "labels": ["a"], "fold": s} for i, s in enumerate(said)]
    )
    data = made(path if where == "file" else path.parent, split_column="fold")
    assert list(data.texts("trn")) == ["0", "2"]
    assert list(data.texts("tst")) == ["1", "3"]


def test_single_file_seeded_split(tmp_path: Path) -> None:
    rows = [(f"doc {i}", [f"l{i % 5}"]) for i in range(400)]
    folds = {}
    for kind in ("jsonl", "csv", "parquet"):
        write(tmp_path / kind / f"all.{kind}", rows, kind)
        for seed in (0, 1):
            data = made(tmp_path / kind / f"all.{kind}", test_fraction=0.25, split_seed=seed)
            tst = list(data.texts("tst"))
            assert sorted([*data.texts("trn"), *tst]) == sorted(t for t, _ in rows)
            assert tst == [t for i, (t, _) in enumerate(rows) if held_out(seed, i, 0.25)]
            assert folds.setdefault(seed, tst) == tst
    assert 70 < len(folds[0]) < 130
    assert folds[0] != folds[1]


def test_seeded_split_is_fixed_for_ever() -> None:
    assert [i for i in range(40) if held_out(0, i, 0.1)] == [28, 32]


def test_split_column_without_effect_is_told(tmp_path: Path) -> None:
    jsonl(tmp_path / "s" / "train.jsonl", [{"text": "a", "labels": ["x"]}])
    assert any(
        "dataset.split_column=fold has no effect" in w for w in made(tmp_path / "s", split_column="fold").warnings
    )


def test_drop_unlabelled(tmp_path: Path) -> None:
    write(tmp_path / "s" / "train.jsonl", TRAIN, "jsonl")
    write(tmp_path / "s" / "test.jsonl", [("b", [])], "jsonl")
    data = made(tmp_path / "s", drop_unlabelled=True)
    assert list(data.texts("trn")) == [t for t, y in TRAIN if y]
    assert data.Y("trn").shape == (4, 5)
    assert data.num_docs("tst") == 1
    assert data.manifest["dropped_unlabelled_documents"] == 1
