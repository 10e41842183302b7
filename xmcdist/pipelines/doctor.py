"""Is this machine, or this job on all its ranks, fit to train?  One line a check, with the remedy."""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xmcdist.config.commands import DoctorConfig
from xmcdist.config.errors import UserError
from xmcdist.observability.host import host_facts
from xmcdist.parallel.collectives import barrier, gather_objects
from xmcdist.parallel.launch import World
from xmcdist.pipelines.doctor_folders import model_checks, run_checks
from xmcdist.pipelines.doctor_network import network_checks

__all__ = ["Check", "doctor", "judge"]

_MB, _GB = 1e6, 1e9
_WRITTEN = 1 << 25  # bytes of the write test
_CLOCK_ROUNDS = 5
_MUST_AGREE = ("xmcdist", "python", "torch", "numpy", "deepspeed", "accelerate")


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, and what to do."""

    name: str
    status: str  # ok | warn | fail
    text: str
    remedy: str = ""

    def line(self) -> str:
        """As it is printed."""
        return f"{self.status:4s}  {self.name}: {self.text}" + (f". {self.remedy}" if self.remedy else "")


def doctor(cfg: DoctorConfig, world: World) -> bool:
    """Look at everything, print a line each on rank 0; collective.

    Returns:
        Whether nothing failed, the same on every rank.

    Raises:
        UserError: a setting that cannot be.
        CollectiveError: a rank does not answer within ``cfg.timeout_s``; names it.
    """
    if cfg.timeout_s < 1:
        raise UserError(f"timeout_s={cfg.timeout_s} must be at least 1")
    good = True

    def tell(checks: list[Check]) -> None:
        nonlocal good
        good = good and all(c.status != "fail" for c in checks)
        if world.is_main:
            for check in checks:
                print(check.line(), flush=True)

    folder = Path(cfg.folder or cfg.run_dir or os.environ.get("XMCDIST_RUNS", "."))
    tell(judge(gather_objects(host_facts(world.device, folder))))
    tell([_clocks(world)])
    tell([_written(folder, world), _shared(folder, world, cfg.wait_s)])
    tell([Check(*row) for row in network_checks(world)])
    # Files are looked at once, by rank 0: others see the same folder, or the check above has failed.
    rows: list[tuple[str, str, str, str]] = []
    if world.is_main:
        rows += run_checks(Path(cfg.run_dir), cfg.verify) if cfg.run_dir is not None else []
        rows += model_checks(Path(cfg.model), cfg.verify) if cfg.model is not None else []
    tell([Check(*row) for row in gather_objects(rows)[0]])
    if world.is_main:
        print("all is well" if good else "something failed: see above", flush=True)
    return good


def judge(facts: list[dict[str, Any]]) -> list[Check]:
    """Checks that need no more than every rank's facts (`host_facts`), in rank order."""
    return [
        _versions(facts),
        _devices(facts),
        _threads(facts),
        _binding(facts),
        *_limits(facts),
        _shared_memory(facts),
        _disk(facts),
        _interfaces(facts),
    ]


def _where(ranks: list[int], facts: list[dict[str, Any]]) -> str:
    """``rank 3 (host n2)``, or how many."""
    if len(ranks) == len(facts):
        return "all ranks" if len(facts) > 1 else "this process"
    shown = ", ".join(f"rank {r} (host {facts[r]['host']})" for r in ranks[:3])
    return shown + (f" and {len(ranks) - 3} more" if len(ranks) > 3 else "")


def _versions(facts: list[dict[str, Any]]) -> Check:
    first = facts[0]["versions"]
    differ = []
    worst = "ok"
    for name in sorted({n for f in facts for n in f["versions"]}):
        other = [r for r, f in enumerate(facts) if f["versions"].get(name) != first.get(name)]
        if other:
            theirs = facts[other[0]]["versions"].get(name, "none")
            differ.append(f"{name} {first.get(name, 'none')} on rank 0 and {theirs} on {_where(other, facts)}")
            worst = "fail" if name in _MUST_AGREE else ("warn" if worst == "ok" else worst)
    if differ:
        return Check("versions", worst, "; ".join(differ), "Use one environment on all machines")
    return Check("versions", "ok", ", ".join(f"{n} {first[n]}" for n in _MUST_AGREE if n in first))


def _devices(facts: list[dict[str, Any]]) -> Check:
    kinds = {f["device"].split(":")[0] for f in facts}
    if len(kinds) > 1:
        without = [r for r, f in enumerate(facts) if f["device"] == "cpu"]
        return Check("devices", "fail", f"no GPU on {_where(without, facts)}", "Start ranks where GPUs are, or none")
    hosts = sorted({f["host"] for f in facts})
    spread = f"{len(facts)} process{'es' if len(facts) > 1 else ''} on {', '.join(hosts[:8])}"
    if kinds == {"cpu"}:
        return Check("devices", "ok", f"{spread}, no GPU")
    seen: dict[tuple[str, str], int] = {}
    for rank, f in enumerate(facts):
        place = (f["host"], f["gpu"]["uuid"])
        if place in seen:
            text = f"ranks {seen[place]} and {rank} have the same GPU on {f['host']}"
            return Check("devices", "fail", text, "Start one process a GPU; look at CUDA_VISIBLE_DEVICES")
        seen[place] = rank
    names = sorted({f["gpu"]["name"] for f in facts})
    busy = [r for r, f in enumerate(facts) if f["gpu"]["free"] < 0.85 * f["gpu"]["total"]]
    if busy:
        text = f"{spread}, {', '.join(names)}; memory is taken already on {_where(busy, facts)}"
        return Check("devices", "warn", text, "Another program may be on these GPUs: nvidia-smi")
    status = "ok" if len(names) == 1 else "warn"
    return Check(
        "devices", status, f"{spread}, {', '.join(names)}", "" if status == "ok" else "The slowest sets the pace"
    )


def _threads(facts: list[dict[str, Any]]) -> Check:
    ranks_on = {h: sum(f["host"] == h for f in facts) for h in {f["host"] for f in facts}}
    crowded = [
        r for r, f in enumerate(facts) if f["torch_threads"] * ranks_on[f["host"]] > max(f["machine_cores"], f["cores"])
    ]
    f = facts[0]
    said = f"{f['torch_threads']} a process, {f['cores']} cores to use of {f['machine_cores']}"
    if crowded:
        worst = facts[crowded[0]]
        fair = max(worst["machine_cores"] // ranks_on[worst["host"]], 1)
        text = f"{worst['torch_threads']} threads a process are more than the cores, on {_where(crowded, facts)}"
        return Check("threads", "warn", text, f"Set OMP_NUM_THREADS={fair}, or engine.threads={fair}")
    idle = [r for r, f in enumerate(facts) if 2 * f["torch_threads"] * ranks_on[f["host"]] < f["cores"]]
    if idle:
        worst = facts[idle[0]]
        fair = max(worst["cores"] // ranks_on[worst["host"]], 1)
        text = f"{said}; cores are idle on {_where(idle, facts)}"
        return Check("threads", "warn", text, f"The CPU stages would be faster with OMP_NUM_THREADS={fair}")
    return Check("threads", "ok", said)


def _binding(facts: list[dict[str, Any]]) -> Check:
    known = [(r, f) for r, f in enumerate(facts) if f["gpu"] and f["gpu"]["near_cores"]]
    if not known:
        return Check("binding", "ok", "no GPU to be near to" if not facts[0]["gpu"] else "the system does not tell")
    free = [r for r, f in known if f["cores"] == f["machine_cores"]]
    near = "; ".join(f"rank {r}: cores {f['gpu']['near_cores']}" for r, f in known[:8])
    if free:
        text = f"processes are not bound to cores; near their GPUs are {near}"
        return Check("binding", "ok", text, "Binding them (numactl, srun --cpu-bind) may help the CPU stages")
    return Check("binding", "ok", f"near their GPUs are {near}")


def _limits(facts: list[dict[str, Any]]) -> list[Check]:
    out = []
    low = [r for r, f in enumerate(facts) if f["limits"]["NOFILE"] is not None and f["limits"]["NOFILE"] < 4096]
    least = min((f["limits"]["NOFILE"] for f in facts if f["limits"]["NOFILE"] is not None), default=None)
    text = "open files: unlimited" if least is None else f"open files: {least}"
    if low:
        status = "fail" if least is not None and least < 256 else "warn"
        out.append(Check("limits", status, f"{text} on {_where(low, facts)}", "ulimit -n 65536"))
    else:
        out.append(Check("limits", "ok", text))
    locked = [r for r, f in enumerate(facts) if f["limits"]["MEMLOCK"] is not None]
    if locked and facts[0]["gpu"]:
        small = facts[locked[0]]["limits"]["MEMLOCK"]
        text = f"locked memory: {small / _MB:.0f} MB on {_where(locked, facts)}"
        out.append(Check("limits", "warn", text, "InfiniBand and pinned memory want ulimit -l unlimited"))
    dumping = [r for r, f in enumerate(facts) if f["limits"]["CORE"] != 0]
    text = f"core dumps: {'on' if dumping else 'off'}"
    out.append(Check("limits", "ok", text, "A crash may write as much as its memory; ulimit -c 0" if dumping else ""))
    return out


def _shared_memory(facts: list[dict[str, Any]]) -> Check:
    free = [f["shm_free"] for f in facts]
    small = [r for r, n in enumerate(free) if n is None or n < 256 * _MB]
    told = min((n for n in free if n is not None), default=None)
    text = "there is none" if told is None else f"{told / _GB:.2f} GB free"
    if small:
        remedy = "NCCL needs some: give the container --shm-size=1g"
        return Check("/dev/shm", "warn", f"{text} on {_where(small, facts)}", remedy)
    return Check("/dev/shm", "ok", text)


def _disk(facts: list[dict[str, Any]]) -> Check:
    free = [f["disk_free"] or 0 for f in facts]
    least = min(free)
    text = f"{least / _GB:.1f} GB free where the run folder lies"
    if least < 1 * _GB:
        return Check("disk", "fail", text, "Free some, or choose another run_dir")
    return Check("disk", "ok" if least > 20 * _GB else "warn", text, "" if least > 20 * _GB else "May be too little")


def _interfaces(facts: list[dict[str, Any]]) -> Check:
    hosts = {f["host"]: f["interfaces"] for f in facts}
    text = "; ".join(f"{host}: {', '.join(names) or 'loopback only'}" for host, names in list(hosts.items())[:8])
    unset = [r for r, f in enumerate(facts) if not f["socket_ifname"]]
    if len(hosts) > 1 and unset and any(len(names) > 1 for names in hosts.values()):
        remedy = "Name the one between nodes: NCCL_SOCKET_IFNAME=... and GLOO_SOCKET_IFNAME=..."
        return Check("interfaces", "warn", text, remedy)
    return Check("interfaces", "ok", text)


def _clocks(world: World) -> Check:
    """How far apart clocks are, at most: the spread of what ranks say right after a barrier; the least of some."""
    if world.world_size == 1:
        return Check("clocks", "ok", "one process")
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        barrier()
        rounds.append(gather_objects(time.time()))
    best = min(rounds, key=lambda told: max(told) - min(told))
    spread = max(best) - min(best)
    text = f"at most {1000 * spread:.0f} ms apart" if spread < 1 else f"about {spread:.1f} s apart"
    if spread < 2:
        return Check("clocks", "ok", text)
    middle = sorted(best)[len(best) // 2]
    wrong = max(range(len(best)), key=lambda r: abs(best[r] - middle))
    status = "fail" if spread > 300 else "warn"
    return Check(
        "clocks", status, f"{text}, rank {wrong} farthest", "Locks and logs go by the clock: start chrony or ntpd"
    )


def _written(folder: Path, world: World) -> Check:
    """Rank 0 writes, flushes to the disk, and deletes a file; collective."""
    rate: float | str = 0.0
    if world.is_main:
        place = folder / f".xmcdist-doctor-{secrets.token_hex(4)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            with open(place, "wb") as f:
                f.write(os.urandom(_WRITTEN))
                f.flush()
                os.fsync(f.fileno())
            rate = _WRITTEN / (time.perf_counter() - started)
        except OSError as error:
            rate = f"{folder} cannot be written: {error.strerror}"
        finally:
            with suppress(OSError):
                place.unlink()
    said = gather_objects(rate)[0]
    if isinstance(said, str):
        return Check("writing", "fail", said, "Choose a run_dir that you may write to")
    text = f"{said / _MB:.0f} MB/s to {folder}, flushed"
    return Check(
        "writing", "ok" if said > 50 * _MB else "warn", text, "" if said > 50 * _MB else "Checkpoints will be slow"
    )


def _shared(folder: Path, world: World, wait_s: float) -> Check:
    """Rank 0 writes a file, and every rank looks for it; collective."""
    if world.world_size == 1:
        return Check("shared folder", "ok", "one process")
    place = folder / f".xmcdist-doctor-{gather_objects(secrets.token_hex(4))[0]}"
    if world.is_main:
        with suppress(OSError):
            place.write_text("seen\n", encoding="utf-8")
    barrier()
    started, late = time.perf_counter(), None
    while time.perf_counter() - started < wait_s:
        with suppress(OSError):
            os.listdir(folder)  # network folders answer from memory until they are asked anew
            if place.read_text(encoding="utf-8") == "seen\n":
                late = time.perf_counter() - started
                break
        time.sleep(0.05)
    told = gather_objects((late, str(folder.absolute()), socket.gethostname()))
    if world.is_main:
        with suppress(OSError):
            place.unlink()
    blind = [r for r, (seen, _, _) in enumerate(told) if seen is None]
    if blind:
        rank = blind[0]
        many = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        text = f"rank {rank} (host {told[rank][2]}){many} does not see in {told[rank][1]} what rank 0 wrote "
        text += f"to {told[0][1]}"
        return Check(
            "shared folder", "fail", text, "All ranks need the same folder: give an absolute run_dir that is shared"
        )
    slowest = max(range(len(told)), key=lambda r: told[r][0] or 0.0)
    delay = told[slowest][0] or 0.0
    text = f"all ranks see {told[0][1]}, after {1000 * delay:.0f} ms at most"
    return Check(
        "shared folder", "ok" if delay < 5 else "warn", text, f"Rank {slowest} saw it last" if delay >= 5 else ""
    )
