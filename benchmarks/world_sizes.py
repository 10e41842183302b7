"""The whole run on 1 and on 4 processes: the same measures, and how evenly the rankers' work is spread.

    python benchmarks/world_sizes.py DATA [--out FILE.md] [--work DIR]

DATA is a text folder (X.*.txt, Y.*.npz).  Runs are started as users start them, over gloo on this
machine's cores; dropout is off and arithmetic fp32, so that only the order of sums differs.
With --work, run folders are kept there, and a second call goes on with them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORLDS = (1, 4)
KEYS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@5", "R@10")
SETTINGS = [
    "encoder=minilm",
    "encoder.max_length=16",
    "encoder.dropout=0.0",
    "matcher.max_clusters=256",
    "matcher.steps=[150]",
    "matcher.beam=20",
    "optimizer.lr=2.0e-4",
    "optimizer.head_lr=1.0e-3",
    "engine.precision=fp32",
    "engine.global_batch=32",
    "evaluation.linear_baseline=true",
]


def run(world: int, data: Path, folder: Path) -> dict[str, Any]:
    """One training run to its end."""
    cores = len(os.sched_getaffinity(0))
    env = dict(os.environ) | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"OMP_NUM_THREADS": str(max(1, cores // world)), "NUMBA_NUM_THREADS": str(max(1, cores // world))}
    command = [sys.executable]
    if world > 1:
        env["ACCELERATE_USE_CPU"] = "true"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes"]
        command += [str(world), "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    command += ["-m", "xmcdist", "train", f"dataset.path={data}", f"run_dir={folder}", *SETTINGS]
    subprocess.run(command, env=env, cwd=ROOT, check=True)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    solved = sorted((folder / "stages").glob("*/balance.json"))
    results["balance"] = {p.parent.name: json.loads(p.read_text())["cpu_seconds"] for p in solved}
    return results


def report(data: Path, results: dict[int, dict[str, Any]]) -> str:
    """The tables."""
    import torch

    lines = [
        "# One process and four",
        "",
        f"{date.today()}; {os.cpu_count()} cores, {platform.machine()}; torch {torch.__version__}.",
        "",
        f"    python benchmarks/world_sizes.py {data.name}",
        "",
        "Settings: " + " ".join(SETTINGS),
        "",
    ]
    for part, title in (("metrics", "Full path"), ("baseline", "TF-IDF rankers alone")):
        lines += [f"## {title}", "", "| processes | " + " | ".join(KEYS) + " |", "|" + "---|" * (len(KEYS) + 1)]
        for world, r in results.items():
            lines.append(f"| {world} | " + " | ".join(f"{r[part][k]:.2f}" for k in KEYS) + " |")
        first, last = results[WORLDS[0]][part], results[WORLDS[-1]][part]
        worst = max(first, key=lambda k: abs(first[k] - last[k]))
        lines += [
            "",
            f"Largest difference of all {len(first)} measures: {abs(first[worst] - last[worst]):.3f} ({worst}).",
            "",
        ]
    lines += [
        "## Rankers' work over four ranks",
        "",
        "| stage | CPU seconds of each rank | max / mean |",
        "|---|---|---|",
    ]
    totals = [0.0] * WORLDS[-1]
    for stage, seconds in results[WORLDS[-1]]["balance"].items():
        totals = [a + b for a, b in zip(totals, seconds, strict=True)]
        lines.append(_balance(stage, seconds))
    lines.append(_balance("all", totals))
    lines += [
        "",
        "## Seconds",
        "",
        "| stage | " + " | ".join(f"{w} processes" for w in results) + " |",
        "|---|---|---|",
    ]
    for stage in results[WORLDS[0]]["seconds"]:
        lines.append(f"| {stage} | " + " | ".join(f"{r['seconds'].get(stage, 0):.1f}" for r in results.values()) + " |")
    lines += [
        "",
        "Peak memory a process, MB: "
        + "; ".join(f"{w}: " + ", ".join(f"{m:,.0f}" for m in r["peak_memory_mb_per_rank"]) for w, r in results.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _balance(name: str, seconds: list[float]) -> str:
    mean = sum(seconds) / len(seconds)
    return f"| {name} | {', '.join(f'{s:.2f}' for s in seconds)} | {max(seconds) / max(mean, 1e-9):.2f} |"


def main() -> None:
    """Run, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        text = report(args.data, {w: run(w, args.data.resolve(), work / str(w)) for w in WORLDS})
    if args.out:
        args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
