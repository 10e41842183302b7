"""What a process finds on its machine: limits, memory, threads, interfaces, GPUs."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from xmcdist.observability.environment import versions

__all__ = ["cpu_description", "gpu_rows", "host_facts", "memory_total", "nvidia_driver"]

_UNLIMITED = resource.RLIM_INFINITY
_USED_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")


def host_facts(device: str, folder: Path) -> dict[str, Any]:
    """Facts of this process, as plain values that travel to rank 0.

    Args:
        device: ``cpu`` or ``cuda:i``.
        folder: whose disk is looked at; it or a parent exists.
    """
    import torch

    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "machine_cores": os.cpu_count() or 1,
        "omp_threads": os.environ.get("OMP_NUM_THREADS"),
        "torch_threads": torch.get_num_threads(),
        "limits": {name: _limit(name) for name in ("NOFILE", "MEMLOCK", "CORE")},
        "shm_free": _free("/dev/shm"),
        "disk_free": _free(str(_existing(folder))),
        "memory": memory_total(),
        "interfaces": _interfaces(),
        "socket_ifname": os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME"),
        "device": device,
        "gpu": _gpu(device),
    }


def _limit(name: str) -> int | None:
    """The soft limit; None: unlimited."""
    soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    return None if soft == _UNLIMITED else int(soft)


def _free(path: str) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


def memory_total() -> int:
    """Bytes of this machine's memory, or what its control group may use; 0 if it does not tell."""
    total = 0
    with suppress(ValueError, OSError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(ValueError, OSError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def _interfaces() -> list[str]:
    """Network interfaces that are up, loopback left out."""
    out = []
    for _, name in socket.if_nameindex():
        state = Path("/sys/class/net", name, "operstate")
        with suppress(OSError):
            if name != "lo" and state.read_text().strip() != "down":
                out.append(name)
    return out


def cpu_description() -> str:
    """Model name and the instruction sets that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((said.get("flags") or said.get("Features") or "").split())
    model = said.get("model name") or platform.machine()
    return f"{model} ({', '.join(f for f in _USED_FLAGS if f in flags) or 'no vector instructions known'})"


def _gpu(device: str) -> dict[str, Any] | None:
    """Name, memory and place of this process's GPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    properties = torch.cuda.get_device_properties(torch.device(device))
    free, total = torch.cuda.mem_get_info(torch.device(device))
    bus = getattr(properties, "pci_bus_id", None)
    near: str | None = None
    if bus is not None:
        address = (
            f"{getattr(properties, 'pci_domain_id', 0):04x}:{bus:02x}:{getattr(properties, 'pci_device_id', 0):02x}.0"
        )
        with suppress(OSError):
            near = Path("/sys/bus/pci/devices", address, "local_cpulist").read_text().strip()
    return {
        "name": properties.name,
        "uuid": str(getattr(properties, "uuid", device)),
        "total": int(total),
        "free": int(free),
        "near_cores": near,
    }


def gpu_rows() -> list[str]:
    """A line for each GPU that this process sees."""
    import torch

    return [
        f"{torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver, None without."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told[0] if told else None
