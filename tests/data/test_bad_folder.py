"""Faulty paths, text folders and matrices: one clear error each."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from tests.data.sources import Y_TEST, Y_TRAIN, made, text_folder
from xmcdist.config.schema import DatasetConfig
from xmcdist.data.errors import DataError
from xmcdist.data.prepare import check_source, prepare


def refused(path: Path, *words: str, **settings: Any) -> None:
    """Preparing fails with one DataError that has all the words, and leaves nothing behind."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(DataError) as caught:
        made(path, **settings)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert sorted(path.parent.iterdir()) == before


def with_value(value: float) -> sp.csr_matrix:
    Y = sp.csr_matrix(Y_TRAIN.astype(np.float64))
    Y.data[2] = value  # row 1, column 1
    return Y


def test_path_that_does_not_exist_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "amazon-670k").mkdir()
    (tmp_path / "wiki").mkdir()
    with pytest.raises(DataError, match=r"amazon-67k/x does not exist; .* holds amazon-670k"):
        check_source(DatasetConfig(path=str(tmp_path / "amazon-67k" / "x")))


def test_path_not_set() -> None:
    with pytest.raises(DataError, match=r"dataset\.path is not set"):
        check_source(DatasetConfig())


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.format=xml is none of auto, text, xc, jsonl, csv, parquet"):
        check_source(DatasetConfig(path=str(tmp_path), format="xml"))


def test_folder_without_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"looked for X\.trn\.txt .* it holds notes\.md"):
        check_source(DatasetConfig(path=str(tmp_path)))


def test_file_of_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"notes\.md: the format of this file .* set dataset\.format"):
        check_source(DatasetConfig(path=str(tmp_path / "notes.md")))


def test_two_data_sets_in_a_folder(tmp_path: Path) -> None:
    text_folder(tmp_path / "s")
    (tmp_path / "s" / "train.csv").write_text("text,labels\na,b\n")
    refused(tmp_path / "s", "text or csv", "set dataset.format")


def test_plain_and_gzipped_of_one_name(tmp_path: Path) -> None:
    text_folder(tmp_path / "s")
    (tmp_path / "s" / "X.trn.txt.gz").write_bytes(gzip.compress(b"x"))
    refused(tmp_path / "s", "both X.trn.txt and X.trn.txt.gz")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"Y_trn_npz": None}, ["no Y.trn.npz"]),
        ({"X_trn_txt": None, "X_tst_txt": None}, ["neither X.trn.txt nor X.trn.npz"]),
        ({"Y_tst_npz": None}, ["without Y.tst.npz"]),
        ({"X_tst_txt": None}, ["without X.tst.txt"]),
        ({"X_tst_npz": sp.csr_matrix(np.eye(2))}, ["X.tst.npz but no X.trn.npz"]),
    ],
)
def test_missing_files(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    refused(text_folder(tmp_path / "s", **changes), *words)


@pytest.mark.parametrize("name", ["X_trn_txt", "X_tst_txt", "Y_trn_npz", "output_items_txt"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    file = name.replace("output_items", "output-items").replace("_", ".")
    refused(text_folder(tmp_path / "s", **{name: b""}), f"{file} is empty")


def test_empty_gzip(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "s", X_trn_txt=None)
    (folder / "X.trn.txt.gz").write_bytes(gzip.compress(b""))
    refused(folder, "X.trn.txt.gz is empty")


def test_cut_off_gzip(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "s", X_trn_txt=None)
    (folder / "X.trn.txt.gz").write_bytes(gzip.compress(b"a\nb\nc\nd\n" * 999)[:-10])
    refused(folder, "X.trn.txt.gz: damaged or cut off gzip file")


@pytest.mark.parametrize(("text", "count"), [(b"a\nb\nc\n", 3), (b"a\nb\nc\nd\ne\n", 5)])
def test_texts_and_label_rows_of_different_counts(tmp_path: Path, text: bytes, count: int) -> None:
    refused(text_folder(tmp_path / "s", X_trn_txt=text), f"X.trn.txt has {count} lines but Y.trn.npz has 4 rows")


def test_features_and_label_rows_of_different_counts(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "s", X_trn_npz=sp.csr_matrix(np.eye(3)), X_tst_npz=sp.csr_matrix(np.eye(2, 3)))
    refused(folder, "X.trn.npz has 3 rows but Y.trn.npz has 4 rows")


def test_label_spaces_of_different_size(tmp_path: Path) -> None:
    refused(text_folder(tmp_path / "s", Y_tst_npz=sp.csr_matrix(Y_TEST[:, :3])), "Y.tst.npz has 3 columns", "has 4")


def test_label_texts_of_different_count(tmp_path: Path) -> None:
    refused(text_folder(tmp_path / "s", output_items_txt=b"a\nb\n"), "output-items.txt has 2 lines", "4 columns")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("which", ["Y", "X"])
def test_values_that_are_not_finite(tmp_path: Path, value: float, which: str) -> None:
    changes: dict[str, Any] = {f"{which}_trn_npz": with_value(value)}
    if which == "X":
        changes["X_tst_npz"] = sp.csr_matrix((2, 4))
    folder = text_folder(tmp_path / "s", **changes)
    refused(folder, f"{which}.trn.npz: row 1, column 1: value {value}", "finite", "remove")


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
def test_negative_label_weight(tmp_path: Path, form: Any) -> None:
    folder = text_folder(tmp_path / "s", Y_trn_npz=form(with_value(-2)))
    refused(folder, "Y.trn.npz: row 1, column 1: value -2.0 is negative")


def test_no_labels_at_all(tmp_path: Path) -> None:
    refused(text_folder(tmp_path / "s", Y_trn_npz=sp.csr_matrix((4, 4))), "Y.trn.npz: no document has a label")


def test_no_rows_at_all(tmp_path: Path) -> None:
    refused(text_folder(tmp_path / "s", Y_trn_npz=sp.csr_matrix((0, 4))), "Y.trn.npz has no rows")


def test_complex_numbers(tmp_path: Path) -> None:
    refused(text_folder(tmp_path / "s", Y_trn_npz=sp.csr_matrix(Y_TRAIN * 1j)), "complex", "not real numbers")


def test_invalid_utf8_names_the_line(tmp_path: Path) -> None:
    refused(text_folder(tmp_path / "s", X_trn_txt=b"a\nb\ncaf\xe9 x\nd\n"), "X.trn.txt, line 3: byte 0xe9", "iconv")


def test_label_texts_in_another_encoding(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "s", output_items_txt="a\nb\nc\nd".encode("utf-16"))
    refused(folder, "output-items.txt, line 1: byte 0xff")


def whole_npz() -> bytes:
    out = io.BytesIO()
    sp.save_npz(out, sp.csr_matrix(Y_TRAIN))
    return out.getvalue()


@pytest.mark.parametrize(
    "raw", [whole_npz()[:-30], whole_npz()[:40], b"no archive", whole_npz()[:200] + b"\0" * 60 + whole_npz()[260:]]
)
def test_damaged_npz(tmp_path: Path, raw: bytes) -> None:
    refused(text_folder(tmp_path / "s", Y_trn_npz=raw), "Y.trn.npz: not a whole scipy sparse .npz file")


def test_npz_of_something_else(tmp_path: Path) -> None:
    out = io.BytesIO()
    np.savez(out, a=np.eye(3))
    refused(text_folder(tmp_path / "s", Y_trn_npz=out.getvalue()), "Y.trn.npz: not a whole scipy sparse")


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
def test_npz_with_indices_out_of_range(tmp_path: Path, form: Any) -> None:
    out = io.BytesIO()
    Y = form(Y_TRAIN)
    indices = Y.indices.copy()
    indices[1] = 1 << 20
    np.savez(out, format=Y.format.encode(), shape=Y.shape, data=Y.data, indices=indices, indptr=Y.indptr)
    refused(text_folder(tmp_path / "s", Y_trn_npz=out.getvalue()), "Y.trn.npz: not a whole scipy sparse")


class _Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.place, "w"))


@pytest.mark.parametrize("how", ["member", "shape", "bare"])
def test_pickles_are_never_run(tmp_path: Path, how: str) -> None:
    trap = _Trap(str(tmp_path / "sprung"))
    Y = sp.csr_matrix(Y_TRAIN)
    out = io.BytesIO()
    box = np.empty(1, object)
    box[0] = trap
    if how == "bare":
        out.write(pickle.dumps(trap))
    else:
        with zipfile.ZipFile(out, "w") as archive:
            parts = {"format": np.array(b"csr"), "shape": np.array(Y.shape), "data": Y.data, "indices": Y.indices}
            parts |= {"indptr": Y.indptr, ("data" if how == "member" else "shape"): box}
            for name, part in parts.items():
                with archive.open(f"{name}.npy", "w") as f:
                    np.lib.format.write_array(f, part, allow_pickle=True)
    said = "not a whole scipy sparse .npz file (no archive)" if how == "bare" else "holds pickled Python objects"
    refused(text_folder(tmp_path / "s", Y_trn_npz=out.getvalue()), f"Y.trn.npz: {said}")
    assert not (tmp_path / "sprung").exists()


def test_a_strange_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(DataError, match="other things in it"):
        prepare(DatasetConfig(path=str(text_folder(tmp_path / "s"))), tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"
