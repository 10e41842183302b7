"""Prediction with xmcdist and with libpecos on the same weights, run in turn, measured alike.

    python benchmarks/prediction_vs_pecos.py DATA_DIR... --pecos PYTHON [--repeat 5] [--out table.md]

A DATA_DIR holds what `linear_vs_pecos.py` reads, or the matrices it makes.  PYTHON is the
interpreter of an environment with libpecos; this script runs itself in it.

libpecos trains on TF-IDF, and on TF-IDF beside a dense part, which it holds as sparse columns;
its weights are then written as a model of xmcdist.  Every measurement is a process of its
own: it opens the model, answers a few documents (which loads, the first time ever compiles,
the kernels), and then notes

* open: opening again, with the files in the page cache;
* docs/s: the test documents divided by wall seconds, and by CPU seconds;
* p50, p99: milliseconds of one document at a time, one thread, rows cut beforehand;
* MB: the process's peak resident memory after the batch, code and mapped weights included;
* disk: bytes of the model's files.
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
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

sys.path.insert(0, str(Path(__file__).resolve().parent))
from linear_vs_pecos import BEAM, LEAF, ROOT, SPLITS, THRESHOLD, TOPK, Meter, hardware, matrices, precision, prepare
from linear_vs_pecos import versions as versions_of

WIDTH = 384
COLUMNS = ("data", "input", "program", "P@1", "P@5", "docs/s", "docs/CPU s", "p50 ms", "p99 ms", "open ms")
COLUMNS += ("disk MB", "peak MB")
PROGRAMS = {
    "sparse": ("libpecos", "libpecos-mmap", "xmcdist", "xmcdist-float16"),
    "both": ("libpecos", "libpecos-mmap", "xmcdist", "xmcdist-mixed"),
}


def project(folder: Path) -> None:
    """A dense part: a random projection of TF-IDF to 384 numbers, rows of length 1."""
    X = {part: matrices(folder, part)[0] for part in ("trn", "tst")}
    R = np.random.default_rng(0).normal(size=(X["trn"].shape[1], WIDTH)).astype(np.float32)
    for part, A in X.items():
        E = A @ R
        E /= np.maximum(np.linalg.norm(E, axis=1, keepdims=True), 1e-12)
        np.save(folder / f"E.{part}.npy", E.astype(np.float32))


def side_by_side(folder: Path, part: str) -> sp.csr_matrix:
    """``[TF-IDF | dense]`` as libpecos wants it: sparse."""
    X, E = matrices(folder, part)[0], np.load(folder / f"E.{part}.npy")
    return sp.csr_matrix(sp.hstack([X, sp.csr_matrix(E)], format="csr", dtype=np.float32))


def pecos_train(folder: Path, model: Path, kind: str, threads: int) -> None:
    """A model of libpecos, in its usual form and in the one it maps."""
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel

    X, Y = matrices(folder, "trn")
    Y = Y.tocsc()
    Z = LabelEmbeddingFactory.create(Y, X, method="pifa", threads=threads)
    options = {"nr_splits": SPLITS, "max_leaf_size": LEAF, "threads": threads, "seed": 0}
    chain = Indexer.gen(Z, indexer_type="hierarchicalkmeans", **options)
    kept = {"only_topk": TOPK, "beam_size": BEAM, "threshold": THRESHOLD, "negative_sampling_scheme": "tfn"}
    features = X if kind == "sparse" else side_by_side(folder, "trn")
    XLinearModel.train(features, Y, C=chain, threads=threads, **kept).save(str(model / "libpecos"))
    XLinearModel.compile_mmap_model(str(model / "libpecos"), str(model / "libpecos-mmap"))


def convert(model: Path, num_dense: int) -> None:
    """libpecos's weights as models of xmcdist; the last ``num_dense`` columns before the bias are dense."""
    from dataclasses import replace

    from xmcdist.rankers.model import LevelWeights, LinearTree
    from xmcdist.trees.label_tree import LabelTree

    folders = sorted((model / "libpecos" / "ranker").glob("*.model"), key=lambda p: int(p.stem))
    chain = [sp.csr_matrix(sp.load_npz(p / "C.npz")) for p in folders]
    tree, place, levels = LabelTree.from_chain(chain), np.zeros(1, np.int64), []
    for child_ptr, C, p in zip(tree.child_ptr, chain, folders, strict=True):
        rows, above = C.nonzero()
        order = rows[np.lexsort((rows, place[above]))]  # tree order
        place = np.argsort(order)
        W = sp.csr_matrix(sp.load_npz(p / "W.npz").T)[order]
        D = W.shape[1] - 1 - num_dense
        dense = W[:, D:-1].toarray() if num_dense else None
        levels.append(LevelWeights.from_rows(W[:, :D], dense, W[:, -1].toarray()[:, 0], child_ptr))
    made = LinearTree(tree, levels, D, num_dense)
    made.save(model / "xmcdist")
    for dtype in ("mixed",) if num_dense else ("float16",):
        replace(made, levels=[level.astype(dtype) for level in levels]).save(model / f"xmcdist-{dtype}")


def open_pecos(model: Path, threads: int) -> Any:
    """libpecos: opens; answers a batch or one document."""
    from pecos.xmc.xlinear.model import XLinearModel

    opened = XLinearModel.load(str(model), is_predict_only=True)
    return lambda X, many: opened.predict(X, only_topk=TOPK, beam_size=BEAM, threads=threads if many else 1)


def open_ours(model: Path, threads: int) -> Any:
    """xmcdist: opens; answers a batch or one document."""
    from xmcdist.inference.beam import beam_search
    from xmcdist.rankers.model import LinearTree
    from xmcdist.sparse.features import Features

    opened = LinearTree.load(model)
    return lambda x, many: beam_search(opened, Features(*x), beam=BEAM, topk=TOPK, threads=threads if many else 1)


def predict(job: dict[str, Any]) -> None:
    """One program's measurements, in this process."""
    folder, model, threads = Path(job["folder"]), Path(job["model"]), int(job["threads"])
    ours, dense = job["program"].startswith("xmcdist"), job["kind"] == "both"
    X: Any = matrices(folder, "tst")[0]
    n = X.shape[0]
    count = min(n, int(job["online"]))
    if ours:
        E = np.load(folder / "E.tst.npy") if dense else None
        all_docs: Any = (X, E)
        some: list[Any] = [(X[i], None if E is None else E[i : i + 1]) for i in range(count)]
    else:
        X = side_by_side(folder, "tst") if dense else X
        all_docs, some = X, [X[i] for i in range(count)]
    meter, opener = Meter(), open_ours if ours else open_pecos
    answer = opener(model, threads)
    for x in some[:32]:
        answer(x, False)
    answer(all_docs, True)
    answer = meter.run("open", lambda: opener(model, threads))
    answer(some[0], False)
    P = meter.run("batch", lambda: answer(all_docs, True))
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    seconds = np.empty(count)
    for i, x in enumerate(some):
        start = time.perf_counter()
        answer(x, False)
        seconds[i] = time.perf_counter() - start
    found = meter.found | {"docs": n / meter.found["batch_s"], "docs_cpu": n / meter.found["batch_cpu_s"]}
    found |= {"open_ms": 1e3 * meter.found["open_s"], "mb": peak / 1024}
    found |= {f"p{q}": 1e3 * float(np.percentile(seconds, q)) for q in (50, 99)}
    sp.save_npz(model / "P.npz", sp.csr_matrix(P))
    Path(job["answer"]).write_text(json.dumps(found))


def worker(job: dict[str, Any]) -> None:
    """One task, in this process."""
    if job["task"] == "train":
        pecos_train(Path(job["folder"]), Path(job["model"]), job["kind"], int(job["threads"]))
    elif job["task"] == "convert":
        convert(Path(job["model"]), WIDTH if job["kind"] == "both" else 0)
    else:
        predict(job)


def run(python: str, job: dict[str, Any]) -> None:
    """A task in a process of its own."""
    threads = str(job["threads"])
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
    subprocess.run([python, __file__, "--worker", json.dumps(job)], check=True, env=env)


def measure(args: argparse.Namespace, folder: Path, kind: str, name: str) -> list[str]:
    """Rows of the table for one data set and kind of input."""
    work = folder / kind
    work.mkdir(exist_ok=True)
    base = {"folder": str(folder), "kind": kind, "threads": args.threads, "online": args.online}
    run(args.pecos, base | {"task": "train", "model": str(work)})
    run(sys.executable, base | {"task": "convert", "model": str(work)})
    sizes = {p: sum(f.stat().st_size for f in (work / p).rglob("*") if f.is_file()) for p in PROGRAMS[kind]}
    found: dict[str, list[dict[str, float]]] = {p: [] for p in PROGRAMS[kind]}
    for _ in range(args.repeat):
        for program, rows in found.items():
            answer = folder / "answer.json"
            job = base | {"task": "predict", "program": program, "model": str(work / program), "answer": str(answer)}
            run(args.pecos if program.startswith("libpecos") else sys.executable, job)
            rows.append(json.loads(answer.read_text()))
    lines, Y = [], matrices(folder, "tst")[1]
    for program, rows in found.items():
        p = precision(sp.csr_matrix(sp.load_npz(work / program / "P.npz")), Y)
        middle = {k: float(np.median([row[k] for row in rows])) for k in rows[0]}
        cells = [name, "TF-IDF" if kind == "sparse" else "TF-IDF + dense", program]
        cells += [f"{p['P@1']:.2f}", f"{p['P@5']:.2f}", f"{middle['docs']:,.0f}", f"{middle['docs_cpu']:,.0f}"]
        cells += [f"{middle['p50']:.3f}", f"{middle['p99']:.3f}", f"{middle['open_ms']:.1f}"]
        cells += [f"{sizes[program] / 1e6:.1f}", f"{middle['mb']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def report(args: argparse.Namespace, lines: list[str]) -> str:
    """The whole markdown page."""
    when = datetime.datetime.now(datetime.UTC)
    return "\n".join(
        [
            "# Prediction: xmcdist and libpecos on the same weights",
            "",
            f"{when:%Y-%m-%d}; {hardware()}; {args.threads} threads; {versions_of(args.pecos)}.",
            "",
            f"    {shlex.join(['python', *sys.argv])}",
            "",
            f"libpecos trained the weights (nr_splits {SPLITS}, max_leaf_size {LEAF}, tfn, threshold {THRESHOLD}, "
            "which it applies to the columns of the dense part as well).",
            f"Beam {BEAM}, top {TOPK}.  The dense part is a Gaussian random projection of TF-IDF to {WIDTH} numbers, "
            "rows of length 1.",
            f"Medians of {args.repeat} processes each, in turn.  Latency: {args.online:,} documents, one after the "
            "other, one thread.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
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
    parser.add_argument("--input", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS), help="kinds of features")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--online", type=int, default=2000, help="documents asked one at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="markdown file; default: printed only")
    args = parser.parse_args()
    lines: list[str] = []
    for source in args.data:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if (source / "X.trn.npz").exists():
                for path in source.glob("*.npz"):
                    (folder / path.name).symlink_to(path.resolve())
            else:
                prepare(source, folder)
            project(folder)
            for kind in args.input:
                lines += measure(args, folder, kind, source.name)
    page = report(args, lines)
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
