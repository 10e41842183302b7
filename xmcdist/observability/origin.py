"""Where a result comes from: the command, the version of the code, the machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

__all__ = ["command_line", "git_commit", "hardware"]

_GIT_S = 5.0  # a checkout on a slow network folder must not hold up a run


def command_line() -> str:
    """The command that started this process, to paste into a shell."""
    program, *rest = sys.argv or ["python"]
    # __main__ puts the command's name there: "xmcdist train"
    start = f"python -m {program}" if program.startswith("xmcdist ") else shlex.quote(program)
    return " ".join([start, *(shlex.quote(word) for word in rest)])


def git_commit() -> str | None:
    """The commit of the checkout that runs, with ``-dirty`` where files differ from it; None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=_GIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip() or None


def hardware() -> dict[str, str]:
    """This process's machine in words: host, system, processor, memory, and GPUs where torch is in use."""
    found = {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": f"{_processor()}, {_cores()} cores",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["GPUs"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return {key: value for key, value in found.items() if value}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
