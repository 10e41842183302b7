"""A small data set in which the words tell the labels, and one in which they do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import scipy.sparse as sp


def texts_and_labels(
    documents: int, labels: int, seed: int = 0, *, shuffled: bool = False
) -> tuple[list[str], sp.csr_matrix]:
    """Documents of 6 to 20 words; each label has two words of its own, the rest is noise."""
    rng = np.random.default_rng(seed)
    rows: list[int] = []
    columns: list[int] = []
    texts = []
    for i in range(documents):
        mine = rng.choice(labels, size=int(rng.integers(1, 4)), replace=False)
        words = [f"w{2 * label + int(rng.integers(2))}" for label in mine for _ in range(2)]
        words += [f"noise{int(n)}" for n in rng.integers(0, 200, size=int(rng.integers(4, 14)))]
        texts.append(" ".join(rng.permutation(words)))
        rows += [i] * len(mine)
        columns += mine.tolist()
    Y = sp.csr_matrix((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=(documents, labels))
    return texts, Y[rng.permutation(documents)] if shuffled else Y


def write_text_folder(
    folder: Path, *, train: int = 360, test: int = 60, labels: int = 40, shuffled: bool = False
) -> Path:
    """The text-folder form of such a set."""
    folder.mkdir(parents=True)
    for split, count, seed in (("trn", train, 1), ("tst", test, 2)):
        texts, Y = texts_and_labels(count, labels, seed, shuffled=shuffled and split == "trn")
        (folder / f"X.{split}.txt").write_text("".join(t + "\n" for t in texts))
        sp.save_npz(folder / f"Y.{split}.npz", Y)
    (folder / "output-items.txt").write_text("".join(f"label {i} : w{2 * i} w{2 * i + 1}\n" for i in range(labels)))
    return folder


def write_jsonl(folder: Path, count: int = 80, labels: int = 10) -> Path:
    """The same in one JSONL file."""
    texts, Y = texts_and_labels(count, labels)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"text": t, "labels": [f"label-{j}" for j in Y.indices[Y.indptr[i] : Y.indptr[i + 1]]]}
        for i, t in enumerate(texts)
    ]
    (folder / "all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "all.jsonl"


TINY_RUN = [
    "encoder=tiny",
    "encoder.dropout=0.0",
    "tree.nr_splits=4",
    "tree.max_leaf_size=5",
    "matcher.steps=[12]",
    "matcher.beam=4",
    "optimizer.lr=2e-3",
    "schedule.warmup=2",
    "engine.global_batch=12",
    "engine.micro_batch=4",
    "tracker.log_every=1",
    "engine.threads=1",
]
"""Overrides for a run of seconds over `write_text_folder`'s data: three levels, 4 > 8.. > 40."""
