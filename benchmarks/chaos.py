"""Kill training again and again, at random, in every stage; every run must end as if nothing had happened.

    python benchmarks/chaos.py [--kills 42] [--seed 0] [--launch fork|accelerate] [--work DIR] [--out page.md]

A toy data set, a tiny encoder, real processes (see `chaos_jobs`).  For each case the run
is first left alone, for its result and for how long each stage takes.  Then it is started in
a new folder; at a random moment of a stage that is drawn so that all stages have their turn,
either one random rank or everything gets SIGKILL; the same command is started again, and so on;
some kills later it is left to end.  Checked at the end of every run: measures equal the
undisturbed run's to 1e-6, no file of it is unfinished, put aside or locked, and the model folder
passes its checksums.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.chaos_jobs import Forked, Job, Launched, preload  # noqa: E402
from tests.helpers.toy import TINY_RUN, write_text_folder  # noqa: E402

ENCODER = [
    *TINY_RUN,
    "encoder.dropout=0.1",
    "matcher.steps=[12,30]",
    "checkpoint.every_steps=4",
    "negatives.scheme=tfn+man",
    "ranker.negatives=[tfn,man]",
]
LINEAR = ["encoder=none", "tree.nr_splits=4", "tree.max_leaf_size=5", "ranker.negatives=[tfn,man]", "engine.threads=1"]
TOLERANCE = 1e-6  # of measures in percent, as in tests/pipelines/test_kill.py
ENDS_WITHIN_S = 120  # a job of which one rank was killed


@dataclass
class Case:
    """One configuration, and what was seen of it."""

    name: str
    processes: int
    args: list[str]
    kills_a_run: int
    alone_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, undisturbed
    results: dict[str, Any] = field(default_factory=dict)
    deck: list[str] = field(default_factory=list)  # stages that have not had their turn
    kills: Counter[str] = field(default_factory=Counter)
    whole: int = 0  # kills of all processes, the others were of one rank
    starts: int = 0
    runs: int = 0
    went_on: int = 0  # starts that skipped a stage or went on inside one
    wall_s: float = 0.0
    faults: list[str] = field(default_factory=list)

    job: ClassVar[Callable[[int, list[str], Path], Job]] = Launched

    def metrics(self, run: Path) -> dict[str, float]:
        """Of a run that has ended."""
        said = json.loads((run / "results.json").read_text())
        return {f"{kind}.{k}": v for kind in ("metrics", "baseline") for k, v in said[kind].items()}


def main() -> None:
    """Run all cases and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=42)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launch", choices=("fork", "accelerate"), default="fork")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.launch == "fork":
        preload()
        Case.job = Forked
    work = asked.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    rng = random.Random(asked.seed)
    data = work / "data"
    if not data.exists():
        write_text_folder(data)
    cases = [
        Case("encoder, 2 processes", 2, ENCODER, 9),
        Case("encoder, 3 processes", 3, ENCODER, 9),
        Case("linear only, 2 processes", 2, LINEAR, 5),
    ]
    for i, case in enumerate(cases):
        _alone(case, work, data, i)
    done = 0
    while done < asked.kills:
        case = cases[min(range(len(cases)), key=lambda i: sum(cases[i].kills.values()) / cases[i].kills_a_run)]
        done += _disturbed(case, work, data, rng, min(case.kills_a_run, asked.kills - done))
        if asked.out is not None:
            asked.out.write_text(_page(cases, asked))
    print(_page(cases, asked))
    sys.stdout.flush()
    sys.exit(1 if any(case.faults for case in cases) else 0)


def _start(case: Case, run: Path, data: Path, log: Path) -> Job:
    case.starts += 1
    return Case.job(case.processes, ["train", f"dataset.path={data}", f"run_dir={run}", *case.args], log)


def _alone(case: Case, work: Path, data: Path, number: int) -> None:
    run, log = work / f"alone-{number}", work / f"alone-{number}.log"
    began = time.monotonic()
    code = _start(case, run, data, log).wait()
    case.starts = 0
    assert code == 0, log.read_text()[-3000:]
    case.alone_s = time.monotonic() - began
    seconds = json.loads((run / "results.json").read_text())["seconds"]
    order = sorted(seconds.keys() - {"prepare"}, key=lambda s: (run / "stages" / s / "stage.json").stat().st_mtime)
    case.seconds = {s: seconds[s] for s in ["prepare", *order]}
    case.results = case.metrics(run)
    _say(f"{case.name}: undisturbed in {case.alone_s:.0f} s, {len(case.seconds)} stages")


def _disturbed(case: Case, work: Path, data: Path, rng: random.Random, kills: int) -> int:
    """One run with some kills; returns how many there were."""
    case.runs += 1
    name = f"{case.name.replace(', ', '-').replace(' ', '-')}-{case.runs}"
    run, before = work / name, sum(case.kills.values())
    order = list(case.seconds)
    for number, target in enumerate(sorted(_deal(case, rng, kills), key=order.index)):
        if (run / "stages" / target).exists():  # the kill before came late
            case.deck.append(target)
            continue
        log = work / f"{name}-{number}.log"
        began = time.monotonic()
        job = _start(case, run, data, log)
        killed = _kill_in(case, job, run, target, rng)
        case.wall_s += time.monotonic() - began
        text = log.read_text(errors="replace")
        case.went_on += "skipped" in text or "going on" in text
        if not killed:
            if job.poll() != 0:
                case.faults.append(f"{name}: start {number} failed by itself: {text[-1500:]}")
            break
    log = work / f"{name}-last.log"
    began = time.monotonic()
    code = _start(case, run, data, log).wait()
    case.wall_s += time.monotonic() - began
    text = log.read_text(errors="replace")
    case.went_on += "skipped" in text or "going on" in text
    case.faults += [f"{name}: {fault}" for fault in _faults(case, run, code, text)]
    _say(f"{name}: {sum(case.kills.values()) - before} kills, {len(case.faults)} faults so far")
    return sum(case.kills.values()) - before


def _deal(case: Case, rng: random.Random, kills: int) -> list[str]:
    """Different stages to be killed in; every stage has its turn before one has its second."""
    dealt: list[str] = []
    while len(dealt) < min(kills, len(case.seconds)):
        fresh = [s for s in case.deck if s not in dealt]
        if not fresh:
            case.deck += rng.sample(list(case.seconds), len(case.seconds))
            continue
        case.deck.remove(fresh[0])
        dealt.append(fresh[0])
    return dealt


def _kill_in(case: Case, job: Job, run: Path, target: str, rng: random.Random) -> bool:
    """Kill at a random moment of a stage, its commit included; False: the job ended before."""
    place, partial = run / "stages" / target, run / "stages" / f"{target}.partial"
    in_commit = rng.random() < 0.2
    delay = rng.random() * case.seconds[target] * (1.3 if target != "prepare" else 1.0)
    everything, rank = rng.random() < 0.5, rng.randrange(case.processes)

    def reached() -> bool:
        if target == "prepare":
            return (run / "run.lock").exists()
        if in_commit:
            return (partial / "stage.json").exists() or place.exists()
        return partial.exists() or place.exists()

    while not reached():
        if job.poll() is not None:
            return False
        time.sleep(0.003)
    if not in_commit:
        time.sleep(delay)
    if job.poll() is not None:
        return False
    hit = _where(run)
    if everything:
        job.kill()
    else:
        if not job.kill_rank(rank):
            job.wait()
            return False
        try:
            job.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            case.faults.append(f"{run.name}: still running {ENDS_WITHIN_S} s after rank {rank} was killed in {hit}")
            job.kill()
    case.kills[hit] += 1
    case.whole += everything
    _say(f"  killed {'everything' if everything else f'rank {rank} of {case.processes}'} in {hit}")
    return True


def _where(run: Path) -> str:
    """The stage that runs, as the files tell."""
    stages = run / "stages"
    found = sorted(stages.glob("*.partial"), key=lambda p: p.stat().st_mtime) if stages.exists() else []
    if found:
        name = found[-1].name.removesuffix(".partial")
        return f"{name}, commit" if (found[-1] / "stage.json").exists() else name
    if not (stages / "features").exists():
        return "prepare"
    if (run / "stages" / "export").exists():
        return "after export"
    return "between stages"


def _faults(case: Case, run: Path, code: int, text: str) -> list[str]:
    """What is not as it should be, after the last start."""
    if code != 0:
        return [f"the last start ended with {code}: {text[-1500:]}"]
    now = case.metrics(run)
    faults = [
        f"{name} is {now.get(name)}, undisturbed {value}"
        for name, value in case.results.items()
        if abs(now.get(name, float("inf")) - value) > TOLERANCE
    ]
    left = [
        str(p.relative_to(run))
        for p in run.rglob("*")
        if p.suffix in (".partial", ".old", ".damaged", ".tmp") or p.name.startswith("run.lock")
    ]
    if left:
        faults.append(f"left behind: {', '.join(left[:5])}")
    check = "import sys, xmcdist; xmcdist.load(sys.argv[1], verify=True)"
    loaded = subprocess.run(
        [sys.executable, "-c", check, str(run / "model")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if loaded.returncode:
        faults.append(f"the model does not load: {loaded.stderr[-500:]}")
    return faults


def _page(cases: list[Case], asked: argparse.Namespace) -> str:
    import torch

    total = sum(sum(case.kills.values()) for case in cases)
    model = next((r.split(":")[1].strip() for r in _read("/proc/cpuinfo").splitlines() if "model name" in r), "unknown")
    lines = [
        "# Killed and started again",
        "",
        f"{datetime.date.today()}; {os.cpu_count()} cores ({model}), shared with other work; Python "
        f"{platform.python_version()}, torch {torch.__version__}, gloo. Made by:",
        "",
        f"    python benchmarks/chaos.py --kills {asked.kills} --seed {asked.seed} --launch {asked.launch} "
        "--out benchmarks/chaos.md",
        "",
        "Settings: encoder: " + shlex.join(ENCODER) + "; linear only: " + shlex.join(LINEAR) + ".",
        "",
        f"{total} kills (SIGKILL; {sum(c.whole for c in cases)} of launcher and all ranks, "
        f"{sum(c.whole * -1 + sum(c.kills.values()) for c in cases)} of one rank) over {sum(c.runs for c in cases)} "
        f"runs; {sum(c.went_on for c in cases)} starts went on from what was on disk. "
        f"Faults: {sum(len(c.faults) for c in cases) or 'none'}. "
        "Checked of each run: every measure equals the undisturbed run's to 1e-6, nothing unfinished, put aside or "
        "locked is left, the model passes its checksums, and no job hung after it lost a rank.",
        "",
        "| case | runs | kills | starts | undisturbed s | all starts together s, a run | lost a kill s | faults |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in cases:
        kills = sum(c.kills.values())
        lost = (c.wall_s - c.runs * c.alone_s) / max(kills, 1)
        lines.append(
            f"| {c.name} | {c.runs} | {kills} | {c.starts} | {c.alone_s:.0f} | {c.wall_s / max(c.runs, 1):.0f} | "
            f"{lost:.0f} | {len(c.faults)} |"
        )
    lines += [
        "",
        "A kill costs the start of the processes, the work since the last commit or checkpoint, and, where one rank "
        "was killed, the time until the others have ended. "
        + (
            "Ranks were forked from a process that had imported everything: under `accelerate launch` the imports of "
            "launcher and ranks come on top."
            if asked.launch == "fork"
            else "Ranks were started by `accelerate launch`."
        ),
        "",
        "| killed in | " + " | ".join(c.name for c in cases) + " |",
        "|---|" + "---|" * len(cases),
    ]
    order = ["prepare", *dict.fromkeys(s for c in cases for s in c.seconds if s != "prepare")]
    places = sorted({p for c in cases for p in c.kills}, key=lambda p: (_index(order, p.split(",")[0]), p))
    lines += [f"| {p} | " + " | ".join(str(c.kills[p] or "") for c in cases) + " |" for p in places]
    lines += [f"\nFault: {fault}" for c in cases for fault in c.faults]
    return "\n".join(lines) + "\n"


def _index(order: list[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
