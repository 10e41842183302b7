"""Training linear rankers on 1 and 2 threads, and on 1, 2 and 4 processes: seconds, and CPU seconds in all.

    python benchmarks/ranker_scaling.py DATA_DIR... [--repeat 5] [--out table.md]

A DATA_DIR holds X.trn.txt, X.tst.txt (a text a line) and Y.trn.npz, Y.tst.npz (scipy CSR), or
X.trn.npz in place of texts.  All levels of a tree of its labels are solved, teacher-forced
negatives, each process the range of nodes that the training pipeline gives it, with one thread.
Runs of all kinds take turns; every process is new, and reports its own work only: kernels are
loaded, matrices are read before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from linear_vs_pecos import ROOT, cpu_seconds, hardware, matrices, ours_tree, prepare, warm_up

KINDS = [("1 thread", 1, 1), ("2 threads", 1, 2), ("2 processes", 2, 1), ("4 processes", 4, 1)]


def worker(job: dict[str, Any]) -> None:
    """One process: all levels of its range; starts when the go file is there."""
    from xmcdist.rankers.partition import estimate_costs, node_ranges
    from xmcdist.rankers.solver import SolverParams, solve_level
    from xmcdist.sparse.features import Features
    from xmcdist.trees.label_tree import LabelTree

    folder, rank, processes, threads = Path(job["folder"]), job["rank"], job["processes"], job["threads"]
    X, Y = matrices(folder, "trn")
    tree, features = LabelTree.load(folder / "tree"), Features(X, None)
    lifted = [sp.csr_matrix(np.ones((X.shape[0], 1), np.float32)), *(tree.lift(Y, t) for t in range(1, tree.depth + 1))]
    ranges = [
        node_ranges(estimate_costs(features, lifted[t], tree.child_ptr[t]), tree.child_ptr[t], processes)[rank]
        for t in range(tree.depth)
    ]
    warm_up(threads)
    Path(job["answer"]).with_suffix(".ready").touch()
    while not Path(job["go"]).exists():
        time.sleep(0.005)
    wall, cpu = time.perf_counter(), cpu_seconds()
    for t in range(tree.depth):
        params = SolverParams()
        solve_level(features, lifted[t + 1], lifted[t], tree.child_ptr[t], params, nodes=ranges[t], threads=threads)
    answer = {"s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu}
    Path(job["answer"]).write_text(json.dumps(answer))


def run(folder: Path, processes: int, threads: int) -> tuple[float, float]:
    """Seconds of the slowest process, CPU seconds of all."""
    turn = Path(tempfile.mkdtemp(dir=folder))
    go, started = turn / "go", []
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": str(threads)}
    for rank in range(processes):
        job = {"folder": str(folder), "rank": rank, "processes": processes, "threads": threads, "go": str(go)}
        job["answer"] = str(turn / f"{rank}.json")
        started.append(subprocess.Popen([sys.executable, __file__, "--worker", json.dumps(job)], env=env))
    while len(list(turn.glob("*.ready"))) < processes:
        if any(p.poll() not in (None, 0) for p in started):
            raise SystemExit("a process failed")
        time.sleep(0.05)
    go.touch()
    if any(p.wait() for p in started):
        raise SystemExit("a process failed")
    answers = [json.loads((turn / f"{rank}.json").read_text()) for rank in range(processes)]
    shutil.rmtree(turn)
    return max(a["s"] for a in answers), sum(a["cpu_s"] for a in answers)


def main() -> None:
    """Parse the command line and run everything."""
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        worker(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="markdown file; default: printed only")
    args = parser.parse_args()
    lines = []
    for source in args.data:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            if (source / "X.trn.npz").exists():
                for name in ("X.trn.npz", "Y.trn.npz"):
                    shutil.copy(source / name, folder / name)
            else:
                prepare(source, folder)
            ours_tree(*matrices(folder, "trn"), 0, 2).save(folder / "tree")
            found: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in KINDS}
            for _ in range(args.repeat):
                for name, processes, threads in KINDS:
                    found[name].append(run(folder, processes, threads))
        medians = {name: np.median(np.array(rows), axis=0) for name, rows in found.items()}
        alone, threads2 = medians["1 thread"], medians["2 threads"]
        for name, (wall, cpu) in medians.items():
            more = 100 * (cpu / threads2[1] - 1)
            cells = [source.name, name, f"{wall:.2f}", f"{alone[0] / wall:.2f}", f"{cpu:.2f}", f"{more:+.0f} %"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    import numba

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    page = [
        "# Rankers on threads and on processes",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {hardware()}; xmcdist {commit.strip()}, "
        f"numba {numba.__version__}, numpy {np.__version__}.",
        "",
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        "All levels of one tree, teacher-forced negatives, TF-IDF.  Seconds of the slowest process, CPU of all; "
        f"medians of {args.repeat} runs, in turn.",
        "",
        "| data | on | s | times as fast as 1 thread | CPU s | CPU against 2 threads |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
    ]
    print("\n".join(page))
    if args.out:
        args.out.write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
