"""``xmcdist plan`` against the resident peaks of real runs, rank by rank.

    python benchmarks/plan_memory.py --linear FOLDER --out benchmarks/plan_memory.md

FOLDER is a second data set for the linear path, beside the shipped one.  The encoder runs take
the first documents of the shipped data and a few steps a level: peaks are reached in the first.
Run one at a time; other work on the machine changes times, not peaks.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import scipy.sparse as sp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHIPPED = ROOT / "data" / "debian-packages"
FEW = [
    "encoder.max_length=64",
    "matcher.steps=[3]",
    "matcher.max_clusters=64",
    "tree.max_leaf_size=16",
    "checkpoint.every_steps=2",
    "evaluation.linear_baseline=false",
    "tracker.log_every=1",
]
BAR = 0.15


def cut(folder: Path, documents: int) -> Path:
    """The first documents of the shipped data, as a text folder."""
    folder.mkdir()
    for split, count in (("trn", documents), ("tst", documents // 6)):
        with gzip.open(SHIPPED / f"X.{split}.txt.gz", "rt", encoding="utf-8") as f:
            lines = [next(f) for _ in range(count)]
        (folder / f"X.{split}.txt").write_text("".join(lines), encoding="utf-8")
        sp.save_npz(folder / f"Y.{split}.npz", sp.csr_matrix(sp.load_npz(SHIPPED / f"Y.{split}.npz"))[:count])
    shutil.copy(SHIPPED / "output-items.txt.gz", folder)
    return folder


def random_bert(folder: Path) -> Path:
    """A BERT of 4 layers, 512 wide, with MiniLM's tokenizer and random weights."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    from xmcdist.config.schema import EncoderConfig
    from xmcdist.encoders.source import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(EncoderConfig(preset="minilm")))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=2048,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def planned(overrides: list[str], ranks: int) -> float:
    """Predicted peak of a rank, MiB."""
    command = [sys.executable, "-m", "xmcdist", "plan", "--json", "gpu=cpu", f"gpus={ranks}", *overrides]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout)["peak_host_bytes"]) / 2**20


def measured(overrides: list[str], ranks: int, run_dir: Path) -> list[float]:
    """Largest resident memory of every rank of a real run, MiB."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    start = [sys.executable, "-m", "xmcdist"]
    if ranks > 1:
        env["ACCELERATE_USE_CPU"] = "true"
        start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        start += ["--num_processes", str(ranks), "--mixed_precision", "no", "--dynamo_backend", "no"]
        start += ["--main_process_port", str(free_port()), "-m", "xmcdist"]
    log = run_dir.with_suffix(".log")
    with open(log, "wb") as out:
        done = subprocess.run(
            [*start, "train", f"run_dir={run_dir}", *overrides], cwd=ROOT, env=env, stdout=out, stderr=out
        )
    results = run_dir / "results.json"
    if not results.exists():
        raise SystemExit(f"the run ended with {done.returncode}:\n{log.read_text()[-3000:]}")
    return [float(x) for x in json.loads(results.read_text())["peak_memory_mb_per_rank"]]


def main() -> None:
    """Run every configuration and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--linear", type=Path, required=True, help="a second data set for the linear path")
    parser.add_argument("--documents", type=int, default=600, help="of the encoder runs")
    parser.add_argument("--only", help="only configurations whose name has this in it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="xmcdist-plan-memory-"))
    small, bert = cut(work / "small", args.documents), random_bert(work / "bert")
    few = [f"dataset.path={small}", *FEW]
    other = ["encoder=hf", f"encoder.name={bert}", "encoder.pooling=mean"]
    second = [f"dataset.path={args.linear}", "encoder=none"]
    runs = [
        ("linear, debian-packages", 1, ["encoder=none"]),
        (f"linear, {args.linear.name}", 1, second),
        (f"linear, {args.linear.name}", 4, second),
        ("MiniLM", 1, [*few, "encoder=minilm"]),
        ("MiniLM, ddp", 4, [*few, "encoder=minilm"]),
        ("MiniLM, zero1", 4, [*few, "encoder=minilm", "engine=zero1", "engine.global_batch=32"]),
        ("MiniLM, zero3", 4, [*few, "encoder=minilm", "engine=zero3", "engine.global_batch=32"]),
        ("BERT 4 x 512", 1, [*few, *other]),
        ("BERT 4 x 512, zero3", 4, [*few, *other, "engine=zero3", "engine.global_batch=32"]),
    ]
    rows, worst = [], 0.0
    for i, (name, ranks, overrides) in enumerate(runs):
        if args.only and args.only not in name:
            continue
        told = planned(overrides, ranks)
        for rank, peak in enumerate(measured(overrides, ranks, work / f"run-{i}")):
            worst = max(worst, abs(told / peak - 1))
            rows.append(f"| {name} | {ranks} | {rank} | {told:.0f} | {peak:.0f} | {told / peak:.2f} |")
            print(rows[-1], flush=True)
        shutil.rmtree(work / f"run-{i}", ignore_errors=True)
        if args.out:
            args.out.write_text(page(rows, worst, args), encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)


def page(rows: list[str], worst: float, args: argparse.Namespace) -> str:
    """The markdown page so far."""
    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    command = f"python benchmarks/plan_memory.py --linear {args.linear.name} --documents {args.documents}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    verdict = f"within {100 * BAR:.0f} %" if worst <= BAR else f"missed: the bar is {100 * BAR:.0f} %"
    return f"""# Planned and measured memory

{time.strftime("%Y-%m-%d")}; {os.cpu_count()} cores, {platform.machine()}, {platform.system()};
{versions}; xmcdist {commit.stdout.strip() or "?"}.

    {command} --out benchmarks/plan_memory.md

Planned: `peak_host_bytes` of `xmcdist plan --json gpu=cpu gpus=RANKS` with the same settings.  Measured: the largest
resident memory of each rank over the whole run, `peak_memory_mb_per_rank` of results.json (`ru_maxrss`: anonymous
memory and all pages of mapped files that were touched, libraries and data alike).  Encoder runs: the first
{args.documents} documents, {shlex.join(FEW)}, batch 32.

| configuration | ranks | rank | planned MiB | measured MiB | planned / measured |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Largest deviation {100 * worst:.1f} %: {verdict}.
"""


if __name__ == "__main__":
    main()
