"""Text files of the Extreme Classification Repository."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_svmlight_file
from sklearn.preprocessing import MultiLabelBinarizer

from tests.data.sources import dense, made
from xmcdist.data.errors import DataError

BODY = "0,2 1:0.5 3:1e-2\n1 0:2\n 2:1.25\n0,1,3 0:1 1:1 2:-1 3:1\n2\n"


def xc(folder: Path, train: str | bytes, test: str | None = None, prefix: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / f"{prefix}train.txt").write_bytes(train if isinstance(train, bytes) else train.encode())
    if test is not None:
        (folder / f"{prefix}test.txt").write_text(test)
    return folder


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        made(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("prefix", ["", "Eurlex_"])
def test_agrees_with_scikit_learn(tmp_path: Path, prefix: str) -> None:
    data = made(xc(tmp_path / "s", "5 4 4\n" + BODY, "1 4 4\n3 0:1\n", prefix))
    X, labels = load_svmlight_file(io.BytesIO(BODY.encode()), n_features=4, multilabel=True, zero_based=True)
    Y = MultiLabelBinarizer(classes=[0, 1, 2, 3]).fit_transform([tuple(int(i) for i in row) for row in labels])
    np.testing.assert_array_equal(dense(data.X("trn")), X.toarray().astype(np.float32))
    np.testing.assert_array_equal(dense(data.Y("trn")), Y)
    assert dense(data.Y("tst")).tolist() == [[0, 0, 0, 1]]
    assert not data.has_text
    assert data.manifest["has_text"] is False
    counts = data.manifest["splits"]["trn"]
    assert (counts["empty_documents"], counts["unlabelled_documents"]) == (1, 1)
    assert list(data.label_texts()) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "body", [BODY.replace("\n", "\r\n"), BODY[:-1], BODY + "\n\n", BODY.replace(" 2:1.25", "2:1.25")]
)
def test_line_ends_and_missing_label_part(tmp_path: Path, body: str) -> None:
    data = made(xc(tmp_path / "s", "5 4 4\n" + body))
    assert data.Y("trn").nnz == 7
    assert data.X("trn").nnz == 8  # type: ignore[union-attr]
    assert not data.has_test


def test_a_file_by_itself(tmp_path: Path) -> None:
    folder = xc(tmp_path / "s", "5 4 4\n" + BODY)
    assert made(folder / "train.txt").num_docs("trn") == 5


def test_many_rows_cross_chunks(tmp_path: Path) -> None:
    rows = [f"{i % 7} {i % 11}:{i + 1}" for i in range(5000)]
    data = made(xc(tmp_path / "s", "5000 11 7\n" + "\n".join(rows)))
    Y, X = data.Y("trn"), data.X("trn")
    assert X is not None
    assert Y.indices.tolist() == [i % 7 for i in range(5000)]
    assert X.indices.tolist() == [i % 11 for i in range(5000)]
    assert X.data.tolist() == [i + 1 for i in range(5000)]


def test_unsorted_and_duplicates_are_summed(tmp_path: Path) -> None:
    data = made(xc(tmp_path / "s", "1 4 4\n3,1,3 2:1 0:2 2:5 1:0\n"))
    assert dense(data.X("trn")).tolist() == [[2, 0, 6, 0]]
    assert dense(data.Y("trn")).tolist() == [[0, 1, 0, 2]]
    assert data.manifest["summed_duplicate_entries"] == 2


def test_drop_unlabelled(tmp_path: Path) -> None:
    data = made(xc(tmp_path / "s", "5 4 4\n" + BODY, "2 4 4\n 0:1\n1 0:1\n"), drop_unlabelled=True)
    assert (data.num_docs("trn"), data.num_docs("tst")) == (4, 2)
    assert data.X("trn").shape == (4, 4)  # type: ignore[union-attr]
    assert data.manifest["dropped_unlabelled_documents"] == 1


@pytest.mark.parametrize("header", ["5 4", "5 4 4 4", "a 4 4", "-5 4 4", "5.0 4 4", "0,2 1:0.5", ""])
def test_malformed_header(tmp_path: Path, header: str) -> None:
    refused(xc(tmp_path / "s", f"{header}\n{BODY}"), "train.txt, line 1", "documents features labels")


@pytest.mark.parametrize("header", ["0 4 4", "5 4 0"])
def test_header_of_nothing(tmp_path: Path, header: str) -> None:
    refused(xc(tmp_path / "s", f"{header}\n{BODY}"), "train.txt, line 1", "must be positive")


@pytest.mark.parametrize("said", [4, 6])
def test_count_mismatch(tmp_path: Path, said: int) -> None:
    refused(xc(tmp_path / "s", f"{said} 4 4\n{BODY}"), f"the header says {said} documents, 5 follow")


def test_headers_that_differ(tmp_path: Path) -> None:
    refused(xc(tmp_path / "s", "5 4 4\n" + BODY, "1 4 5\n1 1:1\n"), "test.txt, line 1", "5 labels")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("4 1:1", "line 2: label 4 is out of range: the header says 4 labels, 0 to 3"),
        ("-1 1:1", "line 2: label -1 is out of range"),
        ("1 4:1", "line 2: feature 4 is out of range"),
        ("1 -1:1", "line 2: feature -1 is out of range"),
        ("a 1:1", "line 2: label 'a' is not a whole number"),
        ("1,,2 1:1", "line 2: label '' is not a whole number"),
        ("1 x:1", "line 2: feature 'x' is not a whole number"),
        ("1 2", "line 2: '2' is no feature:value pair"),
        ("1 2:", "line 2: '2:' is no feature:value pair"),
        ("1 2:x", "line 2: '2:x' is no feature:value pair"),
        ("1 2:nan", "line 2: '2:nan': the value is not a finite float32"),
        ("1 2:-inf", "line 2: '2:-inf': the value is not a finite float32"),
        ("1 2:1e39", "line 2: '2:1e39': the value is not a finite float32"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, words: str) -> None:
    refused(xc(tmp_path / "s", f"1 4 4\n{line}\n"), f"train.txt, {words}")


def test_no_labels_at_all(tmp_path: Path) -> None:
    refused(xc(tmp_path / "s", "1 4 4\n 1:1\n"), "no document has a label")


def test_empty_file(tmp_path: Path) -> None:
    refused(xc(tmp_path / "s", ""), "train.txt is empty")


def test_header_in_another_encoding(tmp_path: Path) -> None:
    refused(xc(tmp_path / "s", b"\xff\xfe1 4 4\n"), "train.txt, line 1: byte 0xff")


def test_no_training_file(tmp_path: Path) -> None:
    folder = xc(tmp_path / "s", "x", "1 4 4\n1 1:1\n")
    (folder / "train.txt").unlink()
    refused(folder, "no training file")


def test_two_training_files(tmp_path: Path) -> None:
    folder = xc(tmp_path / "s", "5 4 4\n" + BODY)
    (folder / "b_train.txt").write_text("5 4 4\n" + BODY)
    refused(folder, "b_train.txt and train.txt: keep one")
