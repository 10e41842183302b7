"""A planted graph, and folders as the Open Graph Benchmark has them."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Planted:
    """Communities that speak two dialects; edges join members of a community, whatever they speak.

    No word is common to two dialects or two communities, so a text of one dialect says nothing
    of those of the other: only edges do.
    """

    texts: list[str]
    edges: np.ndarray  # int64 [2, E], each once
    community: np.ndarray  # [n]
    dialect: np.ndarray  # [n], 0 or 1

    def write(self, folder: Path) -> list[str]:
        """Texts and edges in files; returns the settings that name them."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "texts.txt").write_text("".join(text + "\n" for text in self.texts))
        np.save(folder / "edges.npy", self.edges)
        return [f"graph.text={folder / 'texts.txt'}", f"graph.edges={folder / 'edges.npy'}"]


def two_dialects(nodes: int = 240, communities: int = 6, neighbours: int = 4, seed: int = 0) -> Planted:
    """Texts of eight words, of eight that a community has in a dialect; each node names some neighbours."""
    rng = np.random.default_rng(seed)
    dialect, community = np.arange(nodes) % 2, np.arange(nodes) // 2 % communities
    texts = [
        " ".join(f"{'ab'[d]}{8 * c + int(w)}" for w in rng.integers(0, 8, size=8))
        for d, c in zip(dialect, community, strict=True)
    ]
    ends = []
    for i in range(nodes):
        others = np.flatnonzero((community == community[i]) & (np.arange(nodes) != i))
        ends += [(i, int(j)) for j in rng.choice(others, neighbours, replace=False)]
    return Planted(texts, np.array(ends).T, community, dialect)


def write_gz(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") as f:
        f.write(text.encode() if isinstance(text, str) else text)
    return path


def write_ogb(folder: Path, tar_header: bool = True) -> Path:
    """Six papers in the layout of ogbn-arxiv, with the raw texts as they are published.

    The texts come in another order than the nodes, with a paper that is no node; the file still
    has the header of the tar archive it was taken from.
    """
    write_gz(folder / "raw" / "edge.csv.gz", "0,1\n1,2\n2,0\n3,4\n4,3\n")
    write_gz(folder / "raw" / "num-node-list.csv.gz", "6\n")
    write_gz(folder / "raw" / "num-edge-list.csv.gz", "5\n")
    write_gz(folder / "raw" / "node-feat.csv.gz", "0.5,0.25\n" * 6)
    write_gz(folder / "raw" / "node-label.csv.gz", "4\n4\n0\n0\n4\n0\n")
    ids = [901, 15, 77, 300, 42, 8]
    pairs = "".join(f"{i},{paper}\n" for i, paper in enumerate(ids))
    write_gz(folder / "mapping" / "nodeidx2paperid.csv.gz", "node idx,paper id\n" + pairs)
    write_gz(folder / "mapping" / "labelidx2arxivcategeory.csv.gz", "label idx,arxiv category\n0,arxiv cs na\n")
    for part, nodes in (("train", (0, 2, 3)), ("valid", (1,)), ("test", (4, 5))):
        write_gz(folder / "split" / "time" / f"{part}.csv.gz", "".join(f"{i}\n" for i in nodes))
    lines = [f'{paper}\tTitle of "{paper}"\tAbstract, of {paper}.' for paper in [8, 42, 555, 300, 77, 15, 901]]
    header = b"titleabs.tsv" + b"\0" * 88 + b"0000644\0" + b"ustar  \0" + b"\0" * 400 if tar_header else b""
    (folder / "titleabs.tsv").write_bytes(header + ("\n".join(lines) + "\n").encode() + b"\0" * 64)
    return folder
