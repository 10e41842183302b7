"""``manifest.json`` of a prepared data set: what it counts, warns of and vouches for."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from xmcdist.data.source import FORMAT_VERSION
from xmcdist.data.written import Written
from xmcdist.sparse.store import open_csr

__all__ = ["MANIFEST", "build_manifest", "file_checksums", "read_manifest", "whole", "write_manifest"]

MANIFEST = "manifest.json"
_CHUNK = 1 << 24


def build_manifest(folder: Path, written: Written, name: str, source: dict[str, Any]) -> dict[str, Any]:
    """Count what was written and take its checksums.

    Args:
        source: fingerprint, format, settings and path of what was read.

    Cost: reads every written file twice.
    """
    splits = {split: _count_split(folder, split, written) for split in written.splits}
    unseen = _labels_without_documents(open_csr(folder / "Y.trn"))
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "has_text": written.has_text,
        "has_features": written.num_features is not None,
        "has_test": "tst" in written.splits,
        "num_labels": written.num_labels,
        "num_features": written.num_features,
        "label_names_from_source": written.names_are_labels,
        "splits": splits,
        "labels_without_training_documents": unseen,
        "dropped_unlabelled_documents": written.left_out,
        "dropped_test_labels": {"labels": written.dropped_labels, "entries": written.dropped_entries},
        "summed_duplicate_entries": written.duplicates,
        "source": source,
    }
    if written.graph is not None:
        manifest["graph"] = written.graph
    manifest["warnings"] = [*written.warnings, *_warnings(manifest)]
    manifest["files"] = file_checksums(folder)
    said = json.dumps(sorted((place, f["sha256"]) for place, f in manifest["files"].items()))
    manifest["fingerprint"] = hashlib.sha256(said.encode()).hexdigest()
    return manifest


def file_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file but the manifest; each is on the disk when this returns."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
            os.fsync(f.fileno())
        out[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return out


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json`` beside its place, then put it there in one step."""
    beside = folder / f"{MANIFEST}.tmp"
    with open(beside, "w", encoding="utf-8") as f:
        json.dump(manifest, f, indent=1, sort_keys=True, ensure_ascii=False)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None if there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def whole(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first file that is missing or of another size than written, or None; cost: no reading."""
    for place, said in manifest.get("files", {}).items():
        path = folder / place
        if not path.is_file() or path.stat().st_size != said["bytes"]:
            return str(path)
    return None


def _count_split(folder: Path, split: str, written: Written) -> dict[str, Any]:
    Y = open_csr(folder / f"Y.{split}")
    by_document = np.diff(Y.indptr)
    return {
        "documents": int(Y.shape[0]),
        "empty_documents": int(written.empty[split]),
        "unlabelled_documents": int((by_document == 0).sum()),
        "label_entries": int(Y.nnz),
        "labels_per_document_mean": float(by_document.mean()) if len(by_document) else 0.0,
        "labels_per_document_max": int(by_document.max(initial=0)),
    }


def _labels_without_documents(Y: sp.csr_matrix) -> int:
    seen = np.zeros(Y.shape[1], dtype=np.bool_)
    for start in range(0, Y.nnz, _CHUNK):
        seen[Y.indices[start : start + _CHUNK]] = True
    return int(len(seen) - seen.sum())


def _warnings(m: dict[str, Any]) -> list[str]:
    """What a person should know, as sentences; nothing when the data are plain."""
    said = []
    for split, name in (("trn", "training"), ("tst", "test")):
        counts = m["splits"].get(split)
        if counts is None:
            said.append(f"There is no {name} split: nothing can be evaluated.")
            continue
        if counts["empty_documents"]:
            said.append(f"{counts['empty_documents']} of {counts['documents']} {name} documents have no words.")
        if counts["unlabelled_documents"]:
            kept = ", and are kept (dataset.drop_unlabelled=true leaves them out)" if split == "trn" else ""
            said.append(
                f"{counts['unlabelled_documents']} of {counts['documents']} {name} documents have no label{kept}."
            )
    if m["dropped_unlabelled_documents"]:
        said.append(
            f"{m['dropped_unlabelled_documents']} training documents without a label were left out "
            "(dataset.drop_unlabelled=true)."
        )
    if m["labels_without_training_documents"]:
        said.append(
            f"{m['labels_without_training_documents']} of {m['num_labels']} labels have no training document: "
            "they will hardly ever be predicted."
        )
    dropped = m["dropped_test_labels"]
    if dropped["labels"]:
        said.append(
            f"{dropped['labels']} labels occur in test documents only; their {dropped['entries']} entries were dropped."
        )
    if m["summed_duplicate_entries"]:
        said.append(f"{m['summed_duplicate_entries']} matrix entries were given twice; their values were summed.")
    return said
