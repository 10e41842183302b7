"""Memory, traffic and time of a training step when the label rows are shared out, and when they are not.

    python benchmarks/label_parallel.py memory    # peak memory a rank: 1, 2 and 4 ranks, 1,000,000 x 384 with Adam
    python benchmarks/label_parallel.py traffic   # bytes a step: 10k, 100k and 1M labels, beside data-parallel rows
    python benchmarks/label_parallel.py hosts     # time a step: two hosts with 1 Gbit/s between them (root, iproute2)

Every measurement is a job of its own over gloo with MiniLM as the encoder, started as a user starts
one: ``accelerate launch`` (``hosts``: one launcher in each of two network namespaces).  ``sharded`` is
xmcdist's own training loop; ``naive`` is what a data-parallel framework does without being told
otherwise: all rows on every rank, under torch's DistributedDataParallel, gradients and all.
The two see the same documents, candidates, loss and optimizer, and their first losses must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from label_parallel_rank import DIM, encoder_numbers

ROOT = Path(__file__).parents[1]
RANK = Path(__file__).with_name("label_parallel_rank.py")


def job(kind: str, labels: int, ranks: int, steps: int, hosts: bool = False) -> list[dict[str, Any]]:
    """Run one job to its end; what every rank wrote, in rank order."""
    with tempfile.TemporaryDirectory() as out:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = dict(os.environ) | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        env |= {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        commands = []
        for host in range(2 if hosts else 1):
            c = [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
            ]
            c += ["--num_processes", str(ranks), "--main_process_port", str(port)]
            c += ["--multi_gpu"] if ranks > 1 else []
            interface = "lo"
            if hosts:
                c += ["--num_machines", "2", "--machine_rank", str(host), "--main_process_ip", "10.77.0.1"]
                c = ["ip", "netns", "exec", f"xmcdist{host}", *c]
                interface = f"xmcdist{host}"
            else:
                c += ["--num_machines", "1"]
            c += [str(RANK), f"--kind={kind}", f"--labels={labels}", f"--steps={steps}"]
            commands.append(([*c, f"--out={out}", f"--interface={interface}"], interface))
        running = [
            subprocess.Popen(
                c, env=env | {"GLOO_SOCKET_IFNAME": interface}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for c, interface in commands
        ]
        for process in running:
            _, errors = process.communicate(timeout=1800)
            if process.returncode:
                raise SystemExit(f"{kind}, {labels} labels, {ranks} ranks:\n{errors.decode()[-3000:]}")
        return [json.loads((Path(out) / f"{r}.json").read_text()) for r in range(ranks)]


def memory() -> str:
    """Peak memory of a rank, less what the same job needs with a head of 1000 rows."""
    table = [
        "| ranks | rows a rank | peak of a rank, MB | without the head, MB | head, MB | MB x ranks |",
        "|" + "---|" * 6,
    ]
    for ranks in (1, 2, 4):
        base = max(r["peak_mb"] for r in job("sharded", 1000, ranks, 4))
        peak = max(r["peak_mb"] for r in job("sharded", 1_000_000, ranks, 4))
        head = peak - base
        table.append(
            f"| {ranks} | {1_000_000 // ranks:,} | {peak:,.0f} | {base:,.0f} | {head:,.0f} | {head * ranks:,.0f} |"
        )
    exact = 1_000_000 * (DIM + 1) * 4 * 4 / 2**20
    table.append("")
    table.append(f"Weights, gradient and Adam's two moments of 1,000,000 rows are {exact:,.0f} MB in fp32.")
    return "\n".join(table)


def traffic() -> str:
    """Bytes that a rank sends in a step, counted by the collectives; the encoder's gradients apart."""
    ranks, rows = 2, []
    encoder = 2 * 4 * encoder_numbers() * (ranks - 1) // ranks
    for labels in (10_000, 100_000, 1_000_000):
        ours = job("sharded", labels, ranks, 6)
        # The first step's are the same as every other's: take the median of those after it.
        sent = statistics.median(s["bytes"] for s in ours[0]["steps"][1:])
        by = {k: v for k, v in ours[0]["steps"][-1]["by"].items() if v}
        naive = 2 * 4 * labels * (DIM + 1) * (ranks - 1) // ranks
        rows.append((labels, sent, naive, by))
    table = ["| labels | sharded head, bytes | data-parallel head, bytes | ratio |", "|" + "---|" * 4]
    table += [f"| {n:,} | {ours:,.0f} | {naive:,.0f} | {naive / ours:,.0f} |" for n, ours, naive, _ in rows]
    table += ["", f"The encoder's gradients, {encoder:,} bytes a step either way, come on top."]
    table += [f"Of a step at {rows[-1][0]:,} labels: " + ", ".join(f"{k} {v:,}" for k, v in rows[-1][3].items()) + "."]
    return "\n".join(table)


def hosts() -> str:
    """Time and bytes of a step over a wire of 1 Gbit/s, sharded and naive by turns."""
    _make_hosts()
    table = ["| labels | kind | median s a step | MB a step on the wire | first loss |", "|" + "---|" * 5]
    try:
        for labels, repeats, steps in ((10_000, 3, 8), (100_000, 3, 6), (1_000_000, 1, 4)):
            seen: dict[str, list[tuple[float, float, float]]] = {"sharded": [], "naive": []}
            for _ in range(repeats):
                for kind, results in seen.items():
                    told = job(kind, labels, 2, steps, hosts=True)
                    seconds = statistics.median(s["seconds"] for s in told[0]["steps"][1:])
                    results.append((seconds, told[0]["interface_mb"] / steps, told[0]["first_loss"]))
            losses = [r[2] for results in seen.values() for r in results]
            if max(losses) - min(losses) > 1e-4 * max(losses):
                raise SystemExit(f"sharded and naive do not train the same: first losses {losses}")
            for kind, results in seen.items():
                s, mb, loss = (statistics.median(r[i] for r in results) for i in range(3))
                table.append(f"| {labels:,} | {kind} | {s:.2f} | {mb:,.1f} | {loss:.5f} |")
    finally:
        _remove_hosts()
    return "\n".join(table)


def _ip(*words: str, host: int | None = None) -> None:
    subprocess.run([*(("ip", "netns", "exec", f"xmcdist{host}") if host is not None else ()), *words], check=True)


def _make_hosts() -> None:
    """Two network namespaces, one cable."""
    _remove_hosts()
    for host in (0, 1):
        _ip("ip", "netns", "add", f"xmcdist{host}")
    _ip("ip", "link", "add", "xmcdist0", "type", "veth", "peer", "name", "xmcdist1")
    for host in (0, 1):
        name = f"xmcdist{host}"
        _ip("ip", "link", "set", name, "netns", name)
        _ip("ip", "addr", "add", f"10.77.0.{host + 1}/24", "dev", name, host=host)
        _ip("ip", "link", "set", name, "up", host=host)
        _ip("ip", "link", "set", "lo", "up", host=host)
        _ip(
            "tc",
            "qdisc",
            "add",
            "dev",
            name,
            "root",
            "tbf",
            "rate",
            "1gbit",
            "burst",
            "256k",
            "latency",
            "50ms",
            host=host,
        )


def _remove_hosts() -> None:
    for host in (0, 1):
        subprocess.run(["ip", "netns", "del", f"xmcdist{host}"], check=False, stderr=subprocess.DEVNULL)


def main() -> None:
    """Run one of the tables, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "traffic", "hosts"])
    args = parser.parse_args()
    import torch

    print(
        f"## {args.what}\n\n{date.today()}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}\n"
    )
    print({"memory": memory, "traffic": traffic, "hosts": hosts}[args.what]())


if __name__ == "__main__":
    main()
