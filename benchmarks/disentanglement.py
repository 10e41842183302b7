"""Label disentanglement: what 1, 2, 3 and 6 clusters a label are worth, and what they cost.

    python benchmarks/disentanglement.py DATA... [--path linear full] [--copies 1 2 3 6] [--seeds 1]
        [--unlimited] [--fine-tune] [--repeat 7] [--work DIR] [--out FILE.md] [SETTING...]

A DATA is a text folder (X.*.txt, Y.*.npz).  Every model is trained by `xmcdist train` as a process of its
own; those of one seed share what does not depend on the number of clusters.  A negative control has the
cluster of the tree and another at random.  Then all models of a data set are opened in one process, and
search in turn: all test documents at once, and one after the other.  Settings given last (overlap.rounds=2,
matcher.steps=[50], ..) are for all runs.  With --work, run folders are kept there, and a second call goes on
with them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import scipy.sparse as sp

from xmcdist.config.schema import EvaluationConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.inference.beam import beam_search
from xmcdist.parallel.launch import World
from xmcdist.pipelines.evaluation import label_frequency, measure
from xmcdist.rankers.model import LinearTree
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import open_csr
from xmcdist.trees.label_tree import LabelTree
from xmcdist.trees.overlap import assign

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("P@1", "P@3", "P@5", "R@10", "R@100", "PSP@1", "PSP@3", "PSP@5")
KS = [1, 3, 5, 10, 100]
PATHS = {
    "linear": ["encoder=none"],
    "full": [
        "encoder=minilm",
        "encoder.max_length=32",
        "matcher.steps=[300]",
        "matcher.max_clusters=4096",
        "evaluation.linear_baseline=false",
    ],
}
NOT_TRAINING = ("prepare", "features", "tokens", "export")
SINGLE = 200  # documents that are asked about one by one


@dataclass
class Trained:
    """One finished run."""

    name: str
    folder: Path
    model: LinearTree
    test: Features
    results: dict[str, Any]

    @classmethod
    def open(cls, name: str, folder: Path) -> Trained:
        """Its model and test features."""
        model, stages = LinearTree.load(folder / "model" / "rankers"), folder / "stages"
        sparse = open_csr(stages / "features" / "X.tst") if model.num_sparse else None
        dense = np.load(stages / "embed" / "E.tst.npy") if model.num_dense else None
        return cls(name, folder, model, Features(sparse, dense), json.loads((folder / "results.json").read_text()))

    @property
    def seconds(self) -> float:
        """Of all stages that make the model from features and tokens."""
        return sum(s for name, s in self.results["seconds"].items() if name not in NOT_TRAINING)

    @property
    def size(self) -> int:
        """Bytes of its rankers and tree."""
        return sum(p.stat().st_size for p in (self.folder / "model" / "rankers").rglob("*") if p.is_file())

    def search(self, start: int, stop: int, topk: int = 10) -> sp.csr_matrix:
        """The best labels of test documents."""
        return beam_search(
            self.model, self.test.rows(start, stop), beam=self.results["config"]["ranker"]["beam"], topk=topk
        )

    def metrics(self, merge: str) -> dict[str, float]:
        """Of the model with its copies merged so."""
        data, other = (
            PreparedDataset.open(self.folder / "prepared"),
            replace(self, model=replace(self.model, merge=merge)),
        )
        Y, about = data.Y("trn"), self.results["config"]["dataset"]
        constants = (about["propensity_a"], about["propensity_b"])
        return measure(
            lambda a, b: other.search(a, b, KS[-1]),
            data.Y("tst"),
            label_frequency(Y),
            Y.shape[0],
            EvaluationConfig(ks=KS),
            constants,
            World.single(),
        )


def train(data: Path, folder: Path, settings: list[str], base: Path | None) -> None:
    """One run, unless it is finished; with the stages of another run that are the same."""
    if (folder / "results.json").exists():
        return
    if base is not None and not folder.exists():
        leave = shutil.ignore_patterns("config.json", "results.json", "model", "metrics.jsonl", "export", "report.html")
        shutil.copytree(base, folder, ignore=leave, copy_function=os.link)
    words = ["-m", "xmcdist", "train", f"dataset.path={data}", f"run_dir={folder}", *settings]
    env = dict(os.environ) | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, *words], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr[-3000:]}")


def scatter(tree: LabelTree, copies: int, seed: int) -> LabelTree:
    """The tree with every label in its own cluster and in others at random."""
    rng, leaf = np.random.default_rng(seed), tree.slot_to_node(tree.depth - 1)
    own = np.empty(tree.num_labels, np.int64)
    own[tree.labels] = leaf
    others = np.argsort(rng.random((tree.num_labels, tree.level_size(tree.depth - 1))), axis=1)[:, : copies - 1]
    columns = np.concatenate([own, others.ravel()])
    rows = np.concatenate([np.arange(tree.num_labels), np.repeat(np.arange(tree.num_labels), copies - 1)])
    weight = np.concatenate([np.full(tree.num_labels, 2, np.int64), np.ones(others.size, np.int64)])
    shape = (tree.num_labels, tree.level_size(tree.depth - 1))
    return assign(tree, sp.csr_matrix((weight, (rows, columns)), shape=shape), copies).tree


def runs(data: Path, path: str, seed: int, work: Path, args: argparse.Namespace) -> list[Trained]:
    """All models of one seed, one cluster a label first."""
    common = [*PATHS[path], f"seed={seed}", f"evaluation.ks={KS}".replace(" ", ""), *args.setting]
    base = work / "1"
    train(data, base, common, None)
    names = {"1": base}
    for copies in [c for c in args.copies if c > 1]:
        names[str(copies)] = work / str(copies)
        train(data, names[str(copies)], [*common, "overlap=disentangled", f"overlap.copies={copies}"], base)
    if args.unlimited:
        names["2, no limit"] = work / "2-no-limit"
        train(data, work / "2-no-limit", [*common, "overlap=disentangled", "overlap.balance=null"], base)
    if args.fine_tune and path == "full":
        names["2, fine-tuned again"] = work / "2-fine-tuned"
        train(data, work / "2-fine-tuned", [*common, "overlap=disentangled", "overlap.fine_tune=true"], base)
    group, made = ("tree", "tree") if path == "linear" else ("ranker_tree", "ranker_tree")
    given = work / "random-tree"
    scatter(LabelTree.load(base / "stages" / made / "tree"), 2, seed).save(given)
    own = [s for s in common if not s.startswith("overlap.")]
    train(data, work / "2-random", [*own, f"{group}.path={given}"], base)
    names["2, at random"] = work / "2-random"
    return [Trained.open(name, folder) for name, folder in names.items()]


def in_turn(models: list[Trained], repeat: int, work: Callable[[Trained], object]) -> list[float]:
    """Median seconds of each model's work; they take turns, after one turn that does not count."""
    took: list[list[float]] = [[] for _ in models]
    for turn in range(repeat + 1):
        for mine, model in zip(took, models, strict=True):
            start = time.perf_counter()
            work(model)
            if turn:
                mine.append(time.perf_counter() - start)
    return [median(t) for t in took]


def one_by_one(model: Trained) -> None:
    """Documents as a server gets them."""
    for i in range(min(SINGLE, model.test.num_rows)):
        model.search(i, i + 1)


def table(seeds: list[list[Trained]], repeat: int) -> list[str]:
    """Rows of a data set and path; measures are means over seeds, times and sizes those of the first."""
    first = seeds[0]
    seconds = in_turn(first, repeat, lambda m: m.search(0, m.test.num_rows))
    single = [s / min(SINGLE, first[0].test.num_rows) for s in in_turn(first, repeat, one_by_one)]
    means = [replace(m, model=replace(m.model, merge="mean")) for m in first]
    merged = in_turn(means, repeat, lambda m: m.search(0, m.test.num_rows))
    head = [
        "clusters a label",
        "merge",
        *KEYS,
        "places",
        "training, s",
        "search, s",
        "of 1",
        "one document, ms",
        "of 1",
        "MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for i, model in enumerate(first):
        for merge in ("max", "mean") if not model.model.tree.is_partition else ("max",):
            found = [models[i].metrics(merge) for models in seeds]
            cells = [model.name, merge if not model.model.tree.is_partition else "", *(_spread(found, k) for k in KEYS)]
            took = seconds[i] if merge == "max" else merged[i]
            cells += [
                f"{model.model.tree.labels.size:,}",
                f"{model.seconds:.1f}",
                f"{took:.3f}",
                f"{took / seconds[0]:.2f}",
            ]
            alone = (f"{1000 * single[i]:.3f}", f"{single[i] / single[0]:.2f}") if merge == "max" else ("", "")
            cells += [*alone, f"{model.size / 1e6:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _spread(found: list[dict[str, float]], key: str) -> str:
    values = [f[key] for f in found]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def report(parts: list[tuple[str, list[str]]], args: argparse.Namespace) -> str:
    """The page."""
    import numba
    import scipy

    words = ["benchmarks/disentanglement.py", *(p.name for p in args.data), "--path", *args.path]
    words += ["--copies", *map(str, args.copies), "--seeds", str(args.seeds), "--repeat", str(args.repeat)]
    words += [f"--{name}" for name, asked in (("unlimited", args.unlimited), ("fine-tune", args.fine_tune)) if asked]
    lines = [
        "# Labels in several clusters",
        "",
        f"{date.today()}; {len(os.sched_getaffinity(0))} cores, {platform.machine()}; "
        f"Python {platform.python_version()}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}, numba {numba.__version__}.",
        "",
        f"    python {shlex.join([*words, *args.setting])}",
        "",
        "Measures in %, on the test documents"
        + (f", means of {args.seeds} seeds ± standard deviation" if args.seeds > 1 else "")
        + "; `mean` is the same model as the line above with copies merged so.  Training is all stages from the tree "
        "on, both trainings of the rankers included.  Search is the beam search alone, features given: median of "
        f"{args.repeat} searches, models in turn in one process.  Clusters are limited as by `overlap=disentangled`, "
        "but for `no limit`.  `at random`: every label in its own cluster and a random one.",
        "",
    ]
    for title, rows in parts:
        lines += [f"## {title}", "", *rows, ""]
    return "\n".join(lines)


def main() -> None:
    """Train what is not there, measure, print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--path", nargs="+", choices=sorted(PATHS), default=["linear"])
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2, 3, 6])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--fine-tune", action="store_true", help="full: also fine-tune again on the new tree")
    parser.add_argument("--unlimited", action="store_true", help="also 2 without a limit on clusters, which takes long")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    args, left = parser.parse_known_args()
    args.setting = [word for word in left if "=" in word] + [str(p) for p in args.data if "=" in str(p)]
    args.data = [p for p in args.data if "=" not in str(p)]
    unknown = [word for word in left if "=" not in word]
    if unknown or not args.data:
        parser.error(f"unknown: {' '.join(unknown)}" if unknown else "give a data folder")
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        for data in args.data:
            for path in args.path:
                folder = (args.work or Path(scratch)) / data.name / path
                seeds = [runs(data.resolve(), path, s, folder / f"seed-{s}", args) for s in range(args.seeds)]
                parts.append((f"{data.name}, {path}", table(seeds, args.repeat)))
                print("\n".join(parts[-1][1]), flush=True)
    text = report(parts, args)
    if args.out:
        args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
