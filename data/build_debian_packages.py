#!/usr/bin/env python3
"""Makes the Debian package data set from the lists that ``apt-get update`` leaves.

    apt-get -o Acquire::Languages=en update
    python data/build_debian_packages.py --out data/debian-packages          # the slice that is shipped
    python data/build_debian_packages.py --full --out /somewhere/debian-full # every package

A document is a package's description, its labels are the packages it depends on, recommends or
suggests.  The result depends on the lists alone.  Needs numpy and scipy.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

# What a person installs to use, not to build on: there the description says what a package is for.
SLICE_SECTIONS = frozenset(
    {
        "admin",
        "comm",
        "database",
        "editors",
        "education",
        "electronics",
        "embedded",
        "games",
        "gnome",
        "gnustep",
        "graphics",
        "hamradio",
        "httpd",
        "interpreters",
        "kde",
        "mail",
        "math",
        "misc",
        "net",
        "news",
        "otherosfs",
        "science",
        "shells",
        "sound",
        "text",
        "utils",
        "vcs",
        "video",
        "web",
        "x11",
        "xfce",
    }
)
SLICE_WORDS = 32  # of the document: a small encoder sees nearly all of it in 48 tokens, quickly
SLICE_SHARE = 0.02  # labels of more documents than this say nothing about the description (libc6, python3)
SLICE_LABELS = 30  # of a document: more is a metapackage, a list rather than a description
SLICE_FAMILY = 10  # documents of one source: dictionaries for a hundred languages would outweigh all else
MIN_TRAIN = 2  # training documents a label needs


@dataclass(frozen=True)
class Package:
    """One stanza of a Packages list, with its long description."""

    name: str
    source: str
    section: str
    synopsis: str
    body: str
    related: frozenset[str]


@dataclass(frozen=True)
class Document:
    """A text with its labels; ``sources`` are the source packages it comes from."""

    text: str
    labels: frozenset[str]
    sources: frozenset[str]


def read_list(path: Path) -> str:
    """The text of a list as apt stores it: plain, .gz, .lz4, .xz."""
    if path.suffix in (".lz4", ".xz", ".bz2", ".zst"):
        command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
        return subprocess.run(command, capture_output=True, check=True).stdout.decode()
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode()
    return path.read_text(encoding="utf-8")


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """Fields of each stanza; continuation lines keep their line breaks, lose their indent."""
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        key = ""
        for line in block.split("\n"):
            if line.startswith((" ", "\t")) and key:
                fields[key] += "\n" + line[1:]
            elif ":" in line:
                key, value = line.split(":", 1)
                fields[key] = value.strip()
        if fields:
            yield fields


def related(fields: dict[str, str]) -> frozenset[str]:
    """Names a package depends on, recommends or suggests; of alternatives the first."""
    relations = ("Pre-Depends", "Depends", "Recommends", "Suggests")
    parts = [part.strip() for field in relations for part in fields.get(field, "").split(",")]
    names = {re.split(r"[\s(:\[<|]", part, maxsplit=1)[0] for part in parts if part}
    return frozenset(names - {fields["Package"]})


def read_packages(lists: Path) -> tuple[list[Package], str]:
    """Packages of Debian main of the release, without updates, in name order; and the snapshot's name."""
    found = sorted(p for p in lists.glob("*_main_binary-*_Packages*") if "_debian_dists_" in p.name)
    found = [p for p in found if not re.search(r"-(updates|backports|security|proposed)", p.name)]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        sys.exit(
            f"{lists}: expected one Packages list of Debian main, found {names}; point --lists at a folder with one"
        )
    stem, _, machine = found[0].name.split("_Packages")[0].partition("_binary-")
    translations = sorted(lists.glob(f"{stem}_i18n_Translation-en*"))
    if not translations:
        sys.exit(f"{lists}: no {stem}_i18n_Translation-en; run: apt-get -o Acquire::Languages=en update")
    long = {f["Description-md5"]: f["Description-en"].partition("\n")[2] for f in stanzas(read_list(translations[0]))}
    packages = {
        f["Package"]: Package(
            name=f["Package"],
            source=f.get("Source", f["Package"]).split(" ")[0],
            section=f.get("Section", ""),
            synopsis=" ".join(f["Description"].partition("\n")[0].split()),
            body=long.get(f.get("Description-md5", ""), ""),
            related=related(f),
        )
        for f in stanzas(read_list(found[0]))
    }
    release = snapshot(lists / (stem.removesuffix("_main") + "_InRelease"))
    return [packages[name] for name in sorted(packages)], f"{release}, main, {machine}"


def snapshot(release: Path) -> str:
    """Version, name and date that an InRelease file gives."""
    if not release.exists():
        return "unknown release"
    head = dict(re.findall(r"(?m)^(Version|Codename|Date): (.+)$", release.read_text(encoding="utf-8")))
    return f"Debian {head.get('Version')} ({head.get('Codename')}), {head.get('Date')}"


def describe(package: Package, words: int | None) -> str:
    """Synopsis and body in one line, without the lone points that part paragraphs; the first ``words`` words."""
    text = f"{package.synopsis.rstrip('.')}. {package.body}"
    return " ".join([word for word in text.split() if word != "."][:words])


def make_documents(packages: Iterable[Package], words: int | None, source_of: dict[str, str]) -> list[Document]:
    """One document a distinct text, in text order; labels and sources of equal texts are united.

    Args:
        packages: those to make documents of.
        words: most words of a text; None keeps all.
        source_of: source package of every package.  Other names (virtual packages) are no
            labels, nor are those of the document's own source (a program's own data files).
    """
    labels: dict[str, set[str]] = {}
    sources: dict[str, set[str]] = {}
    for p in packages:
        text = describe(p, words)
        labels.setdefault(text, set()).update(n for n in p.related if source_of.get(n, p.source) != p.source)
        sources.setdefault(text, set()).add(p.source)
    return [Document(text, frozenset(labels[text]), frozenset(sources[text])) for text in sorted(labels)]


def families(documents: Iterable[Document]) -> dict[str, str]:
    """The family of each source package: sources that share a text are one, named after its smallest."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for document in documents:
        first = min(document.sources)
        for other in document.sources:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    return {name: root(name) for name in list(parent)}


def is_test(family: str) -> bool:
    """A tenth of the families, by the sha1 of their name."""
    return int(hashlib.sha1(family.encode()).hexdigest(), 16) % 10 == 0


def thin(documents: list[Document], most: int) -> list[Document]:
    """At most so many labelled documents of each family, the first in order."""
    family = families(documents)
    taken: Counter[str] = Counter()
    kept = []
    for document in documents:
        name = family[min(document.sources)]
        if document.labels and taken[name] < most:
            taken[name] += 1
            kept.append(document)
    return kept


def choose(
    documents: list[Document], share: float, most_labels: int | None
) -> tuple[list[Document], list[Document], list[str]]:
    """Split, and prune labels and documents until nothing changes.

    Args:
        documents: in the order they are to be written.
        share: labels that more than this share of the labelled documents carry are dropped.
        most_labels: documents that still carry more labels than this are dropped.

    Returns:
        Training documents, test documents, labels in name order.  Every document has a label,
        every label at least `MIN_TRAIN` training documents.
    """
    family = families(documents)
    pairs = [(d, is_test(family[min(d.sources)])) for d in documents if d.labels]
    everywhere = Counter(label for d, _ in pairs for label in d.labels)
    frequent = {label for label, n in everywhere.items() if n > share * len(pairs)}
    while True:
        train = Counter(label for d, test in pairs if not test for label in d.labels)
        keep = {label for label, n in train.items() if n >= MIN_TRAIN} - frequent
        pruned = [(Document(d.text, d.labels & keep, d.sources), test) for d, test in pairs]
        pruned = [p for p in pruned if 0 < len(p[0].labels) <= (most_labels or len(keep))]
        if pruned == pairs:
            return [d for d, test in pairs if not test], [d for d, test in pairs if test], sorted(keep)
        pairs = pruned


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Lines as UTF-8 gzip; the same lines give the same bytes."""
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), compresslevel=9, mtime=0))


def write_labels(path: Path, documents: list[Document], labels: list[str]) -> None:
    """Y as `scipy.sparse.save_npz` writes a CSR matrix, but without the date: same labels, same bytes."""
    column = {label: i for i, label in enumerate(labels)}
    rows = [sorted(column[label] for label in d.labels) for d in documents]
    indices = np.array([i for row in rows for i in row], dtype=np.int32)
    indptr = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    matrix = sp.csr_matrix((np.ones(len(indices), dtype=np.float32), indices, indptr), shape=(len(rows), len(labels)))
    parts = {
        "indices": matrix.indices,
        "indptr": matrix.indptr,
        "format": np.array(b"csr"),
        "shape": np.array(matrix.shape),
        "data": matrix.data,
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in parts.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(info, buffer.getvalue(), compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)


def counts(train: list[Document], test: list[Document], labels: list[str]) -> str:
    """The README's table: what was written, counted."""
    carried = Counter(label for d in train for label in d.labels)
    sizes = sorted(carried[label] for label in labels)
    words = sorted(len(d.text.split()) for d in train + test)
    trn, tst = ([len(d.labels) for d in part] for part in (train, test))
    rows = {
        "training documents": f"{len(train):,}",
        "test documents": f"{len(test):,}",
        "labels": f"{len(labels):,}",
        "labels a document": f"training {np.mean(trn):.2f}, test {np.mean(tst):.2f}, at most {max(trn + tst)}",
        "training documents a label": f"mean {np.mean(sizes):.2f}, median {np.median(sizes):.0f}, at most {sizes[-1]}",
        "labels with at most 5 training documents": f"{sum(n <= 5 for n in sizes):,}",
        "words a document": f"median {np.median(words):.0f}, at most {words[-1]}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> None:
    """Read the lists, write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lists", type=Path, default=Path("/var/lib/apt/lists"), help="where apt keeps its lists")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--slice", action="store_true", help="the shipped slice (default)")
    which.add_argument("--full", action="store_true", help="every package and label, whole descriptions")
    args = parser.parse_args()

    packages, release = read_packages(args.lists)
    source_of = {p.name: p.source for p in packages}
    if args.full:
        train, test, labels = choose(make_documents(packages, None, source_of), 1.0, None)
    else:
        chosen = [p for p in packages if p.section in SLICE_SECTIONS]
        documents = thin(make_documents(chosen, SLICE_WORDS, source_of), SLICE_FAMILY)
        train, test, labels = choose(documents, SLICE_SHARE, SLICE_LABELS)

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    for split, part in (("trn", train), ("tst", test)):
        write_lines(out / f"X.{split}.txt.gz", (d.text for d in part))
        write_lines(out / f"sources.{split}.txt.gz", (" ".join(sorted(d.sources)) for d in part))
        write_labels(out / f"Y.{split}.npz", part, labels)
    synopsis = {p.name: p.synopsis for p in packages}
    write_lines(out / "output-items.txt.gz", (f"{name} : {synopsis[name]}" for name in labels))
    size = sum(p.stat().st_size for pattern in ("*.gz", "*.npz") for p in out.glob(pattern))
    print(f"{release}\n\n{counts(train, test, labels)}\n\n{size:,} bytes in {out}")


if __name__ == "__main__":
    main()
