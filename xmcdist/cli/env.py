"""``python -m xmcdist env``: versions, devices and variables, to paste into a bug report."""

from __future__ import annotations

import sys
from pathlib import Path

from xmcdist.config.errors import UserError

_USAGE = """usage: python -m xmcdist env [run_dir=RUN]

Versions, processors, devices and environment variables that matter (secrets left out), to paste into a bug report;
with run_dir= also which settings and versions a run had."""


def main() -> None:
    """Print the report."""
    args = sys.argv[1:]
    if any(a in ("-h", "--help") for a in args):
        print(_USAGE)
        return
    try:
        run_dir = None
        for arg in args:
            name, _, value = arg.partition("=")
            if name != "run_dir" or not value:
                raise UserError(f"env takes run_dir=RUN or nothing, not {arg!r}")
            run_dir = Path(value)
        from xmcdist.observability.environment import environment_report

        print(environment_report(run_dir))
    except UserError as error:
        print(f"xmcdist: error: {error}", file=sys.stderr)
        sys.exit(2)
