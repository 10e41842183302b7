"""How long a person waits before anything happens: imports, help, and compiling kernels the first time.

    python benchmarks/startup.py [--repeat 5] [--out page.md]

Every figure is a process of its own.  Commands are timed from start to end (medians); of a first
use with an empty kernel cache (`NUMBA_CACHE_DIR`) and of the next start with what the first one
kept, the seconds that numba spent on compiling are counted, over several uses in a row that share
the cache, as a person would have them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "bare python": ["-c", "pass"],
    "import xmcdist": ["-c", "import xmcdist"],
    "--help": ["-m", "xmcdist", "--help"],
    "--version": ["-m", "xmcdist", "--version"],
    "a command that is none": ["-m", "xmcdist", "trian"],
    "train --help": ["-m", "xmcdist", "train", "--help"],
}
SMALL = ["tree.nr_splits=4", "tree.max_leaf_size=5", "ranker_tree.nr_splits=4", "ranker_tree.max_leaf_size=5"]
TINY = ["encoder=tiny", "matcher.steps=[4]", "engine.global_batch=12", "engine.micro_batch=4"]


def environment(cache: Path | None = None) -> dict[str, str]:
    """That of a user, with a kernel cache of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return env if cache is None else env | {"NUMBA_CACHE_DIR": str(cache)}


def seconds(args: list[str]) -> float:
    """Of a process from start to end."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *args], env=environment(), cwd=ROOT, capture_output=True)
    return time.perf_counter() - begun


def worker(answer: Path, command: list[str]) -> None:
    """Run a command of xmcdist in this process and note what numba compiled on the way."""
    from numba.core import event

    found = {"kernels": 0, "wall": 0.0, "cpu": 0.0}
    begun: list[tuple[float, float]] = []

    class Listener(event.Listener):
        def on_start(self, event: object) -> None:
            begun.append((time.perf_counter(), time.thread_time()))

        def on_end(self, event: object) -> None:
            wall, cpu = begun.pop()
            module = event.data["dispatcher"].py_func.__module__
            found["kernels"] += module.startswith("xmcdist")
            if not begun:
                found["wall"] += time.perf_counter() - wall
                found["cpu"] += time.thread_time() - cpu

    event.register("numba:compile", Listener())
    sys.argv = ["xmcdist", *command]
    try:
        runpy.run_module("xmcdist", run_name="__main__")
    finally:
        answer.write_text(json.dumps(found))


def write_data(folder: Path) -> None:
    """Texts whose words tell their labels."""
    import scipy.sparse as sp

    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("trn", 400), ("tst", 60)):
        Y = sp.csr_matrix(rng.random((count, 40)) < 0.06, dtype=np.float32)
        rows = [Y.indices[Y.indptr[i] : Y.indptr[i + 1]] for i in range(count)]
        texts = [" ".join([*(f"word{j}" for j in row), f"noise{rng.integers(50)}"]) for row in rows]
        (folder / f"X.{split}.txt").write_text("".join(text + "\n" for text in texts))
        sp.save_npz(folder / f"Y.{split}.npz", Y)
    (folder / "output-items.txt").write_text("".join(f"label {j}\n" for j in range(40)))


def uses(folder: Path) -> dict[str, list[str]]:
    """What people do first, small; later ones find the kernels of earlier ones."""
    data, lines = f"dataset.path={folder / 'data'}", folder / "data" / "X.tst.txt"
    out: dict[str, list[str]] = {}
    out["train, TF-IDF alone"] = ["train", data, f"run_dir={folder / 'linear'}", "encoder=none", *SMALL]
    out["predict"] = [
        "predict",
        f"model={folder / 'linear' / 'model'}",
        f"input={lines}",
        f"output={folder / 'p.jsonl'}",
    ]
    out["train with an encoder"] = ["train", data, f"run_dir={folder / 'both'}", *TINY, *SMALL]
    out["predict with it"] = [
        "predict",
        f"model={folder / 'both' / 'model'}",
        f"input={lines}",
        f"output={folder / 'q.jsonl'}",
    ]
    out["train, logistic loss"] = [
        "train",
        data,
        f"run_dir={folder / 'log'}",
        "encoder=none",
        "ranker=logistic",
        *SMALL,
    ]
    return out


def compiling(folder: Path) -> list[str]:
    """Rows of the table: seconds of compiling, the first time and the second."""
    write_data(folder / "data")
    cache, rows = folder / "cache", []
    total = {"kernels": 0.0, "wall": 0.0, "cpu": 0.0}
    again = dict(total)
    for name, command in uses(folder).items():
        found = []
        for attempt in ("first", "second"):
            more = [a.replace(f"{folder}/", f"{folder}/second-") if a.startswith("run_dir=") else a for a in command]
            answer = folder / "answer.json"
            args = [__file__, "--worker", str(answer), *(command if attempt == "first" else more)]
            done = subprocess.run(
                [sys.executable, *args], env=environment(cache), cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            found.append(json.loads(answer.read_text()))
        for key in total:
            total[key] += found[0][key]
            again[key] += found[1][key]
        rows.append(
            f"| {name} | {found[0]['kernels']} | {found[0]['wall']:.1f} | {found[0]['cpu']:.1f} | "
            f"{found[1]['kernels']} | {found[1]['wall']:.1f} |"
        )
        print(rows[-1], flush=True)
    rows.append(
        f"| all | {total['kernels']:.0f} | {total['wall']:.1f} | {total['cpu']:.1f} | "
        f"{again['kernels']:.0f} | {again['wall']:.1f} |"
    )
    return rows


def main() -> None:
    """Parse the command line and run everything."""
    if len(sys.argv) > 3 and sys.argv[1] == "--worker":
        worker(Path(sys.argv[2]), sys.argv[3:])
        return
    from linear_vs_pecos import hardware

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="markdown file; default: printed only")
    args = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.repeat):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    times = [f"| {name} | {np.median(found):.2f} |" for name, found in taken.items()]
    print("\n".join(times), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        compiled = compiling(Path(folder))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    page = "\n".join(
        [
            "# Start-up",
            "",
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {hardware()}; xmcdist {commit.strip()}, "
            f"Python {sys.version.split()[0]}.",
            "",
            f"    {shlex.join(['python', *sys.argv])}",
            "",
            f"## Until it is there (medians of {args.repeat}, a process each)",
            "",
            "| what | s |",
            "|---|---|",
            *times,
            "",
            "## Compiling kernels, with an empty cache and at the next start",
            "",
            "Each use finds what those above it have kept.",
            "",
            "| use | kernels | s | CPU s | kernels at the next start | s |",
            "|---|---|---|---|---|---|",
            *compiled,
            "",
        ]
    )
    print(page)
    if args.out:
        args.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
