"""Label embeddings and balanced k-means of xmcdist and of libpecos on the same matrices, in turn.

    python benchmarks/trees_vs_pecos.py DATA_DIR... --pecos PYTHON [--repeat 5] [--out page.md]

A DATA_DIR holds X.trn.txt (a text a line) and Y.trn.npz (scipy CSR), or X.trn.npz in place of
the texts.  PYTHON is the interpreter of an environment with libpecos; this script runs itself
in it.  Every run is a process of its own with a seed of its own, the same seeds for both; it
reports wall and CPU seconds of its work, without reading files and without loading compiled
code, and its peak resident memory.

The objective is what balanced spherical k-means climbs: the sum over clusters of the length of
the sum of their labels' unit embeddings, a label.  It is computed by the same plain code from
the same embeddings for both programs, at every level of the tree; more is better.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

sys.path.insert(0, str(Path(__file__).resolve().parent))
from linear_vs_pecos import LEAF, ROOT, SPLITS, Meter, hardware, prepare, versions

PEERS = ("libpecos", "xmcdist")


def matrices(folder: Path) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Training documents' features and labels, float32 CSR."""
    X, Y = (sp.csr_matrix(sp.load_npz(folder / f"{name}.trn.npz"), dtype=np.float32) for name in "XY")
    for A in (X, Y):
        A.sort_indices()
    return X, Y


def pecos_tree(folder: Path, seed: int, threads: int) -> tuple[Meter, list[sp.csr_matrix]]:
    """libpecos: the chain of its clusters, coarse to fine, labels last."""
    from pecos.xmc import Indexer, LabelEmbeddingFactory

    X, Y = matrices(folder)
    Y, meter = Y.tocsc(), Meter()
    options = {"nr_splits": SPLITS, "max_leaf_size": LEAF, "threads": threads, "seed": seed}
    Z = meter.run("embed", lambda: LabelEmbeddingFactory.create(Y, X, method="pifa", threads=threads))
    chain = meter.run("cluster", lambda: Indexer.gen(Z, indexer_type="hierarchicalkmeans", **options))
    meter.write(folder / "answer.json", "peak")
    return meter, [sp.csr_matrix(C) for C in chain]


def ours_tree(folder: Path, seed: int, threads: int) -> tuple[Meter, list[sp.csr_matrix]]:
    """xmcdist: the same."""
    from xmcdist.sparse.features import Features

    X, Y = matrices(folder)
    rng = np.random.default_rng(0)
    few = sp.csr_matrix(rng.random((64, 20), dtype=np.float32))
    ours_stages(Features(few), sp.csr_matrix(rng.random((64, 300)) < 0.1, dtype=np.float32), 0, threads, Meter())
    meter = Meter()
    tree = ours_stages(Features(X), Y, seed, threads, meter)
    meter.write(folder / "answer.json", "peak")
    return meter, tree.chain()


def ours_stages(features: Any, Y: sp.csr_matrix, seed: int, threads: int, meter: Meter) -> Any:
    """Both stages of xmcdist, metered."""
    from xmcdist.trees.kmeans import balanced_kmeans
    from xmcdist.trees.label_embedding import label_embedding
    from xmcdist.trees.levels import binary_depth, build_tree

    depth = binary_depth(Y.shape[1], LEAF)
    Z = meter.run("embed", lambda: label_embedding(features, Y, threads=threads))

    def cluster() -> Any:
        return build_tree(balanced_kmeans(Z, depth, seed=seed, threads=threads), depth, nr_splits=SPLITS)

    return meter.run("cluster", cluster)


def worker(job: dict[str, Any]) -> None:
    """One run of one program, in this process; leaves its times and its chain."""
    folder = Path(job["folder"])
    _, chain = (pecos_tree if job["peer"] == "libpecos" else ours_tree)(folder, job["seed"], job["threads"])
    for t, C in enumerate(chain, start=1):
        sp.save_npz(folder / f"C_{t}.npz", C)


def embeddings(folder: Path) -> sp.csr_matrix:
    """PIFA by scipy: what both programs cluster, as far as the objective is concerned."""
    X, Y = (A.astype(np.float64) for A in matrices(folder))
    scale = 1 / np.sqrt(np.maximum(np.asarray(Y.multiply(Y).sum(axis=1)).ravel(), 1e-30))
    Z = sp.csr_matrix((sp.diags_array(scale) @ Y).T @ X)
    length = np.sqrt(np.asarray(Z.multiply(Z).sum(axis=1)).ravel())
    return sp.csr_matrix(sp.diags_array(1 / np.where(length > 0, length, 1)) @ Z)


def objectives(chain: list[sp.csr_matrix], Z: sp.csr_matrix) -> list[float]:
    """For each cluster level, coarse to fine."""
    found = []
    below = sp.csr_matrix(chain[-1], dtype=np.float64)
    for C in reversed(chain[:-1]):
        sums = sp.csr_matrix(below.T @ Z)
        found.append(float(np.sqrt(np.asarray(sums.multiply(sums).sum(axis=1)).ravel()).sum() / Z.shape[0]))
        below = below @ C
    return found[::-1]


class Bench:
    """Runs both programs on one data set's matrices."""

    def __init__(self, folder: Path, pecos: str, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.python = {"libpecos": pecos, "xmcdist": sys.executable}
        self.Z = embeddings(folder)

    def run(self, peer: str, seed: int) -> dict[str, Any]:
        """All numbers of one run."""
        job = {"peer": peer, "seed": seed, "threads": self.threads, "folder": str(self.folder)}
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(self.threads)}
        env["NUMBA_NUM_THREADS"] = str(self.threads)
        for old in self.folder.glob("C_*.npz"):
            old.unlink()
        subprocess.run([self.python[peer], __file__, "--worker", json.dumps(job)], check=True, env=env)
        row: dict[str, Any] = json.loads((self.folder / "answer.json").read_text())
        row["both_s"] = row["embed_s"] + row["cluster_s"]
        row["both_cpu_s"] = row["embed_cpu_s"] + row["cluster_cpu_s"]
        files = sorted(self.folder.glob("C_*.npz"))
        row["objective"] = objectives([sp.csr_matrix(sp.load_npz(file)) for file in files], self.Z)
        return row


def line(data: str, peer: str, rows: list[dict[str, Any]]) -> str:
    """One row of the table."""
    cells = [data, peer]
    names = ("embed_s", "cluster_s", "both_s", "both_cpu_s")
    cells += [f"{np.median([row[name] for row in rows]):.3f}" for name in names]
    cells.append(f"{max(row['peak_mb'] for row in rows):.0f}")
    levels = np.array([row["objective"] for row in rows])
    cells += [" ".join(f"{x:.4f}" for x in levels.mean(axis=0)), f"{levels[:, -1].std():.4f}"]
    return "| " + " | ".join(cells) + " |"


HEAD = [
    "| data | program | PIFA s | k-means s | both s | both CPU s | peak MB | objective by level | sd of the last |",
    "|---|---|---|---|---|---|---|---|---|",
]


def report(args: argparse.Namespace, lines: list[str]) -> str:
    """The whole markdown page."""
    when = datetime.datetime.now(datetime.timezone.utc)  # noqa: UP017 - the other interpreter may be older
    return "\n".join(
        [
            "# Label trees: xmcdist and libpecos",
            "",
            f"{when:%Y-%m-%d}; {hardware()}; {args.threads} threads; {versions(args.pecos)}.",
            "",
            f"    {shlex.join(['python', *sys.argv])}",
            "",
            f"nr_splits {SPLITS}, max_leaf_size {LEAF}.  {args.repeat} runs each, in turn, with seeds 0 to "
            f"{args.repeat - 1}; times are medians, memory the largest peak of the process with X and Y in it, the "
            "objective (length of clusters' sums, a label; more is better) a mean over seeds, coarse level to fine.",
            "",
            *HEAD,
            *lines,
            "",
        ]
    )


def main() -> None:
    """Parse the command line and run everything."""
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        worker(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--pecos", required=True, help="Python with libpecos")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="markdown file; default: printed only")
    args = parser.parse_args()
    lines: list[str] = []
    print("\n".join(HEAD), flush=True)
    for source in args.data:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if (source / "X.trn.npz").exists():
                for A, file in zip(matrices(source), ("X.trn.npz", "Y.trn.npz"), strict=True):
                    sp.save_npz(folder / file, A, compressed=False)
            else:
                prepare(source, folder)
            bench = Bench(folder, args.pecos, args.threads)
            rows: dict[str, list[dict[str, Any]]] = {peer: [] for peer in PEERS}
            for seed in range(args.repeat):
                for peer in PEERS:
                    rows[peer].append(bench.run(peer, seed))
            for peer in PEERS:
                lines.append(line(source.name, peer, rows[peer]))
                print(lines[-1], flush=True)
    page = report(args, lines)
    if args.out:
        args.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
