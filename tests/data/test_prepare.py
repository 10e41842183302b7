"""Preparing is atomic, repeatable, bounded in memory; what is prepared can be vouched for."""

from __future__ import annotations

import errno
import gzip
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from tests.data.sources import TRAIN, Y_TRAIN, jsonl, text_folder
from xmcdist.config.schema import DatasetConfig
from xmcdist.data import manifest as manifests
from xmcdist.data import prepare as preparing
from xmcdist.data.dataset import PreparedDataset, TextStore
from xmcdist.data.errors import DataError
from xmcdist.data.prepare import check_source, prepare
from xmcdist.data.texts import TextWriter


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_same_source_is_not_written_again(tmp_path: Path) -> None:
    cfg = DatasetConfig(path=str(text_folder(tmp_path / "s")))
    first = prepare(cfg, tmp_path / "p")
    before = stamps(tmp_path / "p")
    cfg.test_fraction, cfg.text_column, cfg.name = 0.5, "other", "renamed"  # not read for this format
    second = prepare(cfg, tmp_path / "p")
    assert stamps(tmp_path / "p") == before
    assert second.fingerprint == first.fingerprint


def test_equal_data_have_equal_fingerprints_wherever_they_lie(tmp_path: Path) -> None:
    a = prepare(DatasetConfig(path=str(text_folder(tmp_path / "a"))), tmp_path / "pa")
    packed = text_folder(tmp_path / "b", X_trn_txt=None)
    (packed / "X.trn.txt.gz").write_bytes(gzip.compress("\n".join(TRAIN).encode()))
    b = prepare(DatasetConfig(path=str(packed)), tmp_path / "pb")
    assert a.fingerprint == b.fingerprint


def test_changed_source_or_setting_is_prepared_anew(tmp_path: Path) -> None:
    cfg = DatasetConfig(path=str(text_folder(tmp_path / "s", Y_trn_npz=sp.csr_matrix(np.diag([1.0, 1, 1, 0])))))
    first = prepare(cfg, tmp_path / "p")
    cfg.drop_unlabelled = True
    second = prepare(cfg, tmp_path / "p")
    assert (first.num_docs("trn"), second.num_docs("trn")) == (4, 3)
    text_folder(tmp_path / "s", X_trn_txt=b"other\nb\nc\nd\n")
    third = prepare(cfg, tmp_path / "p")
    assert third.texts("trn")[0] == "other"
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p", "s"]


def test_cut_off_prepared_file_is_prepared_anew(tmp_path: Path) -> None:
    cfg = DatasetConfig(path=str(text_folder(tmp_path / "s")))
    prepare(cfg, tmp_path / "p")
    whole = contents(tmp_path / "p")
    (tmp_path / "p" / "texts.trn.bin").write_bytes(b"red")
    with pytest.raises(DataError, match=r"texts\.trn\.bin is missing or was cut off"):
        PreparedDataset.open(tmp_path / "p")
    prepare(cfg, tmp_path / "p")
    assert contents(tmp_path / "p") == whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("place", ["texts", "manifest", "move"])
def test_full_disk_leaves_the_old_form_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, place: str
) -> None:
    cfg = DatasetConfig(path=str(text_folder(tmp_path / "s")))
    prepare(cfg, tmp_path / "p")
    before = contents(tmp_path / "p")
    text_folder(tmp_path / "s", X_trn_txt=b"a\nb\nc\nd\n")

    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    if place == "texts":
        monkeypatch.setattr(TextWriter, "_flush", full)
    elif place == "manifest":
        monkeypatch.setattr(preparing, "write_manifest", full)
    else:
        monkeypatch.setattr(preparing, "_put", full)
    with pytest.raises(DataError, match=r"no space left while writing .*/p: free some space"):
        prepare(cfg, tmp_path / "p")
    assert contents(tmp_path / "p") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p", "s"]


def test_failed_move_puts_the_old_form_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = DatasetConfig(path=str(text_folder(tmp_path / "s")))
    prepare(cfg, tmp_path / "p")
    before = contents(tmp_path / "p")
    text_folder(tmp_path / "s", X_trn_txt=b"a\nb\nc\nd\n")
    real = os.replace

    def replace(old: Path, new: Path) -> None:
        if str(old).endswith(".tmp") and Path(old).is_dir():
            raise OSError(errno.EIO, "no")
        real(old, new)

    monkeypatch.setattr(preparing.os, "replace", replace)
    with pytest.raises(OSError, match="no"):
        prepare(cfg, tmp_path / "p")
    assert contents(tmp_path / "p") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p", "s"]


def test_remains_of_killed_runs_go(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = os.uname().nodename
    remains = tmp_path / f".p.{host}.{dead.stdout.strip()}.tmp"
    other = tmp_path / f".p.elsewhere.{dead.stdout.strip()}.tmp"
    for folder in (remains, other):
        folder.mkdir()
    prepare(DatasetConfig(path=str(text_folder(tmp_path / "s"))), tmp_path / "p")
    assert not remains.exists()
    assert other.exists()


def test_a_faster_job_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = DatasetConfig(path=str(text_folder(tmp_path / "s")))
    real = preparing.build_manifest
    at: dict[str, int] = {}

    def slow(*args: object) -> object:
        if not at:
            at["started"] = 1
            prepare(cfg, tmp_path / "p2")
            os.replace(tmp_path / "p2", tmp_path / "p")
            at.update(stamps(tmp_path / "p"))
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(preparing, "build_manifest", slow)
    prepare(cfg, tmp_path / "p")
    at.pop("started")
    assert stamps(tmp_path / "p") == at


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    data = prepare(DatasetConfig(path=str(text_folder(tmp_path / "s"))), tmp_path / "p")
    data.verify()
    path = tmp_path / "p" / "Y.trn" / "data.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"Y\.trn/data\.npy is not what was written"):
        data.verify()


def test_opening_what_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no prepared data set"):
        PreparedDataset.open(tmp_path)


def test_other_format_version_is_refused_and_prepared_anew(tmp_path: Path) -> None:
    cfg = DatasetConfig(path=str(text_folder(tmp_path / "s")))
    prepare(cfg, tmp_path / "p")
    path = tmp_path / "p" / manifests.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(DataError, match="format version 99"):
        PreparedDataset.open(tmp_path / "p")
    assert prepare(cfg, tmp_path / "p").manifest["format_version"] != 99


def test_unknown_split(tmp_path: Path) -> None:
    data = prepare(DatasetConfig(path=str(text_folder(tmp_path / "s"))), tmp_path / "p")
    with pytest.raises(ValueError, match="split='dev' is none of trn, tst"):
        data.Y("dev")


def test_matrices_and_texts_are_mapped(tmp_path: Path) -> None:
    data = prepare(DatasetConfig(path=str(text_folder(tmp_path / "s"))), tmp_path / "p")
    Y = data.Y("trn")
    assert (Y.toarray() == Y_TRAIN).all()
    assert not Y.data.flags.writeable
    assert len(pickle.dumps(data.texts("trn"))) < 400


def test_check_source_does_not_read_the_texts(tmp_path: Path) -> None:
    source = check_source(DatasetConfig(path=str(text_folder(tmp_path / "s", X_trn_txt=b"\xff\n"))))
    assert source.format == "text"


def test_text_store(tmp_path: Path) -> None:
    texts = ["", "größer", "日本", "", "a\nb\r"] + [f"doc {i}" * (i % 3) for i in range(5000)]
    with TextWriter(tmp_path, "t") as writer:
        for text in texts:
            writer.append(text)
    store = TextStore.open(tmp_path, "t")
    assert list(store) == texts
    assert [store[i] for i in (0, 1, 2, -1, 5004)] == [texts[i] for i in (0, 1, 2, -1, 5004)]
    assert list(store.iterate(1020, 2060)) == texts[1020:2060]
    assert list(store.iterate(5000)) == texts[5000:]
    assert list(store.iterate(7, 7)) == []
    assert list(pickle.loads(pickle.dumps(store))) == texts
    assert writer.empty == sum(not t.strip() for t in texts)
    with pytest.raises(IndexError, match="text 5005 of 5005"):
        store[5005]
    (tmp_path / "t.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"t\.bin: 1 bytes do not fit its offsets"):
        TextStore(tmp_path, "t")


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_text_store_of_nothing(tmp_path: Path, texts: list[str]) -> None:
    with TextWriter(tmp_path, "t") as writer:
        for text in texts:
            writer.append(text)
    assert list(TextStore(tmp_path, "t")) == texts


def peak(cfg: DatasetConfig, folder: Path) -> int:
    tracemalloc.start()
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    try:
        data = prepare(cfg, folder)
        for _ in data.texts("trn"):
            pass
        return tracemalloc.get_traced_memory()[1] + max(pool.max_memory() - before, 0)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["text", "gz", "jsonl", "csv", "parquet"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, kind: str) -> None:
    documents, size = 3000, 8000  # 24 MB of text
    text = "word " * (size // 5)
    if kind in ("text", "gz"):
        raw = (text + "\n").encode() * documents
        Y = sp.csr_matrix(np.ones((documents, 1)))
        folder = text_folder(
            tmp_path / "s", X_tst_txt=None, Y_tst_npz=None, output_items_txt=None, X_trn_txt=None, Y_trn_npz=Y
        )
        (folder / ("X.trn.txt" if kind == "text" else "X.trn.txt.gz")).write_bytes(
            raw if kind == "text" else gzip.compress(raw, 1)
        )
        del raw
    else:
        folder = tmp_path / "s"
        folder.mkdir()
        if kind == "parquet":
            table = pa.table({"text": [f"{i} {text}" for i in range(documents)], "labels": [["x"]] * documents})
            pq.write_table(table, folder / "train.parquet", compression="none", use_dictionary=False)
            del table
        elif kind == "csv":
            (folder / "train.csv").write_text("text,labels\n" + f"{text},x\n" * documents)
        else:
            jsonl(folder / "train.jsonl", [{"text": text, "labels": ["x"]}] * documents)
    prepare(DatasetConfig(path=str(text_folder(tmp_path / "small"))), tmp_path / "warm")  # imports come first
    used = peak(DatasetConfig(path=str(folder)), tmp_path / "p")
    assert used < documents * size / 3, f"{used / 1e6:.1f} MB for 24 MB of text"
