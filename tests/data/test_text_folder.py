"""Text folders: what is legal and how it comes out."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from tests.data.sources import TEST, TRAIN, Y_TEST, Y_TRAIN, dense, made, text_folder


def test_reads_texts_labels_and_label_texts(tmp_path: Path) -> None:
    data = made(text_folder(tmp_path / "s"))
    assert list(data.texts("trn")) == TRAIN
    assert list(data.texts("tst")) == TEST
    assert (dense(data.Y("trn")) == Y_TRAIN).all()
    assert (dense(data.Y("tst")) == Y_TEST).all()
    assert list(data.label_texts()) == ["warm", "light", "wool", "never"]
    assert data.X("trn") is None
    assert (data.num_labels, data.num_docs("trn"), data.num_docs("tst")) == (4, 4, 2)
    assert data.has_text
    assert data.has_test
    assert data.label_ids() is None
    counts = data.manifest["splits"]["trn"]
    assert counts["documents"] == 4
    assert counts["empty_documents"] == 1
    assert counts["labels_per_document_mean"] == pytest.approx(Y_TRAIN.sum(1).mean())
    assert counts["labels_per_document_max"] == 2
    assert data.manifest["labels_without_training_documents"] == 1
    assert any("1 of 4 labels have no training document" in w for w in data.warnings)
    assert any("1 of 4 training documents have no words" in w for w in data.warnings)


@pytest.mark.parametrize(
    "form", [sp.csr_matrix, sp.csc_matrix, sp.coo_matrix, sp.csr_array, sp.csc_array, sp.bsr_array]
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int8, np.int64, np.bool_, np.uint16])
def test_any_sparse_form_and_number(tmp_path: Path, form: Any, dtype: Any) -> None:
    data = made(text_folder(tmp_path / "s", Y_trn_npz=form(Y_TRAIN.astype(dtype))))
    Y = data.Y("trn")
    assert Y.dtype == np.float32
    assert Y.has_sorted_indices
    assert (dense(Y) == Y_TRAIN).all()


@pytest.mark.parametrize("dtype", [np.int8, np.bool_, np.float64])
def test_unsorted_and_duplicate_entries_are_summed(tmp_path: Path, dtype: Any) -> None:
    unsorted = sp.csr_matrix(
        (np.ones(7, dtype), np.array([2, 0, 2, 1, 2, 2, 0]), np.array([0, 3, 4, 5, 7])), shape=(4, 4)
    )
    data = made(text_folder(tmp_path / "s", Y_trn_npz=unsorted))
    expected = Y_TRAIN.copy()
    expected[0, 2] = 2
    assert (dense(data.Y("trn")) == expected).all()
    assert data.Y("trn")[0].indices.tolist() == [0, 2]
    assert data.manifest["summed_duplicate_entries"] == 1
    assert any("1 matrix entries were given twice" in w for w in data.warnings)


def test_summing_does_not_overflow_small_integers(tmp_path: Path) -> None:
    twice = sp.coo_matrix((np.array([100, 100], np.int8), ([0, 0], [1, 1])), shape=(4, 4))
    data = made(text_folder(tmp_path / "s", Y_trn_npz=twice))
    assert dense(data.Y("trn"))[0, 1] == 200


def test_stored_zero_is_no_label(tmp_path: Path) -> None:
    Y = sp.csr_matrix(Y_TRAIN)
    Y.data[0] = 0
    data = made(text_folder(tmp_path / "s", Y_trn_npz=Y))
    assert data.Y("trn").nnz == Y.nnz - 1
    assert data.manifest["summed_duplicate_entries"] == 0


def test_windows_line_ends_and_missing_final_newline(tmp_path: Path) -> None:
    data = made(text_folder(tmp_path / "s", X_trn_txt="\r\n".join(TRAIN).encode()))
    assert list(data.texts("trn")) == TRAIN


def test_last_document_may_be_empty(tmp_path: Path) -> None:
    data = made(text_folder(tmp_path / "s", X_trn_txt=b"a\nb\nc\n\n"))
    assert list(data.texts("trn")) == ["a", "b", "c", ""]


def test_only_line_feeds_part_documents(tmp_path: Path) -> None:
    documents = ["a\x0bb\x0cc\x1cd", "e\u2028f\u2029g", "h\x85i\rj", "k \x00 l"]
    data = made(text_folder(tmp_path / "s", X_trn_txt="\n".join(documents).encode()))
    assert list(data.texts("trn")) == documents


def test_byte_order_mark_goes(tmp_path: Path) -> None:
    data = made(text_folder(tmp_path / "s", X_trn_txt=b"\xef\xbb\xbfa\nb\nc\nd\n"))
    assert data.texts("trn")[0] == "a"


def test_gzipped_texts(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "s", X_trn_txt=None, output_items_txt=None)
    (folder / "X.trn.txt.gz").write_bytes(gzip.compress("\n".join(TRAIN).encode()))
    (folder / "output-items.txt.gz").write_bytes(gzip.compress(b"a\nb\nc\nd"))
    data = made(folder)
    assert list(data.texts("trn")) == TRAIN
    assert list(data.label_texts()) == ["a", "b", "c", "d"]


def test_labels_without_texts_are_named_by_number(tmp_path: Path) -> None:
    assert list(made(text_folder(tmp_path / "s", output_items_txt=None)).label_texts()) == ["0", "1", "2", "3"]


def test_no_test_split(tmp_path: Path) -> None:
    data = made(text_folder(tmp_path / "s", X_tst_txt=None, Y_tst_npz=None))
    assert not data.has_test
    assert data.num_docs("tst") == 0
    assert any("no test split" in w for w in data.warnings)
    with pytest.raises(ValueError, match="has no test split"):
        data.Y("tst")


def test_features_beside_texts(tmp_path: Path) -> None:
    X = np.array([[0, 1.5], [2, 0], [0, 0], [-1, 1]])
    data = made(text_folder(tmp_path / "s", X_trn_npz=sp.csc_matrix(X), X_tst_npz=sp.csr_array(X[:2])))
    assert (dense(data.X("trn")) == X).all()
    assert (dense(data.X("tst")) == X[:2]).all()
    assert data.num_features == 2
    assert data.has_text


def test_features_alone(tmp_path: Path) -> None:
    X = sp.csr_matrix(np.array([[0, 1.5], [2, 0], [0, 0], [-1, 1]]))
    data = made(text_folder(tmp_path / "s", X_trn_txt=None, X_tst_txt=None, X_trn_npz=X, X_tst_npz=X[:2]))
    assert not data.has_text
    assert data.manifest["splits"]["trn"]["empty_documents"] == 1
    with pytest.raises(ValueError, match="has no texts"):
        data.texts("trn")


@pytest.mark.parametrize("drop", [False, True])
def test_unlabelled_documents(tmp_path: Path, drop: bool) -> None:
    Y = Y_TRAIN.copy()
    Y[1] = 0
    X = np.arange(8.0).reshape(4, 2)
    folder = text_folder(
        tmp_path / "s", Y_trn_npz=sp.csr_matrix(Y), X_trn_npz=sp.csr_matrix(X), X_tst_npz=sp.csr_matrix(X[:2])
    )
    data = made(folder, drop_unlabelled=drop)
    kept = [0, 2, 3] if drop else [0, 1, 2, 3]
    assert list(data.texts("trn")) == [TRAIN[i] for i in kept]
    assert (dense(data.Y("trn")) == Y[kept]).all()
    assert (dense(data.X("trn")) == X[kept]).all()
    assert data.manifest["dropped_unlabelled_documents"] == int(drop)
    assert data.manifest["splits"]["trn"]["unlabelled_documents"] == int(not drop)
    said = "1 training documents without a label were left out" if drop else "1 of 4 training documents have no label"
    assert any(said in w for w in data.warnings)


def test_test_documents_without_labels_stay(tmp_path: Path) -> None:
    data = made(text_folder(tmp_path / "s", Y_tst_npz=sp.csr_matrix((2, 4))), drop_unlabelled=True)
    assert data.num_docs("tst") == 2
    assert data.Y("tst").nnz == 0
