"""Sections of Debian packages from node embeddings: GIANT beside TF-IDF and an encoder that knows no edge.

    apt-get -o Acquire::Languages=en update
    python benchmarks/giant.py [--lists /var/lib/apt/lists] [--seeds 3] [--out FILE.md] [--work DIR]

Nodes are the packages of Debian main, their texts the descriptions (not the names), edges Depends, Recommends and
Suggests, classes the archive sections.  Packages of one source are all trained on, all validated on or all tested.
Lists of another machine or release do as well: --lists is any folder with one Packages and one Translation-en list,
as https://deb.debian.org/debian/dists/ has them, named as apt names them.  Every training run is a process of its
own; with --work folders are kept there and a second call goes on with them.  --nodes N takes N packages that
are near each other, for a quick look.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "data"))
SETTINGS = [
    "encoder=minilm",
    "encoder.max_length=48",
    "encoder.dropout=0.0",
    "tree.nr_splits=32",
    "tree.max_leaf_size=100",
    "matcher.max_clusters=8192",
    "matcher.beam=20",
    "optimizer.lr=1.0e-4",
    "optimizer.head_lr=1.0e-3",
    "schedule.warmup=50",
    "engine.global_batch=64",
    "engine.precision=auto",
    "graph.holdout=0.05",
]
SVD_WIDTH, FEWEST = 384, 50  # as wide as MiniLM; packages that a section needs to be a class


def build(lists: Path, folder: Path, nodes: int | None) -> dict[str, Any]:
    """Write texts, edges, classes and split; returns counts."""
    from build_debian_packages import read_packages

    packages, snapshot = read_packages(lists)
    if nodes is not None:
        packages = _neighbourhood(packages, nodes)
    packages = sorted(packages, key=lambda p: p.name)
    number = {p.name: i for i, p in enumerate(packages)}
    edges = [(i, number[to]) for i, p in enumerate(packages) for to in sorted(p.related) if to in number]
    sections = [p.section.split("/")[-1] for p in packages]
    counts = {s: sections.count(s) for s in set(sections)}
    folder.mkdir(parents=True, exist_ok=True)
    texts = [re.sub(r"\s+", " ", f"{p.synopsis}. {p.body}").strip() for p in packages]
    (folder / "texts.txt").write_text("".join(t + "\n" for t in texts), encoding="utf-8")
    (folder / "names.txt").write_text("".join(p.name + "\n" for p in packages), encoding="utf-8")
    (folder / "classes.txt").write_text("".join((s if counts[s] >= FEWEST else "") + "\n" for s in sections))
    np.save(folder / "edges.npy", np.array(edges, np.int64).T)
    shares = np.array([_share(p.source) for p in packages])
    for part, low, high in (("train", 0.0, 0.6), ("valid", 0.6, 0.8), ("test", 0.8, 1.0)):
        (folder / f"{part}.txt").write_text(
            "".join(f"{i}\n" for i in np.flatnonzero((shares >= low) & (shares < high)).tolist())
        )
    kept = [s for s in sections if counts[s] >= FEWEST]
    return {
        "snapshot": snapshot,
        "packages": len(packages),
        "sources": len({p.source for p in packages}),
        "directed edges": len(edges),
        "classes": len(set(kept)),
        "packages with a class": len(kept),
        "share of the largest class": round(100 * max(kept.count(s) for s in set(kept)) / len(kept), 1),
        "different texts": len(set(texts)),
    }


def _neighbourhood(packages: list[Any], nodes: int) -> list[Any]:
    """Packages in order of a hash, each followed by those that it is related to, until there are enough."""
    named = {p.name: p for p in packages}
    taken: dict[str, Any] = {}
    for package in sorted(packages, key=lambda p: _share(p.name)):
        waiting = [package.name]
        while waiting and len(taken) < nodes:
            name = waiting.pop()
            if name in named and name not in taken:
                taken[name] = named[name]
                waiting += sorted(named[name].related, key=_share)
    return list(taken.values())


def _share(name: str) -> float:
    return int.from_bytes(hashlib.sha1(name.encode()).digest()[:6], "big") / 2.0**48


def giant(data: Path, run: Path, seed: int, rewired: bool, steps: str, settings: list[str]) -> dict[str, Any]:
    """Fine-tune and embed in a process of its own."""
    env = dict(os.environ) | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    words = [f"graph.text={data / 'texts.txt'}", f"graph.edges={data / 'edges.npy'}", f"run_dir={run}", f"seed={seed}"]
    words += [f"graph.rewired={str(rewired).lower()}", f"matcher.steps=[{steps}]", *SETTINGS, *settings]
    subprocess.run([sys.executable, "-m", "xmcdist", "giant", *words], env=env, cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def accuracy(data: Path, embeddings: Path, seed: int, out: Path, model: str = "mlp") -> float:
    """Test accuracy of one classifier on given vectors, percent."""
    from xmcdist.config.commands import GiantClassifyConfig
    from xmcdist.pipelines.node_classification import classify

    cfg = GiantClassifyConfig(embeddings=str(embeddings), classes=str(data / "classes.txt"), split=str(data))
    cfg.seeds, cfg.output, cfg.batch, cfg.lr, cfg.epochs, cfg.patience = [seed], str(out), 2048, 0.001, 100, 15
    cfg.model = model
    return float(classify(cfg)["accuracy"]["test"]["mean"])


def words_alone(data: Path, work: Path, seeds: int) -> dict[str, list[float]]:
    """TF-IDF: a linear SVM on all columns, the MLP on their SVD."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    texts = (data / "texts.txt").read_text(encoding="utf-8").split("\n")[:-1]
    classes = np.array((data / "classes.txt").read_text().split("\n")[:-1])
    X = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2), max_features=400_000).fit_transform(texts)
    parts = {p: np.loadtxt(data / f"{p}.txt", np.int64) for p in ("train", "valid", "test")}
    parts = {p: nodes[classes[nodes] != ""] for p, nodes in parts.items()}
    fits = {c: LinearSVC(C=c).fit(X[parts["train"]], classes[parts["train"]]) for c in (0.3, 1.0, 3.0)}
    best = max(fits.values(), key=lambda f: f.score(X[parts["valid"]], classes[parts["valid"]]))
    found: dict[str, list[float]] = {
        "TF-IDF, linear": [100 * float(best.score(X[parts["test"]], classes[parts["test"]]))],
        "TF-IDF, SVD, MLP": [],
    }
    for seed in range(seeds):
        E = TruncatedSVD(min(SVD_WIDTH, X.shape[1] - 1), random_state=seed).fit_transform(X)
        np.save(work / "svd.npy", E.astype(np.float32))
        found["TF-IDF, SVD, MLP"].append(accuracy(data, work / "svd.npy", seed, work / f"svd-{seed}.json"))
    return found


def plain_encoder(data: Path, path: Path) -> None:
    """MiniLM's vectors of all texts, as it came."""
    from xmcdist.config.compose import compose_run
    from xmcdist.encoders.embed import TextEmbedder
    from xmcdist.encoders.hf import load_encoder, load_tokenizer

    cfg = compose_run([s for s in SETTINGS if s.startswith("encoder")]).encoder
    texts = (data / "texts.txt").read_text(encoding="utf-8").split("\n")[:-1]
    embedder = TextEmbedder(load_encoder(cfg), load_tokenizer(cfg, iter(texts)))
    np.save(path, np.concatenate([embedder(texts[i : i + 4096]) for i in range(0, len(texts), 4096)]))


def report(counts: dict[str, Any], rows: dict[str, list[float]], neighbours: dict[str, Any], command: str) -> str:
    """The tables."""
    import torch
    import transformers

    lines = [
        "# Sections of Debian packages from node embeddings",
        "",
        f"{date.today()}; {os.cpu_count()} cores, {platform.machine()}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}.",
        "",
        f"    {command}",
        "",
        "Settings: " + " ".join(SETTINGS),
        "",
        "Graph: " + ", ".join(f"{k} {v}" for k, v in counts.items()) + ".",
        "",
        "Test accuracy of the archive section, percent; packages of a source lie in one part of the split.",
        "",
        "| vectors | mean | standard deviation | seeds |",
        "|---|---|---|---|",
    ]
    for name, values in ((name, values) for name, values in rows.items() if values):
        spread = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        lines.append(f"| {name} | {np.mean(values):.2f} | {spread} | {len(values)} |")
    lines += ["", "Edges kept from training, found by the matcher alone (percent):", ""]
    lines += ["| graph | of | P@1 | P@5 | R@10 |", "|---|---|---|---|---|"]
    for name, said in neighbours.items():
        m = said["metrics"]
        lines.append(f"| {name} | {said['of']} | {m['P@1']:.2f} | {m['P@5']:.2f} | {m['R@10']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=Path, default=Path("/var/lib/apt/lists"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--controls", type=int, default=1, help="seeds of the rewired graph")
    parser.add_argument("--steps", default="400,800", help="of each level")
    parser.add_argument("--nodes", type=int, help="packages taken; default: all")
    parser.add_argument("--build-only", action="store_true", help="write the graph and print its counts")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", help="further settings of giant, group.key=value")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="xmcdist-giant-"))
    work = work.absolute()
    data = work / "graph"
    counts = build(args.lists, data, args.nodes)
    print(json.dumps(counts, indent=1), flush=True)
    if args.build_only:
        return
    rows = words_alone(data, work, args.seeds)
    if not (work / "plain.npy").exists():
        plain_encoder(data, work / "plain.npy")
    rows["MiniLM as it came, MLP"] = [
        accuracy(data, work / "plain.npy", seed, work / f"plain-{seed}.json") for seed in range(args.seeds)
    ]
    neighbours = {}
    for name, rewired, seeds in (("GIANT, MLP", False, args.seeds), ("GIANT, rewired graph, MLP", True, args.controls)):
        rows[name] = []
        for seed in range(seeds):
            run = work / f"{'rewired' if rewired else 'giant'}-{seed}"
            found = giant(data, run, seed, rewired, args.steps, args.settings)
            neighbours[f"{'rewired' if rewired else 'true'}, seed {seed}"] = found["neighbours"]
            rows[name].append(accuracy(data, run / "embeddings", seed, work / f"{run.name}.json"))
            print(name, rows[name], flush=True)
    given = [f"--seeds {args.seeds}", f"--controls {args.controls}", f"--steps {args.steps}", *args.settings]
    given += [f"--nodes {args.nodes}"] if args.nodes is not None else []
    text = report(counts, rows, neighbours, " ".join(["python benchmarks/giant.py", *given]))
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
