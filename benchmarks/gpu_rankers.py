"""Rankers solved on a GPU and by all threads of the same machine: the same trees, run in turn.

    python benchmarks/gpu_rankers.py [DATA_DIR...] [--dense 384] [--repeat 3] [--out table.md]

A DATA_DIR holds X.trn.npz, X.tst.npz (features) or X.trn.txt, X.tst.txt (a text a line), and
Y.trn.npz, Y.tst.npz (scipy CSR).  Without one a data set is drawn: words and labels by power
laws, 120,000 labels.  With ``--dense d`` every data set is also run with d dense features beside
its words, a random projection of them.

A solver is timed over all levels of the tree, in memory, after a small problem has loaded (or
compiled) what it needs.  Both models are scored by the same beam search.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.sparse as sp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from xmcdist.config.schema import TreeConfig  # noqa: E402 - the path comes first
from xmcdist.inference.beam import beam_search  # noqa: E402
from xmcdist.rankers.device_solver import SolverReport, solve_level_on_device  # noqa: E402
from xmcdist.rankers.model import LinearTree  # noqa: E402
from xmcdist.rankers.solver import SolverParams, solve_level  # noqa: E402
from xmcdist.rankers.weights import LevelWeights  # noqa: E402
from xmcdist.sparse.features import Features, unit_vectors  # noqa: E402
from xmcdist.trees.build import build_label_tree  # noqa: E402
from xmcdist.trees.label_tree import LabelTree  # noqa: E402

SPLITS, LEAF, BEAM, TOPK = 16, 100, 10, 10


@dataclass
class Data:
    """One data set, float32 CSR."""

    name: str
    X: dict[str, sp.csr_matrix]
    Y: dict[str, sp.csr_matrix]
    E: dict[str, np.ndarray] = field(default_factory=dict)

    def features(self, part: str) -> Features:
        """Sparse, and dense where there are any."""
        return Features(self.X[part], self.E.get(part))


def opened(folder: Path) -> Data:
    """A data set on disk."""
    Y = {p: _matrix(folder / f"Y.{p}.npz") for p in ("trn", "tst")}
    if (folder / "X.trn.npz").exists():
        return Data(folder.name, {p: _matrix(folder / f"X.{p}.npz") for p in ("trn", "tst")}, Y)
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = {p: (folder / f"X.{p}.txt").read_text(encoding="utf-8").split("\n") for p in ("trn", "tst")}
    texts = {p: lines[:-1] if lines[-1] == "" else lines for p, lines in texts.items()}
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=200_000, dtype=np.float32)
    X = {"trn": vectorizer.fit_transform(texts["trn"]), "tst": vectorizer.transform(texts["tst"])}
    return Data(folder.name, X, Y)


def drawn(labels: int, docs: int, seed: int = 0) -> Data:
    """Documents of 1 to 8 labels; words partly of these labels, partly of the language at large."""
    rng = np.random.default_rng(seed)
    words, own, tests = 100_000, 12, docs // 20
    zipf = 1.0 / np.arange(1, words + 1)
    vocabulary = rng.choice(words, (labels, own), p=zipf / zipf.sum())  # each label's words
    popular = rng.permutation(labels)
    per_doc = rng.integers(1, 9, docs + tests)
    share = 1.0 / np.arange(5, labels + 5) ** 0.7
    y = popular[rng.choice(labels, per_doc.sum(), p=share / share.sum())]
    row = np.repeat(np.arange(docs + tests), per_doc)
    topical = vocabulary[np.repeat(y, 4), rng.integers(0, own, 4 * y.size)]
    common = rng.choice(words, 12 * (docs + tests), p=zipf / zipf.sum())
    rows = np.concatenate([np.repeat(row, 4), np.repeat(np.arange(docs + tests), 12)])
    X = sp.csr_matrix((np.ones(rows.size), (rows, np.concatenate([topical, common]))), shape=(docs + tests, words))
    idf = np.log(docs / (1.0 + np.bincount(X.indices, minlength=words)))
    X.data = (1 + np.log(X.data)) * idf[X.indices]
    X = sp.csr_matrix(sp.diags(1 / np.sqrt(X.multiply(X).sum(1).A1)) @ X, dtype=np.float32)
    Y = sp.csr_matrix((np.ones(y.size, np.float32), (row, y)), shape=(docs + tests, labels))
    Y.data[:] = 1
    X.sort_indices()
    split = {"trn": slice(0, docs), "tst": slice(docs, None)}
    return Data(f"drawn, {labels} labels", {p: X[s] for p, s in split.items()}, {p: Y[s] for p, s in split.items()})


def with_dense(data: Data, width: int) -> Data:
    """The same beside a random projection of its words, rows of length 1."""
    G = np.random.default_rng(1).normal(size=(data.X["trn"].shape[1], width)).astype(np.float32)
    E = {p: unit_vectors(np.asarray(X @ G)) for p, X in data.X.items()}
    return Data(f"{data.name} + {width} dense", data.X, data.Y, E)


@dataclass
class Run:
    """One training: seconds of each level, its model, and what the device did."""

    seconds: list[float]
    model: LinearTree
    reports: list[SolverReport]


def train(data: Data, tree: LabelTree, *, device: str | None, threads: int) -> Run:
    """All levels, true negatives."""
    features, Y = data.features("trn"), data.Y["trn"]
    M = sp.csr_matrix(np.ones((Y.shape[0], 1), np.float32))
    seconds, levels, reports = [], [], []
    for t in range(1, tree.depth + 1):
        Y_t, child_ptr, params, report = tree.lift(Y, t), tree.child_ptr[t - 1], SolverParams(), SolverReport()
        start = time.perf_counter()
        found: LevelWeights
        if device is None:
            found = solve_level(features, Y_t, M, child_ptr, params, threads=threads)
        else:
            found = solve_level_on_device(features, Y_t, M, child_ptr, params, device=device, say=print, report=report)
        seconds.append(time.perf_counter() - start)
        levels.append(found)
        reports.append(report)
        M = Y_t
    return Run(seconds, LinearTree(tree, levels, features.num_sparse, features.num_dense), reports)


def precision(data: Data, model: LinearTree, threads: int) -> list[float]:
    """P@1, 3, 5 in percent; ties to the smaller id."""
    P, Y = beam_search(model, data.features("tst"), beam=BEAM, topk=TOPK, threads=threads), data.Y["tst"]
    hits = np.zeros((P.shape[0], 5))
    for i in range(P.shape[0]):
        row = slice(P.indptr[i], P.indptr[i + 1])
        ids = P.indices[row][np.lexsort((P.indices[row], -P.data[row]))][:5]
        hits[i, : len(ids)] = np.isin(ids, Y.indices[Y.indptr[i] : Y.indptr[i + 1]])
    return [float(100 * hits[:, :k].mean()) for k in (1, 3, 5)]


def compare(data: Data, device: str, threads: int, repeat: int) -> list[str]:
    """The rows of one data set."""
    words = Features(data.X["trn"])
    tree = build_label_tree(words, data.Y["trn"], TreeConfig(nr_splits=SPLITS, max_leaf_size=LEAF), threads=threads)
    runs: dict[str | None, list[Run]] = {None: [], device: []}
    peak = 0.0
    for _ in range(repeat):
        for where, done in runs.items():
            _reset(device)
            done.append(train(data, tree, device=where, threads=threads))
            if len(done) > 1:
                done[-2].model = done[-1].model  # the weights of one run are enough
            peak = max(peak, _peak(device)) if where else peak
    rows = []
    for where, done in runs.items():
        levels = np.median([r.seconds for r in done], axis=0)
        total = np.median([sum(r.seconds) for r in done])
        scores = " | ".join(f"{p:.2f}" for p in precision(data, done[-1].model, threads))
        per_level = " + ".join(f"{s:.2f}" for s in levels)
        nnz = sum(level.nnz for level in done[-1].model.levels)
        what = f"{where}" if where else f"CPU, {threads} threads"
        memory = f"{peak:.0f}" if where and device != "cpu" else ""
        rows.append(f"| {data.name} | {what} | {total:.2f} | {per_level} | {scores} | {nnz / 1e6:.1f} | {memory} |")
    last = runs[device][-1]
    for t, report in enumerate(last.reports, start=1):
        stages = ", ".join(f"{k} {v:.2f}" for k, v in report.seconds.items())
        work = report.work
        print(
            f"{data.name} level {t}: {report.blocks} blocks, {report.sliced} slices, {report.on_cpu} nodes on the CPU, "
        )
        print(f"    {work.newton} Newton steps, {work.products} products; seconds: {stages}", flush=True)
    print("\n".join(rows), flush=True)
    return rows


def _matrix(path: Path) -> sp.csr_matrix:
    A = sp.csr_matrix(sp.load_npz(path), dtype=np.float32)
    A.sort_indices()
    return A


def _reset(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> float:
    """MiB of the GPU."""
    if device == "cpu":
        return 0.0
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


def _hardware(device: str) -> str:
    import torch

    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":", 1)[1].strip() for x in info if x.startswith("model name")), platform.processor())
    gpu = f"{torch.cuda.get_device_name()}, " if device != "cpu" else ""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return f"{gpu}{cpu}, {len(os.sched_getaffinity(0))} cores; xmcdist {git.stdout.strip()}, torch {torch.__version__}"


def main() -> None:
    """Compare on every data set and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", type=Path)
    parser.add_argument("--labels", type=int, default=120_000, help="of the drawn data set")
    parser.add_argument("--docs", type=int, default=150_000, help="of the drawn data set")
    parser.add_argument("--dense", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    small = with_dense(drawn(2000, 3000), 16)
    compare(small, args.device, args.threads, 1)  # loads and compiles
    rows = []
    for data in [opened(folder) for folder in args.data] or [drawn(args.labels, args.docs)]:
        rows += compare(data, args.device, args.threads, args.repeat)
        if args.dense:
            rows += compare(with_dense(data, args.dense), args.device, args.threads, args.repeat)
    page = [
        "# Rankers on a GPU",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {_hardware(args.device)}.",
        "",
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        f"Own tree, nr_splits {SPLITS}, max_leaf_size {LEAF}; true negatives, Cp = Cn = 1, eps and threshold 0.1; "
        f"beam {BEAM}.  Seconds of all levels together and of each, medians of {args.repeat} runs in turn, from "
        "matrices in memory to weights in memory.",
        "",
        "| data | solver | s | level by level | P@1 | P@3 | P@5 | million weights | GPU MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    if args.out:
        args.out.write_text("\n".join(page))
    print("\n".join(page))


if __name__ == "__main__":
    main()
