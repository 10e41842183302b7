"""``python -m xmcdist board RUN``: the curves of a run in a dashboard on this computer."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

_ABOUT = """Open a local dashboard of a run, whatever it was tracked in.

A run that was trained with tracker=trackio, tensorboard or all is shown live from its own
files.  Of any other, and of several runs together, metrics.jsonl is brought into a temporary
dashboard.  Nothing leaves this computer; over ssh, forward the port:
ssh -L 7860:localhost:7860 HOST."""


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="xmcdist board", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", metavar="RUN", help="run folder (also run_dir=RUN); several are compared")
    parser.add_argument("--use", choices=("trackio", "tensorboard"), help="default: what the run was tracked in")
    parser.add_argument("--port", type=int, help="default: the dashboard's own, or the next free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this computer alone")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    args = parser.parse_args()

    from xmcdist.config.errors import UserError
    from xmcdist.observability.board import open_board

    try:
        open_board(
            [Path(run.removeprefix("run_dir=")) for run in args.run],
            use=args.use,
            host=args.host,
            port=args.port,
            browser=not args.no_browser,
            say=lambda text: print(f"xmcdist board: {text}", flush=True),
        )
    except UserError as error:
        print(f"xmcdist: error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # a dashboard's threads do not end by themselves
    sys.stdout.flush()
    os._exit(0)
