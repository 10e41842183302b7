"""The data set in data/debian-packages is what its README says."""

from __future__ import annotations

import gzip
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.sparse as sp

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "debian-packages"
SPLITS = ("trn", "tst")


def lines(name: str) -> list[str]:
    with gzip.open(FOLDER / name, "rt", encoding="utf-8", newline="\n") as f:
        return [line.removesuffix("\n") for line in f]


def labels(split: str) -> sp.csr_matrix:
    return sp.load_npz(FOLDER / f"Y.{split}.npz")


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_debian_packages", ROOT / "data" / "build_debian_packages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_sizes() -> None:
    num_labels = len(lines("output-items.txt.gz"))
    documents = 0
    for split in SPLITS:
        texts, Y = lines(f"X.{split}.txt.gz"), labels(split)
        assert Y.shape == (len(texts), num_labels) == (len(lines(f"sources.{split}.txt.gz")), num_labels)
        assert Y.format == "csr"
        assert np.all(Y.data == 1)
        documents += len(texts)
    assert 8_000 <= documents <= 15_000
    assert 3_000 <= num_labels <= 6_000


def test_it_is_small_and_its_notice_is_there() -> None:
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 4_000_000
    assert "Debian Free Software Guidelines" in (FOLDER / "COPYRIGHT").read_text(encoding="utf-8")


def test_archives_carry_no_date() -> None:
    for path in FOLDER.glob("*.gz"):
        assert path.read_bytes()[4:8] == b"\0\0\0\0", path.name


def test_every_document_has_a_label_and_every_label_two_training_documents() -> None:
    assert labels("trn").getnnz(axis=1).min() >= 1
    assert labels("tst").getnnz(axis=1).min() >= 1
    assert labels("trn").getnnz(axis=0).min() >= 2


def test_no_source_and_no_text_is_on_both_sides() -> None:
    sources = [{name for line in lines(f"sources.{s}.txt.gz") for name in line.split()} for s in SPLITS]
    texts = [lines(f"X.{s}.txt.gz") for s in SPLITS]
    assert not sources[0] & sources[1]
    assert len(set(texts[0] + texts[1])) == len(texts[0]) + len(texts[1])


def test_texts_are_single_clean_lines() -> None:
    for split in SPLITS:
        for text in lines(f"X.{split}.txt.gz"):
            assert text == " ".join(word for word in text.split() if word != ".") != ""
    assert all(re.match(r"[a-z0-9][a-z0-9+.-]+ : \S", item) for item in lines("output-items.txt.gz"))


def test_readme_tells_the_counts() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    told = {name: int(value.replace(",", "")) for name, value in re.findall(r"\| ([^|\n]+?) \| ([\d,]+) \|", text)}
    trn = labels("trn")
    assert told["training documents"] == trn.shape[0]
    assert told["test documents"] == labels("tst").shape[0]
    assert told["labels"] == trn.shape[1]
    assert told["labels with at most 5 training documents"] == int((trn.getnnz(axis=0) <= 5).sum())


STANZAS = """\
Package: {name}
Source: {source} (1.0)
Section: games
Pre-Depends: dpkg (>= 1.15)
Depends: {depends}
Description: game of {name}
Description-md5: {name}

"""


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Forty little source packages of two binaries each, in plain and in gzipped lists."""
    packages, long = [], []
    for i in range(40):
        for kind in ("", "-data"):
            name, source = f"game{i}{kind}", f"src{i}"
            depends = f"lib{i % 3}:any (>= 2) | other, virtual-thing, game{i}-data, lib{i % 2}"
            packages.append(STANZAS.format(name=name, source=source, depends=depends))
            long.append(
                f"Package: {name}\nDescription-md5: {name}\nDescription-en: game of {name}\n Fun.\n .\n More fun.\n\n"
            )
    libraries = "".join(f"Package: lib{i}\nSection: libs\nDescription: library {i}\n\n" for i in range(3))
    stem = "deb.example_debian_dists_test_main_"
    (tmp_path / f"{stem}binary-amd64_Packages").write_text("".join(packages) + libraries, encoding="utf-8")
    (tmp_path / f"{stem}i18n_Translation-en.gz").write_bytes(gzip.compress("".join(long).encode()))
    return tmp_path


def test_builder_reads_lists(builder: ModuleType, lists: Path) -> None:
    packages, release = builder.read_packages(lists)
    assert release == "unknown release, main, amd64"
    game = next(p for p in packages if p.name == "game4")
    assert game.source == "src4"
    assert game.related == {"dpkg", "lib1", "lib0", "virtual-thing", "game4-data"}
    assert builder.describe(game, None) == "game of game4. Fun. More fun."
    assert builder.describe(game, 4) == "game of game4. Fun."


def test_builder_splits_by_source_and_repeats_itself(
    builder: ModuleType, lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for name in ("one", "two"):
        out = tmp_path / name
        monkeypatch.setattr(sys, "argv", ["build", "--full", "--lists", str(lists), "--out", str(out)])
        builder.main()
        written.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert written[0] == written[1]
    out = tmp_path / "one"
    sources = {s: set(gzip.decompress((out / f"sources.{s}.txt.gz").read_bytes()).decode().split()) for s in SPLITS}
    assert sources["tst"]
    assert not sources["trn"] & sources["tst"]
    items = gzip.decompress((out / "output-items.txt.gz").read_bytes()).decode().splitlines()
    assert items == ["lib0 : library 0", "lib1 : library 1", "lib2 : library 2"]  # no virtual, no sibling


def test_equal_texts_of_two_sources_are_one_document(builder: ModuleType) -> None:
    def package(name: str, source: str, related: set[str]) -> object:
        return builder.Package(name, source, "games", "a game", "", frozenset(related))

    documents = builder.make_documents(
        [package("a", "s", {"x"}), package("b", "t", {"y", "a"})], None, {"a": "s", "b": "t", "x": "u", "y": "v"}
    )
    assert len(documents) == 1
    assert documents[0].labels == {"x", "y", "a"}
    assert builder.families(documents) == {"s": "s", "t": "s"}
