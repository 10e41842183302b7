"""The prepared form of a data set, memory-mapped: what every later stage reads.

A folder of ``texts.<split>.bin`` and ``.offsets.npy``, ``Y.<split>/`` ``[N, L]``,
``X.<split>/`` ``[N, D]``, ``label_texts.bin`` and ``.offsets.npy``, and ``manifest.json``.
Splits are ``trn`` and ``tst``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.data.arrays import load_array
from xmcdist.data.errors import DataError
from xmcdist.data.manifest import MANIFEST, read_manifest, whole
from xmcdist.data.source import FORMAT_VERSION, SPLITS
from xmcdist.data.texts import TextStore
from xmcdist.sparse.store import StoreError, open_csr

__all__ = ["PreparedDataset", "TextStore"]


@dataclass(frozen=True, slots=True)
class PreparedDataset:
    """A prepared data set; opening reads the manifest only."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> PreparedDataset:
        """Open a prepared folder; looks at sizes, not at contents (see `verify`).

        Raises:
            DataError: it is none, of another version, or a file is missing or cut off.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise DataError(f"{folder} is no prepared data set (no {MANIFEST} to read): prepare it first")
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{folder} is of format version {version}, not {FORMAT_VERSION}: delete it, prepare again")
        damaged = whole(folder, manifest)
        if damaged:
            raise DataError(f"{damaged} is missing or was cut off: delete {folder}, prepare again")
        return cls(folder, manifest)

    @property
    def num_labels(self) -> int:
        return int(self.manifest["num_labels"])

    @property
    def num_features(self) -> int | None:
        """D of given features, or None."""
        D = self.manifest["num_features"]
        return None if D is None else int(D)

    @property
    def has_text(self) -> bool:
        return bool(self.manifest["has_text"])

    @property
    def has_test(self) -> bool:
        return bool(self.manifest["has_test"])

    @property
    def fingerprint(self) -> str:
        """Of the contents: equal for equal data, wherever they lie."""
        return str(self.manifest["fingerprint"])

    @property
    def warnings(self) -> list[str]:
        return list(self.manifest["warnings"])

    def num_docs(self, split: str) -> int:
        """Documents of a split; 0 for a test split that is not there."""
        self._check(split)
        return int(self.manifest["splits"].get(split, {"documents": 0})["documents"])

    def texts(self, split: str) -> TextStore:
        """Document texts of a split.

        Raises:
            DataError: the data set has no texts, or no such split.
        """
        self._require(split)
        if not self.has_text:
            raise DataError(f"{self.folder} has no texts, only features: set encoder=none and features.kind=given")
        return TextStore(self.folder, f"texts.{split}")

    def Y(self, split: str) -> sp.csr_matrix:
        """Labels ``[N, L]`` float32, memory-mapped; values are weights, 1 for plain labels."""
        self._require(split)
        return self._open(f"Y.{split}")

    def X(self, split: str) -> sp.csr_matrix | None:
        """Given features ``[N, D]`` float32, memory-mapped, or None if none were given."""
        self._require(split)
        return self._open(f"X.{split}") if self.num_features is not None else None

    def label_texts(self) -> TextStore:
        """The text of every label; its number as text where the source had none."""
        return TextStore(self.folder, "label_texts")

    def corpus(self) -> TextStore:
        """The texts on which TF-IDF is fitted: those of training; of a graph, those of all nodes."""
        return self.texts("trn") if self.graph is None else self.label_texts()

    @property
    def graph(self) -> dict[str, int] | None:
        """Counts of the graph whose nodes are the labels; None for other data sets."""
        counts = self.manifest.get("graph")
        return None if counts is None else {str(k): int(v) for k, v in counts.items()}

    def nodes(self, split: str) -> NDArray[np.int64]:
        """Of a graph: the node that each document of a split is, ascending, ``[N]``."""
        self._require(split)
        return load_array(self.folder / f"nodes.{split}.npy", "int64")

    def node_ids(self) -> TextStore | None:
        """Of a graph: how its source names the nodes; None where it numbers them."""
        return TextStore(self.folder, "node_ids") if "node_ids.bin" in self.manifest["files"] else None

    def known(self, split: str) -> sp.csr_matrix | None:
        """Labels that documents are known to have and are not asked for, ``[N, L]``; None where there are none such.

        Of a graph's test documents: the neighbours that were trained on, and the node itself.
        """
        self._require(split)
        return self._open(f"known.{split}") if f"known.{split}/shape.json" in self.manifest["files"] else None

    def label_ids(self) -> TextStore | None:
        """How the source itself names labels (jsonl, csv, parquet), sorted; None where it numbers them."""
        return self.label_texts() if self.manifest["label_names_from_source"] else None

    def verify(self) -> None:
        """Compare every file with its checksum; cost: reads them all.

        Raises:
            DataError: names the first file that changed.
        """
        for place, said in self.manifest["files"].items():
            path = self.folder / place
            if not path.is_file():
                raise DataError(f"{path} is missing: delete {self.folder}, prepare again")
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != said["sha256"]:
                    raise DataError(f"{path} is not what was written: delete {self.folder}, prepare again")

    def _open(self, name: str) -> sp.csr_matrix:
        try:
            return open_csr(self.folder / name)
        except StoreError as error:
            raise DataError(f"{error}: delete {self.folder}, prepare again") from error

    def _check(self, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)}")

    def _require(self, split: str) -> None:
        self._check(split)
        if split not in self.manifest["splits"]:
            raise DataError(f"{self.folder} has no test split: add one to the source, or do not evaluate")
