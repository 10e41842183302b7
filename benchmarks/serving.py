"""`xmcdist serve` under 64 clients, beside one client and beside a loop in Python.

    python benchmarks/serving.py [--work FOLDER] [--seconds 8] [--clients 64] [--out benchmarks/serving.md]

Two models are trained once into the work folder and kept there: TF-IDF rankers on the shipped
Debian packages, and rankers on TF-IDF and MiniLM (six layers, 128 tokens) on a part of them.
The clients are a process of their own, written on asyncio's streams (no HTTP library): each
keeps one connection and asks one text after the other.  It shares the cores with the server.
Every answer is compared with what the model says of that text in a loop; a request without an
answer of status 200 counts as lost.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gzip
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "data" / "debian-packages"
TEXTS = 200  # that clients ask about, in turn
PART = 1000  # training documents of the model with an encoder
HEAD = ["what", "documents/s", "p50 ms", "p99 ms", "requests", "lost", "other answers", "PSS MB"]


def environment() -> dict[str, str]:
    """That of a user: as many threads as there are cores."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    return kept | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def texts() -> list[str]:
    """Test documents of the shipped data."""
    with gzip.open(SHIPPED / "X.tst.txt.gz", "rt", encoding="utf-8") as lines:
        return [line.rstrip("\n") for line, _ in zip(lines, range(TEXTS), strict=False)]


def part_of_shipped(folder: Path) -> Path:
    """The first documents of the shipped data, and the labels they have."""
    folder.mkdir(parents=True, exist_ok=True)
    Y = {split: sp.csr_matrix(sp.load_npz(SHIPPED / f"Y.{split}.npz")) for split in ("trn", "tst")}
    kept = np.flatnonzero(Y["trn"][:PART].getnnz(axis=0))
    for split, count in (("trn", PART), ("tst", 100)):
        with gzip.open(SHIPPED / f"X.{split}.txt.gz", "rt", encoding="utf-8") as lines:
            some = [line for line, _ in zip(lines, range(count), strict=False)]
        (folder / f"X.{split}.txt").write_text("".join(some), encoding="utf-8")
        sp.save_npz(folder / f"Y.{split}.npz", sp.csr_matrix(Y[split][:count][:, kept]))
    with gzip.open(SHIPPED / "output-items.txt.gz", "rt", encoding="utf-8") as lines:
        items = list(lines)
    (folder / "output-items.txt").write_text("".join(items[i] for i in kept), encoding="utf-8")
    return folder


def model(work: Path, name: str) -> Path:
    """A model folder, trained if it is not there yet."""
    run = work / name
    if not (run / "model" / "config.json").is_file():
        settings = [f"run_dir={run}", "evaluation.linear_baseline=false", "encoder=none"]
        if name == "full":
            data = part_of_shipped(work / "part")
            settings = [*settings[:2], f"dataset.path={data}", "dataset=custom", "encoder=minilm", "matcher.steps=[2]"]
            settings.append("matcher.max_clusters=16")  # one level: how well it ranks is not the question
        subprocess.run([sys.executable, "-m", "xmcdist", "train", *settings], cwd=ROOT, env=environment(), check=True)
    return run / "model"


def loop(folder: Path, seconds: float, answers: Path) -> None:
    """In this process: one text after the other, and what the answers are."""
    import xmcdist

    predictor, asked = xmcdist.load(str(folder)), texts()
    found = [[[a.label_id, a.score] for a in predictor.predict([text])[0]] for text in asked]
    answers.write_text(json.dumps(found))
    took, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        predictor.predict([asked[len(took) % TEXTS]])
        took.append(time.perf_counter() - began)
    pss = proportional([os.getpid()])
    print(json.dumps({"took": took, "seconds": sum(took), "lost": 0, "other": 0, "pss": pss}))


async def client(address: tuple[str, int], first: int, end: float, want: list[Any], out: dict[str, Any]) -> None:
    """One connection, a request after the other; opened anew when it breaks."""
    asked, number = texts(), first
    reader = writer = None
    while time.perf_counter() < end:
        place = number % TEXTS
        number += 1
        body = json.dumps({"texts": [asked[place]]}).encode()
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        began = time.perf_counter()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection(*address)
            writer.write(head.encode() + body)
            told = await reader.readuntil(b"\r\n\r\n")  # type: ignore[union-attr]
            length = int(re.search(rb"content-length: (\d+)", told.lower())[1])  # type: ignore[index]
            answer = await reader.readexactly(length)  # type: ignore[union-attr]
            if not told.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(told[:40])
        except (OSError, EOFError, asyncio.IncompleteReadError):
            out["lost"] += 1
            writer = None
            continue
        out["took"].append(time.perf_counter() - began)
        row = json.loads(answer)["predictions"][0]
        out["other"] += [[a["id"], a["score"]] for a in row] != want[place]
    if writer is not None:
        writer.close()


def clients(port: int, count: int, seconds: float, answers: Path) -> None:
    """In this process: ``count`` clients at once."""
    want = json.loads(answers.read_text())
    out: dict[str, Any] = {"took": [], "lost": 0, "other": 0}

    async def run() -> None:
        end = time.perf_counter() + seconds
        starts = range(0, count * 7, 7)
        await asyncio.gather(*(client(("127.0.0.1", port), start, end, want, out) for start in starts))

    began = time.perf_counter()
    asyncio.run(run())
    print(json.dumps({**out, "seconds": time.perf_counter() - began}))


def proportional(pids: list[int]) -> float:
    """Memory of some processes in MB, what they share counted once."""
    kb = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                kb += int(line.split()[1])
    return kb / 1024


def child(*args: Any) -> dict[str, Any]:
    """This script in a process of its own."""
    command = [sys.executable, __file__, *map(str, args)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def row(what: str, told: dict[str, Any]) -> list[str]:
    """One line of the table."""
    took = np.array(told["took"] or [np.nan]) * 1000
    print(f"{what}: {len(took)} requests", file=sys.stderr, flush=True)
    rate, pss = len(took) / told["seconds"], told.get("pss")
    p50, p99 = np.percentile(took, [50, 99])
    figures = [f"{rate:,.0f}", f"{p50:.2f}", f"{p99:.2f}", f"{len(took) + told['lost']:,}"]
    return [what, *figures, str(told["lost"]), str(told["other"]), "" if pss is None else f"{pss:.0f}"]


def served(folder: Path, name: str, args: argparse.Namespace, answers: Path, *settings: str) -> list[list[str]]:
    """One server, asked by one client and then by many."""
    command = [sys.executable, "-m", "xmcdist", "serve", f"model={folder}", "port=0", *settings]
    server = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert server.stdout is not None
        port = int(re.search(r":(\d+) ", server.stdout.readline())[1])  # type: ignore[index]
        workers = 2 if "workers=2" in settings else 1
        wait_for(port, workers)
        one = child("clients", port, 1, args.seconds / 2, answers)
        many = child("clients", port, args.clients, args.seconds, answers)
        pids = [server.pid] if workers == 1 else list(children(server.pid))
        rows = [
            row(f"{name}, 1 client", one),
            row(f"{name}, {args.clients} clients", {**many, "pss": proportional(pids)}),
        ]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    return rows


def children(pid: int) -> list[int]:
    """Worker processes of a server."""
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in told if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]


def wait_for(port: int, workers: int) -> None:
    """Until every worker has the model open."""
    from urllib.request import urlopen

    while f"xmcdist_workers_ready {workers}.0" not in urlopen(f"http://127.0.0.1:{port}/metrics").read().decode():
        time.sleep(0.2)


def hardware() -> str:
    """Processor, cores and memory."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.split(":", 1)[1].strip() for x in info if x.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def page(args: argparse.Namespace) -> str:
    """All figures as Markdown."""
    libraries = ("fastapi", "uvicorn", "numba", "torch")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    load = os.getloadavg()[0]
    out = [
        "# Serving",
        "",
        f"{datetime.date.today()}; {hardware()}; xmcdist {commit.stdout.strip()}, Python {platform.python_version()}, "
        f"{versions}; load before {load:.1f}.",
        "",
        f"    python benchmarks/serving.py {shlex.join(sys.argv[1:])}",
        "",
        f"One text a request, {args.seconds:g} s each, answers of 5 labels.",
        "The clients are one process that shares the cores.",
    ]
    for name, what in (("linear", "TF-IDF rankers, 4,764 labels"), ("full", "MiniLM and TF-IDF, 128 tokens")):
        folder, answers = model(args.work, name), args.work / f"{name}.json"
        rows = [row("a loop in Python", child("loop", folder, args.seconds / 2, answers))]
        rows += served(folder, "1 worker", args, answers)
        if name == "full":
            rows += served(folder, "1 worker, exact=false", args, answers, "exact=false")
        rows += served(folder, "2 workers", args, answers, "workers=2")
        out += ["", f"## {what}", "", f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
        out += [f"| {' | '.join(line)} |" for line in rows]
    return "\n".join(out) + "\n"


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    if sys.argv[1:2] == ["loop"]:
        loop(Path(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
        return
    if sys.argv[1:2] == ["clients"]:
        clients(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), Path(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "serving")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    told = page(args)
    print(told)
    if args.out:
        args.out.write_text(told, encoding="utf-8")


if __name__ == "__main__":
    main()
