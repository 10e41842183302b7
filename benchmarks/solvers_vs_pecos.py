"""Every CPU solver of the rankers beside libpecos's of the same name, on the same matrices and tree.

    python benchmarks/solvers_vs_pecos.py DATA_DIR... --pecos PYTHON [--repeat 5] [--out table.md]

A DATA_DIR holds X.trn.txt, X.tst.txt (a text a line) and Y.trn.npz, Y.tst.npz (scipy CSR).
PYTHON is the interpreter of an environment with libpecos; this script runs itself in it.  The
tree is libpecos's of seed 0.  Every training is a process of its own; the programs take turns.
Predictions of both are scored by the same code, with the post-processors ``l3-hinge`` (the
default of both programs) and ``sigmoid`` (probabilities, what logistic regression means).
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from linear_vs_pecos import (
    BEAM,
    LEAF,
    ROOT,
    SPLITS,
    THRESHOLD,
    TOPK,
    Meter,
    hardware,
    matrices,
    precision,
    prepare,
    versions,
    warm_up,
)

SOLVERS = {  # ours, and libpecos's name of the same problem
    "l2svc_dual": "L2R_L2LOSS_SVC_DUAL",
    "l1svc_dual": "L2R_L1LOSS_SVC_DUAL",
    "logistic_dual": "L2R_LR_DUAL",
    "l2svc_primal": "L2R_L2LOSS_SVC_PRIMAL",
}
RUNS = [*((solver, 1.0) for solver in SOLVERS), ("logistic_dual", 0.0)]  # and the value of the bias feature
PROCESSORS = ("l3-hinge", "sigmoid")


def make_tree(folder: Path, threads: int) -> None:
    """libpecos's tree, level by level, into ``folder``."""
    from pecos.xmc import Indexer, LabelEmbeddingFactory

    X, Y = matrices(folder, "trn")
    Z = LabelEmbeddingFactory.create(Y.tocsc(), X, method="pifa", threads=threads)
    options = {"nr_splits": SPLITS, "max_leaf_size": LEAF, "threads": threads, "seed": 0}
    for t, C in enumerate(Indexer.gen(Z, indexer_type="hierarchicalkmeans", **options), start=1):
        sp.save_npz(folder / f"C_{t}.npz", sp.csr_matrix(C))


def chain(folder: Path) -> list[sp.csr_matrix]:
    """The tree's levels."""
    return [sp.csr_matrix(sp.load_npz(path)) for path in sorted(folder.glob("C_*.npz"))]


def pecos_train(folder: Path, solver: str, bias: float, threads: int, meter: Meter) -> dict[str, sp.csr_matrix]:
    """libpecos: the test documents' labels by post-processor."""
    from pecos.xmc.xlinear.model import XLinearModel

    X, Y = matrices(folder, "trn")
    Y, levels = Y.tocsc(), [C.tocsc() for C in chain(folder)]
    kept = {"only_topk": TOPK, "beam_size": BEAM, "threshold": THRESHOLD, "negative_sampling_scheme": "tfn"}
    kind = {"solver_type": SOLVERS[solver], "bias": bias}
    ranker = meter.run("train", lambda: XLinearModel.train(X, Y, C=levels, threads=threads, **kept, **kind))
    T, _ = matrices(folder, "tst")
    options = {"only_topk": TOPK, "beam_size": BEAM, "threads": threads}
    return {p: sp.csr_matrix(ranker.predict(T, post_processor=p, **options)) for p in PROCESSORS}


def ours_train(folder: Path, solver: str, bias: float, threads: int, meter: Meter) -> dict[str, sp.csr_matrix]:
    """xmcdist: the same."""
    from xmcdist.inference.beam import beam_search
    from xmcdist.rankers.model import LinearTree
    from xmcdist.rankers.solver import SolverParams, solve_level
    from xmcdist.sparse.features import Features
    from xmcdist.trees.label_tree import LabelTree

    X, Y = matrices(folder, "trn")
    tree, params = LabelTree.from_chain(chain(folder)), SolverParams(threshold=THRESHOLD, solver=solver, bias=bias)

    def fit() -> LinearTree:
        features, levels = Features(X, None), []
        M = sp.csr_matrix(np.ones((X.shape[0], 1), np.float32))
        for t in range(1, tree.depth + 1):
            Y_t = tree.lift(Y, t)
            levels.append(solve_level(features, Y_t, M, tree.child_ptr[t - 1], params, threads=threads))
            M = Y_t
        return LinearTree(tree, levels, X.shape[1], 0)

    warm_up(threads)
    one = sp.csr_matrix(np.ones((9, 1), np.float32))
    solve_level(Features(X[:9], None), one, one, np.array([0, 1]), params, threads=1)  # this solver's kernels, too
    ranker = meter.run("train", fit)
    T, _ = matrices(folder, "tst")
    options = {"beam": BEAM, "topk": TOPK, "threads": threads}
    return {p: beam_search(ranker, Features(T, None), post_processor=p, **options) for p in PROCESSORS}


def worker(job: dict[str, Any]) -> None:
    """One training of one program, in this process; or its tree."""
    folder, threads = Path(job["folder"]), int(job["threads"])
    if job["peer"] == "tree":
        make_tree(folder, threads)
        return
    meter = Meter()
    train = pecos_train if job["peer"] == "libpecos" else ours_train
    found = train(folder, job["solver"], float(job["bias"]), threads, meter)
    _, Y = matrices(folder, "tst")
    for name, P in found.items():
        meter.found |= {f"{name} {k}": v for k, v in precision(P, Y).items()}
    meter.write(Path(job["answer"]), "train")


def start(folder: Path, python: str, peer: str, threads: int, solver: str = "", bias: float = 1.0) -> dict[str, float]:
    """Run a worker; what it measured."""
    answer = folder / "answer.json"
    job = {
        "folder": str(folder),
        "peer": peer,
        "solver": solver,
        "bias": bias,
        "threads": threads,
        "answer": str(answer),
    }
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    subprocess.run([python, __file__, "--worker", json.dumps(job)], check=True, env=env)
    found: dict[str, float] = json.loads(answer.read_text()) if answer.exists() else {}
    return found


def line(data: str, solver: str, bias: float, peer: str, rows: Sequence[dict[str, float]]) -> str:
    """One row of the table: precision of the last run, median times, largest memory."""
    cells = [data, solver if bias else f"{solver}, bias 0", peer]
    cells += [" / ".join(f"{rows[-1][f'{processor} P@{k}']:.2f}" for k in (1, 3, 5)) for processor in PROCESSORS]
    cells += [f"{np.median([row[name] for row in rows]):.2f}" for name in ("train_s", "train_cpu_s")]
    cells.append(f"{max(row['train_mb'] for row in rows):.0f}")
    return "| " + " | ".join(cells) + " |"


def compare(source: Path, args: argparse.Namespace) -> list[str]:
    """All solvers of both programs on one data set."""
    rows: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(source, folder)
        start(folder, args.pecos, "tree", args.threads)
        for _ in range(args.repeat):
            for solver, bias in RUNS:
                for peer, python in (("libpecos", args.pecos), ("xmcdist", sys.executable)):
                    row = start(folder, python, peer, args.threads, solver, bias)
                    rows.setdefault((solver, bias, peer), []).append(row)
                    print(line(source.name, solver, bias, peer, [row]), flush=True)
    return [line(source.name, *run, found) for run, found in rows.items()]


def report(args: argparse.Namespace, lines: list[str]) -> str:
    """The whole markdown page."""
    when = datetime.datetime.now(datetime.timezone.utc)  # noqa: UP017 - the other interpreter may be older
    head = "| data | solver | program | P@1 / 3 / 5, l3-hinge | sigmoid | train s | train CPU s | MB |"
    return "\n".join(
        [
            "# Solvers of the rankers: xmcdist and libpecos",
            "",
            f"{when:%Y-%m-%d}; {hardware()}; {args.threads} threads; {versions(args.pecos)}.",
            "",
            f"    {shlex.join(['python', *sys.argv])}",
            "",
            f"TF-IDF (sublinear, min_df 2, at most 200,000 words); libpecos's tree of seed 0 (nr_splits {SPLITS}, "
            f"max_leaf_size {LEAF}); true negatives (tfn), Cp = Cn = 1, bias 1 unless it says otherwise, each "
            f"program's default tolerance, threshold {THRESHOLD}, beam {BEAM}, top {TOPK}.  Times are medians of "
            f"{args.repeat} runs in turn, training only; memory is the process's largest peak.  Equal scores rank "
            "by label id in both.",
            "",
            head,
            "|---|---|---|---|---|---|---|---|",
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
    for source in args.data:
        lines += compare(source, args)
    page = report(args, lines)
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
