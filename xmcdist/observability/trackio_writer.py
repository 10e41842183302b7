"""The process that writes a run's Trackio database: one JSON message a line on standard input.

Started by `xmcdist.observability.trackio_tracker`, never by hand.  It ends when its input
does, so a run that is killed still gets written what it had told.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

__all__ = ["main"]


def main() -> None:
    """Write until there is nothing more."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Slurm signals every process of a step; the run decides
    import trackio

    first = json.loads(sys.stdin.readline())
    run: Any = trackio.init(
        first["project"],
        name=first["run"],
        config=first["config"],
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    for line in sys.stdin:
        try:
            message = json.loads(line)
        except ValueError:  # the run was killed in the middle of it
            continue
        run.log(_values(trackio, message), step=message["step"])
    run.finish()


def _values(trackio: Any, message: dict[str, Any]) -> dict[str, Any]:
    if "table" in message:
        columns = list(message["rows"][0])
        data = [[row.get(c) for c in columns] for row in message["rows"]]
        return {message["table"]: trackio.Table(columns=columns, data=data)}
    if "histogram" in message:
        return {message["histogram"]: trackio.Histogram(np_histogram=(message["counts"], message["edges"]))}
    values: dict[str, Any] = message["values"]
    return values


if __name__ == "__main__":
    main()
