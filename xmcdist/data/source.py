"""Which files under ``dataset.path`` are read as what: nothing is read here but names."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xmcdist.config.schema import DatasetConfig
from xmcdist.data.errors import DataError

__all__ = ["EXTENSIONS", "FORMATS", "FORMAT_VERSION", "SPLITS", "Source", "locate"]

FORMAT_VERSION = 1
SPLITS = ("trn", "tst")
FORMATS = ("text", "xc", "jsonl", "csv", "parquet")
EXTENSIONS = {
    "jsonl": (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".ndjson", ".ndjson.gz"),
    "csv": (".csv", ".csv.gz"),
    "parquet": (".parquet", ".pq"),
}
_SPLIT_OF = {"train": "trn", "trn": "trn", "test": "tst", "tst": "tst"}
_XC_NAME = re.compile(r"^(?:.*_)?(train|test)\.txt(?:\.gz)?$")
_LOOKED_FOR = (
    "X.trn.txt and Y.trn.npz; or train.txt in the text form of the Extreme Classification Repository; "
    "or train.jsonl, train.csv or train.parquet"
)


@dataclass(frozen=True, slots=True)
class Source:
    """A located data set: its format and, by role, its files.

    Roles: ``X.trn.txt``, ``Y.trn.npz``, ``X.trn.npz``, the same of ``tst``, and
    ``output-items.txt`` for text folders; ``trn`` and ``tst``, or ``all`` for a single
    file that is split here, for the other formats.
    """

    format: str
    path: Path
    files: dict[str, tuple[Path, ...]]

    def one(self, role: str) -> Path | None:
        """The only file of a role, or None."""
        return self.files[role][0] if role in self.files else None

    def settings(self, cfg: DatasetConfig) -> dict[str, Any]:
        """The settings that change what is read from this source, and no others."""
        names = ["drop_unlabelled"]
        if self.format in EXTENSIONS:
            names += ["text_column", "labels_column"]
            names += ["label_separator"] if self.format != "jsonl" else []
            if "all" in self.files:
                names += ["split_column"] if cfg.split_column else ["test_fraction", "split_seed"]
        return {"format": self.format, **{name: getattr(cfg, name) for name in names}}

    def checksums(self) -> dict[str, list[str]]:
        """sha256 of every file by role; cost: reads them all."""
        return {role: [_sha256(path) for path in paths] for role, paths in sorted(self.files.items())}

    def fingerprint(self, cfg: DatasetConfig) -> str:
        """What the prepared form depends on, and nothing else (names and places do not count)."""
        said = {"version": FORMAT_VERSION, "settings": self.settings(cfg), "files": self.checksums()}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def locate(cfg: DatasetConfig) -> Source:
    """Find the files of ``dataset.path`` and their format.

    Raises:
        DataError: no such path, unknown or undecidable format, a file missing or twice.
    """
    if cfg.format not in ("auto", *FORMATS):
        raise DataError(f"dataset.format={cfg.format} is none of auto, {', '.join(FORMATS)}")
    if not cfg.path or cfg.path == "???":
        raise DataError("dataset.path is not set: give the folder or file of the data set")
    path = Path(cfg.path).expanduser()
    if not path.exists():
        raise DataError(f"dataset.path={cfg.path} does not exist; {_nearest(path)}")
    wanted = FORMATS if cfg.format == "auto" else (cfg.format,)
    found = _in_folder(path, wanted) if path.is_dir() else _single(path, cfg.format)
    if not found:
        names = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
        what = _LOOKED_FOR if cfg.format == "auto" else f"files of dataset.format={cfg.format} (train.*, test.*)"
        raise DataError(f"{path} holds no data set that is known: looked for {what}; it holds {names}")
    if len(found) > 1:
        raise DataError(f"{path} can be read as {' or '.join(s.format for s in found)}: set dataset.format")
    source = found[0]
    if "all" not in source.files and source.format != "text" and "trn" not in source.files:
        raise DataError(f"{path} has a test file but no training file: add train.*")
    return source


def _in_folder(path: Path, formats: tuple[str, ...]) -> list[Source]:
    entries = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    found: list[Source] = []
    for name in formats:
        files = _text_files(path) if name == "text" else _split_files(entries, name)
        if files:
            found.append(Source(name, path, files))
    if not found:
        lone = [s for p in entries for s in _single(p, "auto", known_only=True) if s.format in formats]
        found = lone if len(lone) == 1 else []
    return found


def _single(path: Path, wanted: str, *, known_only: bool = False) -> list[Source]:
    """A file given by itself: records are split here, a text file is the repository's and all training."""
    by_name = [name for name, ends in EXTENSIONS.items() if path.name.endswith(ends)]
    if wanted == "auto" and not by_name and not known_only and path.name.endswith((".txt", ".txt.gz")):
        by_name = ["xc"]
    chosen = by_name[0] if wanted == "auto" and by_name else wanted
    if chosen == "auto":
        if known_only:
            return []
        raise DataError(f"{path}: the format of this file is not known by its name: set dataset.format")
    if chosen == "text":
        raise DataError(f"dataset.path={path} is a file, and dataset.format=text needs a folder with X.trn.txt")
    return [Source(chosen, path, {"trn" if chosen == "xc" else "all": (path,)})]


def _text_files(path: Path) -> dict[str, tuple[Path, ...]]:
    names = [f"{kind}.{split}.{end}" for split in SPLITS for kind, end in (("X", "txt"), ("X", "npz"), ("Y", "npz"))]
    files: dict[str, tuple[Path, ...]] = {}
    for name in [*names, "output-items.txt"]:
        here = [p for p in (path / name, path / f"{name}.gz") if p.is_file() and (p.suffix != ".gz" or ".txt" in name)]
        _refuse_twice(here)
        if here:
            files[name] = (here[0],)
    if not any(role.startswith(("X.", "Y.")) for role in files):
        return {}
    _check_text_roles(path, files)
    return files


def _check_text_roles(path: Path, files: dict[str, tuple[Path, ...]]) -> None:
    documents = [name for name in ("X.trn.txt", "X.trn.npz") if name in files]
    if "Y.trn.npz" not in files:
        raise DataError(f"{path} has {', '.join(sorted(files))} but no Y.trn.npz: add the labels of training documents")
    if not documents:
        raise DataError(f"{path} has Y.trn.npz but neither X.trn.txt nor X.trn.npz: add the training documents")
    if not any(".tst." in role for role in files):
        return
    for name in ("Y.trn.npz", *documents):
        test = name.replace("trn", "tst")
        if test not in files:
            raise DataError(f"{path} has {name} and a test split without {test}: add it, or take the test split away")
    for test in ("X.tst.txt", "X.tst.npz"):
        if test in files and test.replace("tst", "trn") not in files:
            raise DataError(f"{path} has {test} but no {test.replace('tst', 'trn')}: add it, or take {test} away")


def _split_files(entries: list[Path], name: str) -> dict[str, tuple[Path, ...]]:
    files: dict[str, list[Path]] = {}
    for path in entries:
        split = _xc_split(path) if name == "xc" else _record_split(path, EXTENSIONS[name])
        if split:
            files.setdefault(split, []).append(path)
    for paths in files.values():
        stems = [p.name.removesuffix(".gz") for p in paths]
        _refuse_twice([p for p in paths if stems.count(p.name.removesuffix(".gz")) > 1])
        if name == "xc" and len(paths) > 1:
            raise DataError(f"{paths[0].parent} has {' and '.join(p.name for p in paths)}: keep one of them")
    return {split: tuple(paths) for split, paths in files.items()}


def _xc_split(path: Path) -> str | None:
    match = _XC_NAME.match(path.name)
    return _SPLIT_OF[match[1]] if match else None


def _record_split(path: Path, ends: tuple[str, ...]) -> str | None:
    end = next((e for e in sorted(ends, key=len, reverse=True) if path.name.endswith(e)), None)
    if end is None:
        return None
    parts = re.split(r"[._-]", path.name.removesuffix(end).lower())
    splits = {_SPLIT_OF[part] for part in parts if part in _SPLIT_OF}
    return splits.pop() if len(splits) == 1 else None


def _refuse_twice(paths: list[Path]) -> None:
    if len(paths) > 1:
        raise DataError(f"{paths[0].parent} has both {paths[0].name} and {paths[1].name}: keep one of them")


def _nearest(path: Path) -> str:
    there = path.absolute()
    missing = there.name
    while not there.exists():
        missing, there = there.name, there.parent
    if not there.is_dir():
        return f"{there} is a file, not a folder"
    entries = sorted(p.name for p in there.iterdir())
    near = difflib.get_close_matches(missing, entries, n=3) or entries[:5]
    return f"{there} holds {', '.join(near) or 'nothing'}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
