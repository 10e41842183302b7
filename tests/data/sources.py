"""Small data sets in every source format, and what must come out of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from xmcdist.config.schema import DatasetConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.data.prepare import prepare

TRAIN = ["red wool hat", "blue cotton shirt", "", "green wool socks"]
TEST = ["grey wool scarf", "white shirt"]
Y_TRAIN = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0]], np.float32)  # label 3 has no document
Y_TEST = np.array([[1, 0, 1, 0], [0, 1, 0, 0]], np.float32)


def text_folder(folder: Path, **changes: Any) -> Path:
    """A text folder; a change of None leaves a file out, bytes or a matrix replace it ("X.trn.txt" -> X_trn_txt)."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {
        "X.trn.txt": "\n".join(TRAIN).encode() + b"\n",
        "X.tst.txt": "\n".join(TEST).encode() + b"\n",
        "Y.trn.npz": sp.csr_matrix(Y_TRAIN),
        "Y.tst.npz": sp.csr_matrix(Y_TEST),
        "output-items.txt": b"warm\nlight\nwool\nnever\n",
    }
    for name, value in changes.items():
        files[name.replace("output_items", "output-items").replace("_", ".")] = value
    for name, value in files.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif value is not None:
            sp.save_npz(folder / name, value)
    return folder


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def made(path: Path, **settings: Any) -> PreparedDataset:
    """Prepare a source beside it."""
    return prepare(DatasetConfig(path=str(path), **settings), path.parent / f"{path.name}.prepared")


def dense(A: sp.csr_matrix | None) -> np.ndarray:
    assert A is not None
    return np.asarray(A.todense())
