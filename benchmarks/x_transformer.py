"""X-Transformer's three indexes with one encoder, and their ensemble, beside linear rankers; with negative controls.

    python benchmarks/x_transformer.py DATA... [--out FILE.md] [--work DIR] [--seeds 1] [SETTINGS]

A DATA is a text folder (X.*.txt, Y.*.npz, output-items.txt).  `experiment=x_transformer_small` trains MiniLM
on flat trees of the labels: by TF-IDF of their documents (pifa), by their own texts (text), and by both
(both).  Two controls: the text index with the labels' texts dealt out at random, and a tree whose labels
are dealt out at random to clusters of the same sizes.  SETTINGS are added to all runs with an encoder.
With --work, run folders are kept there, and a second call goes on with them.
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
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
KEYS = ("P@1", "P@3", "P@5", "R@10")
MEMBERS = ("pifa", "text", "both")
METHODS = ("average", "rank", "sigmoid", "softmax", "round_robin")


def train(folder: Path, *words: str) -> dict[str, Any]:
    """One run to its end, started as a person does; its results, or those of an earlier call."""
    if not (folder / "results.json").is_file():
        env = dict(os.environ) | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "xmcdist", "train", f"run_dir={folder}", *words]
        subprocess.run(command, env=env, cwd=ROOT, check=True)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def shuffled_texts(data: Path, folder: Path, seed: int) -> Path:
    """The same data set with the labels' texts dealt out at random."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in data.iterdir():
        if path.is_file() and path.name != "output-items.txt":
            shutil.copy2(path, folder / path.name)
    lines = (data / "output-items.txt").read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(seed).permutation(len(lines))
    (folder / "output-items.txt").write_text("".join(lines[i] + "\n" for i in order), encoding="utf-8")
    return folder


def shuffled_tree(run: Path, folder: Path, seed: int) -> Path:
    """The tree of a run with its labels dealt out at random to the leaves."""
    from xmcdist.trees.label_tree import LabelTree

    tree = LabelTree.load(run / "stages" / "tree" / "tree")
    order = np.random.default_rng(seed).permutation(tree.num_labels)
    LabelTree(tree.child_ptr, order[tree.labels], tree.num_labels).save(folder)
    return folder


def measure(data: Path, work: Path, seed: int, settings: list[str]) -> dict[str, dict[str, Any]]:
    """Rows of one data set and seed: measures and seconds by name."""
    here, at = work / data.name / str(seed), [f"dataset.path={data}", f"seed={seed}"]
    rows: dict[str, dict[str, Any]] = {}
    linear = train(here / "linear", *at, "encoder=none")
    rows["linear"] = {**linear["metrics"], "seconds": sum(linear["seconds"].values())}
    small = ["experiment=x_transformer_small", *at, *settings]
    whole = train(here / "ensemble", *small)
    for name in MEMBERS:
        told = whole["members"][name]
        rows[name] = {**told["metrics"], "seconds": told["seconds"]}
    for method in METHODS:
        if method == whole["ensemble"]:
            found = whole["metrics"]
        else:
            (here / "ensemble" / "results.json").rename(here / "kept.json")
            found = train(here / "ensemble", *small, f"ensemble={method}")["metrics"]
            (here / "kept.json").replace(here / "ensemble" / "results.json")
        rows[f"ensemble, {method}"] = {**found, "seconds": sum(rows[name]["seconds"] for name in MEMBERS)}
    controls = {
        "text, texts shuffled": (
            [f"dataset.path={shuffled_texts(data, here / 'shuffled-texts', seed)}", "tree.label_embedding=text"]
        ),
        "pifa, tree shuffled": [
            f"tree.path={shuffled_tree(here / 'ensemble' / 'members' / 'pifa', here / 'shuffled-tree', seed)}"
        ],
    }
    for name, changed in controls.items():
        words = [word for word in small if word.split("=")[0] not in {c.split("=")[0] for c in changed}]
        told = train(
            here / name.replace(", ", "-").replace(" ", "-"), *words, *changed, *(f"~members.{m}" for m in MEMBERS)
        )
        rows[name] = {**told["metrics"], "seconds": sum(told["seconds"].values())}
    return rows


def report(found: dict[str, list[dict[str, dict[str, Any]]]], command: str) -> str:
    """The page: a table a data set, means over seeds."""
    import torch
    import transformers

    lines = [
        "# X-Transformer's three indexes and their ensemble",
        "",
        f"{date.today()}; {processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        f"    {command}",
        "",
        "Seconds are those of a run's stages; of an ensemble, of all its members, which share what they can.",
        "`shuffled` are negative controls: what the index is made of tells nothing there.",
    ]
    for data, seeds in found.items():
        lines += ["", f"## {data}" + (f", mean of {len(seeds)} seeds" if len(seeds) > 1 else ""), ""]
        lines += ["| | " + " | ".join(KEYS) + " | s |", "|" + "---|" * (len(KEYS) + 2)]
        for name in seeds[0]:
            means = {key: float(np.mean([rows[name][key] for rows in seeds])) for key in (*KEYS, "seconds")}
            lines.append(
                f"| {name} | " + " | ".join(f"{means[key]:.2f}" for key in KEYS) + f" | {means['seconds']:.0f} |"
            )
        if len(seeds) > 1:
            spread = max(float(np.std([rows[name]["P@1"] for rows in seeds])) for name in seeds[0])
            lines += ["", f"Largest standard deviation of P@1 over seeds: {spread:.2f}."]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Name of the CPU."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in told if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def main() -> None:
    """Train all, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="DATA or SETTING")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    settings = [word for word in args.words if "=" in word]
    folders = [Path(word).resolve() for word in args.words if "=" not in word]
    shown = [path.name for path in folders] + settings + ([f"--seeds {args.seeds}"] if args.seeds > 1 else [])
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve()
        found = {f.name: [measure(f, work, seed, settings) for seed in range(args.seeds)] for f in folders}
    text = report(
        found, "python benchmarks/x_transformer.py " + " ".join(shlex.quote(w) if "=" in w else w for w in shown)
    )
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
