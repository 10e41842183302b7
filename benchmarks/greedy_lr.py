"""The full path under GreedyLR and other schedules, over seeds.

    python benchmarks/greedy_lr.py DATA --work DIR [--seeds 5] [--out FILE.md] [SETTING ...]

DATA is a text folder (X.*.txt, Y.*.npz).  Each schedule and seed is a run of its own below DIR; the prepared
data are shared.  A run that has finished is not repeated, one that was interrupted goes on.  Further
SETTINGs hold for all runs, such as optimizer.lr=1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEYS = ("P@1", "P@3", "P@5", "R@10")
SCHEDULES = ("greedy", "greedy_paper", "linear", "cosine", "constant")
SETTINGS = [
    "encoder=minilm",
    "encoder.max_length=32",
    "tree.nr_splits=16",
    "tree.max_leaf_size=16",
    "matcher.steps=[300]",
    "engine.global_batch=32",
    "engine.micro_batch=32",
    "optimizer.lr=1e-4",
    "evaluation.linear_baseline=false",
]


def run(data: Path, work: Path, schedule: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """Results of one run, trained if they are not there; and the encoder's rate at the last step of each level."""
    folder = work / f"{schedule}-{seed}"
    wanted = [*SETTINGS, *settings]
    mark = folder / "settings.json"
    if mark.exists() and json.loads(mark.read_text()) != wanted:
        sys.exit(f"{folder} was run with other settings: {mark.read_text()}. Use another --work")
    if not (folder / "results.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(wanted))
        env = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        own = [f"dataset.path={data}", f"dataset.prepared={work / 'data'}", f"run_dir={folder}"]
        own += [f"schedule={schedule}", f"seed={seed}"]
        subprocess.run([sys.executable, "-m", "xmcdist", "train", *own, *wanted], env=env, cwd=ROOT, check=True)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return results | {"last_rates": [row["lr"] for row in rows if "lr" in row and row["step"] == row["total"]]}


def report(data: Path, args: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    """The tables, of the seeds that are there."""
    import torch

    more = " ".join(args.settings)
    lines = [
        f"# GreedyLR beside other schedules on {data.name}",
        "",
        f"{date.today()}; {len(os.sched_getaffinity(0))} cores, {platform.machine()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}.",
        "",
        f"    python benchmarks/greedy_lr.py {data.name} --work DIR --seeds {args.seeds} {more}".rstrip(),
        "",
        "Settings: " + " ".join([*SETTINGS, *args.settings]),
        "",
        "In percent, mean over seeds ± standard deviation. Rate: the encoder's at the last step of each level, mean.",
        "",
        "| schedule | seeds | " + " | ".join(KEYS) + " | rate at the end of levels |",
        "|" + "---|" * (len(KEYS) + 3),
    ]
    for schedule, runs in found.items():
        cells = []
        for key in KEYS:
            values = [r["metrics"][key] for r in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        rates = ", ".join(
            f"{statistics.mean(level):.1e}" for level in zip(*(r["last_rates"] for r in runs), strict=True)
        )
        lines.append(f"| {schedule} | {len(runs)} | " + " | ".join(cells) + f" | {rates} |")
    lines += ["", "Each seed, P@1:", "", "| schedule | " + " | ".join(f"{i}" for i in range(args.seeds)) + " |"]
    lines.append("|" + "---|" * (args.seeds + 1))
    for schedule, runs in found.items():
        lines.append(f"| {schedule} | " + " | ".join(f"{r['metrics']['P@1']:.2f}" for r in runs) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where runs are and stay")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--schedules", default=",".join(SCHEDULES), help="choices of schedule=, parted by commas")
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="of xmcdist train, for all runs")
    args = parser.parse_intermixed_args()
    data, work = args.data.resolve(), args.work.resolve()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.schedules.split(",")}
    for seed in range(args.seeds):  # all schedules of a seed, so that what is there early compares
        for schedule in found:
            found[schedule].append(run(data, work, schedule, seed, args.settings))
            values = {key: round(found[schedule][-1]["metrics"][key], 2) for key in KEYS}
            print(f"{schedule}, seed {seed}: {values}", flush=True)
    text = report(data, args, found)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
