"""``python -m xmcdist serve``: a model folder behind HTTP."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xmcdist.config.commands import ServeConfig

_SETTINGS = "XMCDIST_SERVE"  # from here to the workers, which are started anew and read nothing else


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    from xmcdist.cli.app import run

    run("serve", _serve)


def _serve(cfg: ServeConfig) -> None:
    from xmcdist.serving.server import Started, address_of, check, is_loopback, listen, run_server

    check(cfg)
    bound = listen(cfg.host, cfg.port)
    if not is_loopback(cfg.host):
        print(
            f"xmcdist: host={cfg.host} is reached from other machines, and there is no authentication: "
            "anyone who reaches it may ask. Put a proxy that asks who they are in front",
            file=sys.stderr,
            flush=True,
        )
    folder = Path(tempfile.mkdtemp(prefix="xmcdist-serve-"))
    try:
        started = Started(str(folder), os.getpid(), address_of(bound, cfg.host))
        os.environ[_SETTINGS] = json.dumps({"settings": asdict(cfg), "started": asdict(started)})
        if cfg.workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        run_server(cfg, bound, folder, f"{__name__}:worker")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def worker() -> Any:
    """The application of one worker, by the settings that `main` left in the environment."""
    from xmcdist.serving.server import Started, worker_app

    told = json.loads(os.environ[_SETTINGS])
    return worker_app(ServeConfig(**told["settings"]), Started(**told["started"]))
