"""Linear rankers of xmcdist and of libpecos on the same matrices, run in turn, measured alike.

    python benchmarks/linear_vs_pecos.py DATA_DIR... --pecos PYTHON [--repeat 5] [--out table.md]

A DATA_DIR holds X.trn.txt, X.tst.txt (a text a line) and Y.trn.npz, Y.tst.npz (scipy CSR).
PYTHON is the interpreter of an environment with libpecos; this script runs itself in it.

Two comparisons: (i) libpecos's own tree, imported, with every scheme of negatives; (ii) every
program's own trees, several seeds.  Training and prediction are processes of their own; a process reports wall and CPU
seconds of its work, without reading files, and its peak resident memory.  Predictions of
both are scored by the same code, ties to the smaller label id.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

SPLITS, LEAF, BEAM, TOPK, THRESHOLD = 16, 100, 10, 10, 0.1
ROOT = Path(__file__).resolve().parents[1]


def matrices(folder: Path, part: str) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """TF-IDF and labels of a part, float32 CSR."""
    X, Y = (sp.csr_matrix(sp.load_npz(folder / f"{name}.{part}.npz"), dtype=np.float32) for name in "XY")
    for A in (X, Y):
        A.sort_indices()
    return X, Y


def prepare(source: Path, folder: Path) -> None:
    """Make the matrices both programs read."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = {p: (source / f"X.{p}.txt").read_text(encoding="utf-8").split("\n") for p in ("trn", "tst")}
    texts = {p: lines[:-1] if lines[-1] == "" else lines for p, lines in texts.items()}
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=200_000, dtype=np.float32)
    made = {"trn": vectorizer.fit_transform(texts["trn"]), "tst": vectorizer.transform(texts["tst"])}
    for part, X in made.items():
        Y = sp.csr_matrix(sp.load_npz(source / f"Y.{part}.npz"), dtype=np.float32)
        Y.data[:] = 1
        if X.shape[0] != Y.shape[0]:
            raise SystemExit(f"{source}: {X.shape[0]} texts and {Y.shape[0]} label rows in {part}")
        sp.save_npz(folder / f"X.{part}.npz", X.tocsr())
        sp.save_npz(folder / f"Y.{part}.npz", Y)


class Meter:
    """Wall and CPU seconds by name, and the process's peak memory."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Call ``work`` and note what it took."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        answer = work()
        self.found[f"{name}_s"] = time.perf_counter() - wall
        self.found[f"{name}_cpu_s"] = cpu_seconds() - cpu
        return answer

    def write(self, path: Path, phase: str) -> None:
        """Leave the numbers for the parent process."""
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        path.write_text(json.dumps(self.found | {f"{phase}_mb": peak / 1024}))


def cpu_seconds() -> float:
    """User and system seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def pecos_train(folder: Path, model: Path, seed: int, threads: int, tree: Path | None, scheme: str) -> Meter:
    """libpecos: label embeddings, k-means, unless a tree is given, and rankers; writes its tree beside the model."""
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel

    X, Y = matrices(folder, "trn")
    Y, meter = Y.tocsc(), Meter()
    if tree is None:
        Z = meter.run("embed", lambda: LabelEmbeddingFactory.create(Y, X, method="pifa", threads=threads))
        options = {"nr_splits": SPLITS, "max_leaf_size": LEAF, "threads": threads, "seed": seed}
        chain = meter.run("tree", lambda: Indexer.gen(Z, indexer_type="hierarchicalkmeans", **options))
    else:
        chain = [sp.csc_matrix(sp.load_npz(p)) for p in sorted(tree.glob("C_*.npz"))]
    kept = {"only_topk": TOPK, "beam_size": BEAM, "threshold": THRESHOLD, "negative_sampling_scheme": scheme}
    ranker = meter.run("train", lambda: XLinearModel.train(X, Y, C=chain, threads=threads, **kept))
    ranker.save(str(model))
    for t, C in enumerate(chain, start=1):
        sp.save_npz(model / f"C_{t}.npz", sp.csr_matrix(C))
    return meter


def pecos_predict(folder: Path, model: Path, threads: int) -> tuple[Meter, sp.csr_matrix]:
    """libpecos: the test documents' labels."""
    from pecos.xmc.xlinear.model import XLinearModel

    X, _ = matrices(folder, "tst")
    ranker, meter = XLinearModel.load(str(model), is_predict_only=True), Meter()
    P = meter.run("predict", lambda: ranker.predict(X, only_topk=TOPK, beam_size=BEAM, threads=threads))
    return meter, sp.csr_matrix(P)


def ours_fit(X: sp.csr_matrix, Y: sp.csr_matrix, tree: Any, seed: int, threads: int, scheme: str = "tfn") -> Any:
    """The rankers of all levels on a given tree."""
    from xmcdist.inference.beam import predict_level
    from xmcdist.negatives.schemes import active_parents
    from xmcdist.rankers.model import LinearTree
    from xmcdist.rankers.solver import SolverParams, solve_level
    from xmcdist.sparse.features import Features

    features, levels = Features(X, None), []
    M = found = sp.csr_matrix(np.ones((X.shape[0], 1), np.float32))
    for t in range(1, tree.depth + 1):
        Y_t, child_ptr = tree.lift(Y, t), tree.child_ptr[t - 1]
        params = SolverParams(threshold=THRESHOLD, seed=seed)
        levels.append(solve_level(features, Y_t, M, child_ptr, params, threads=threads))
        if t < tree.depth:
            if "man" in scheme:
                found = predict_level(levels[-1], features, found, child_ptr, BEAM, "l3-hinge", threads=threads)
            M = active_parents(scheme, Y_t, found)
    return LinearTree(tree, levels, X.shape[1], 0)


def ours_tree(X: sp.csr_matrix, Y: sp.csr_matrix, seed: int, threads: int) -> Any:
    """A tree over the labels."""
    from xmcdist.config.schema import TreeConfig
    from xmcdist.sparse.features import Features
    from xmcdist.trees.build import build_label_tree

    cfg = TreeConfig(nr_splits=SPLITS, max_leaf_size=LEAF, seed=seed)
    return build_label_tree(Features(X, None), Y, cfg, threads=threads)


def ours_train(folder: Path, model: Path, seed: int, threads: int, tree: Path | None, scheme: str) -> Meter:
    """xmcdist: the same stages; ``tree`` is the folder of a given one."""
    from xmcdist.trees.label_tree import LabelTree

    X, Y = matrices(folder, "trn")
    warm_up(threads)
    meter = Meter()
    if tree is None:
        made = meter.run("tree", lambda: ours_tree(X, Y, seed, threads))
    else:
        made = LabelTree.from_chain([sp.load_npz(p) for p in sorted(tree.glob("C_*.npz"))])
    meter.run("train", lambda: ours_fit(X, Y, made, seed, threads, scheme)).save(model)
    return meter


def ours_predict(folder: Path, model: Path, threads: int) -> tuple[Meter, sp.csr_matrix]:
    """xmcdist: the test documents' labels."""
    from xmcdist.inference.beam import beam_search
    from xmcdist.rankers.model import LinearTree
    from xmcdist.sparse.features import Features

    X, _ = matrices(folder, "tst")
    warm_up(threads)
    opened, meter = LinearTree.load(model), Meter()
    P = meter.run("predict", lambda: beam_search(opened, Features(X, None), beam=BEAM, topk=TOPK, threads=threads))
    return meter, P


def warm_up(threads: int) -> None:
    """Load (the first time ever: compile) the kernels, as libpecos's are compiled when it is installed."""
    from xmcdist.inference.beam import beam_search
    from xmcdist.rankers.model import LinearTree
    from xmcdist.sparse.features import Features

    rng = np.random.default_rng(0)
    X = sp.csr_matrix(rng.random((300, 20)).astype(np.float32))
    Y = sp.csr_matrix((rng.random((300, 3200)) < 0.01).astype(np.float32))
    model = ours_fit(X, Y, ours_tree(X, Y, 0, threads), 0, threads, "tfn+man")
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "m")
        beam_search(LinearTree.load(Path(folder) / "m"), Features(X, None), beam=2, topk=2, threads=threads)


def worker(job: dict[str, Any]) -> None:
    """One phase of one program, in this process."""
    folder, model, threads = Path(job["folder"]), Path(job["model"]), int(job["threads"])
    tree = Path(job["tree"]) if job.get("tree") else None
    if job["phase"] == "train":
        train = pecos_train if job["peer"] == "libpecos" else ours_train
        meter = train(folder, model, int(job["seed"]), threads, tree, job["scheme"])
    else:
        predict = pecos_predict if job["peer"] == "libpecos" else ours_predict
        meter, P = predict(folder, model, threads)
        sp.save_npz(model / "P.npz", P)
    meter.write(Path(job["answer"]), job["phase"])


def precision(P: sp.csr_matrix, Y: sp.csr_matrix) -> dict[str, float]:
    """P@1, 3, 5 in percent; ties to the smaller id."""
    hits = np.zeros((P.shape[0], 5))
    for i in range(P.shape[0]):
        row = slice(P.indptr[i], P.indptr[i + 1])
        ids = P.indices[row][np.lexsort((P.indices[row], -P.data[row]))][:5]
        hits[i, : len(ids)] = np.isin(ids, Y.indices[Y.indptr[i] : Y.indptr[i + 1]])
    return {f"P@{k}": float(100 * hits[:, :k].mean()) for k in (1, 3, 5)}


class Bench:
    """Runs programs on one data set's matrices."""

    def __init__(self, folder: Path, pecos: str, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.python = {"libpecos": pecos, "xmcdist": sys.executable}
        _, self.Y = matrices(folder, "tst")

    def both(self, peer: str, seed: int, tree: Path | None = None, scheme: str = "tfn") -> dict[str, float]:
        """Train and predict, each in a process; all numbers of the run."""
        model = self.folder / f"{peer}-{seed}{'-given' if tree else ''}"
        model.mkdir(exist_ok=True)
        row: dict[str, float] = {}
        for phase in ("train", "predict"):
            answer = self.folder / "answer.json"
            job = {"peer": peer, "phase": phase, "seed": seed, "tree": str(tree) if tree else None, "scheme": scheme}
            job |= {"folder": str(self.folder), "model": str(model), "threads": self.threads, "answer": str(answer)}
            env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(self.threads)}
            env["NUMBA_NUM_THREADS"] = str(self.threads)
            subprocess.run([self.python[peer], __file__, "--worker", json.dumps(job)], check=True, env=env)
            row |= json.loads(answer.read_text())
        row |= precision(sp.csr_matrix(sp.load_npz(model / "P.npz")), self.Y)
        return row

    def imported_tree(self, repeat: int, scheme: str) -> dict[str, list[dict[str, float]]]:
        """Comparison (i): both on libpecos's tree of seed 0, in turn."""
        rows: dict[str, list[dict[str, float]]] = {"libpecos": [], "xmcdist": []}
        tree = self.folder / "libpecos-0"
        if not tree.is_dir():
            self.both("libpecos", 0)
        for _ in range(repeat):
            for peer, found in rows.items():
                found.append(self.both(peer, 0, tree, scheme))
        return rows

    def own_trees(self, seeds: int) -> dict[str, list[dict[str, float]]]:
        """Comparison (ii): everyone's own trees, in turn."""
        rows: dict[str, list[dict[str, float]]] = {"libpecos": [], "xmcdist": []}
        for seed in range(seeds):
            for peer, found in rows.items():
                found.append(self.both(peer, seed))
        return rows


def given_lines(data: str, scheme: str, rows: dict[str, list[dict[str, float]]]) -> list[str]:
    """Comparison (i) of one data set: precision, median times, largest memory, and how often ours go into theirs."""
    out = []
    for peer, found in rows.items():
        cells = [data, scheme, peer, *(f"{found[0][f'P@{k}']:.2f}" for k in (1, 3, 5))]
        for name in ("train_s", "train_cpu_s"):
            ours, theirs = (float(np.median([row[name] for row in rows[p]])) for p in (peer, "libpecos"))
            cells.append(f"{ours:.2f}" + (f" (1/{theirs / ours:.1f})" if peer != "libpecos" else ""))
        cells.append(f"{np.median([row['predict_s'] for row in found]):.3f}")
        cells += [f"{max(row[f'{phase}_mb'] for row in found):.0f}" for phase in ("train", "predict")]
        out.append("| " + " | ".join(cells) + " |")
    return out


def own_line(data: str, peer: str, rows: list[dict[str, float]]) -> str:
    """One row of comparison (ii): mean precision and its spread over seeds, median times, largest memory."""
    cells = [data, peer]
    for k in (1, 3, 5):
        values = [row[f"P@{k}"] for row in rows]
        cells.append(f"{np.mean(values):.2f} ±{np.std(values):.2f}")
    for name, digits in (("tree_s", 2), ("train_s", 2), ("train_cpu_s", 2), ("predict_s", 3)):
        values = [row.get(name, np.nan) + (row.get("embed_s", 0.0) if name == "tree_s" else 0.0) for row in rows]
        cells.append(f"{np.median(values):.{digits}f}")
    cells += [f"{max(row[f'{phase}_mb'] for row in rows):.0f}" for phase in ("train", "predict")]
    return "| " + " | ".join(cells) + " |"


def versions(pecos: str) -> str:
    """What took part."""
    import numba

    query = "from importlib.metadata import version as v; print('libpecos', v('libpecos'), '+ numpy', v('numpy'))"
    theirs = subprocess.run([pecos, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return f"xmcdist {commit.strip()}, numba {numba.__version__}, numpy {np.__version__}; {theirs}"


def hardware() -> str:
    """Processor, cores, memory."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":", 1)[1].strip() for x in info if x.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def report(args: argparse.Namespace, given: list[str], own: list[str]) -> str:
    """The whole markdown page."""
    when = datetime.datetime.now(datetime.timezone.utc)  # noqa: UP017 - the other interpreter may be older
    page = [
        "# Linear rankers: xmcdist and libpecos",
        "",
        f"{when:%Y-%m-%d}; {hardware()}; {args.threads} threads; {versions(args.pecos)}.",
        "",
        f"    {shlex.join(['python', *sys.argv])}",
        "",
        f"TF-IDF (sublinear, min_df 2, at most 200,000 words); nr_splits {SPLITS}, max_leaf_size {LEAF}, "
        f"Cp = Cn = 1, threshold {THRESHOLD}, beam {BEAM}, top {TOPK}.  Times are medians, "
        "memory the largest peak.  Equal scores rank by label id in both.",
        "",
        f"## Both on libpecos's tree of seed 0 ({args.repeat} runs each, in turn)",
        "",
        "| data | negatives | program | P@1 | P@3 | P@5 | train s | train CPU s | predict s | train MB | predict MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *given,
        "",
    ]
    if own:
        page += [
            f"## Everyone's own trees, tfn ({args.seeds} seeds each, in turn; mean ± standard deviation)",
            "",
            "| data | program | P@1 | P@3 | P@5 | tree s | train s | train CPU s | predict s | train MB | predict MB |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *own,
            "",
        ]
    return "\n".join(page)


def main() -> None:
    """Parse the command line and run everything."""
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        worker(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--pecos", required=True, help="Python with libpecos")
    parser.add_argument("--repeat", type=int, default=5, help="runs of comparison (i)")
    parser.add_argument("--schemes", nargs="+", default=["tfn", "tfn+man"], help="negatives of comparison (i)")
    parser.add_argument("--seeds", type=int, default=4, help="trees of comparison (ii); 0 leaves it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="markdown file; default: printed only")
    args = parser.parse_args()
    given: list[str] = []
    own: list[str] = []
    for source in args.data:
        with tempfile.TemporaryDirectory() as folder:
            prepare(source, Path(folder))
            bench = Bench(Path(folder), args.pecos, args.threads)
            for scheme in args.schemes:
                found = given_lines(source.name, scheme, bench.imported_tree(args.repeat, scheme))
                print(*found, sep="\n", flush=True)
                given += found
            if args.seeds:
                for peer, rows in bench.own_trees(args.seeds).items():
                    own.append(own_line(source.name, peer, rows))
                    print(own[-1], flush=True)
    page = report(args, given, own)
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
