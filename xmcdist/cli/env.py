"""``python -m xmcdist env``: versions and devices, to paste into a bug report."""

from __future__ import annotations

import sys


def main() -> None:
    """Print the report."""
    if any(a in ("-h", "--help") for a in sys.argv[1:]):
        print("usage: python -m xmcdist env\n\nVersions, processors and devices, to paste into a bug report.")
        return
    from xmcdist.observability.environment import environment_report

    print(environment_report())
