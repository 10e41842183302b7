"""Files that another node wrote: a shared folder may show them late.

NFS keeps what it knows of a folder for up to a minute (``acdirmax``), a missing name too.  A
rank that opens what another node has just written therefore waits here first.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from xmcdist.config.errors import UserError
from xmcdist.parallel.launch import World

__all__ = ["seen_by_all", "wait_for"]

_LIMIT_S = 60.0
_SAY_AFTER_S = 5.0
_PAUSES_S = (0.01, 0.5)  # the first, and the longest


def wait_for(
    path: Path,
    *,
    size: int | None = None,
    ready: Callable[[], bool] | None = None,
    limit_s: float | None = None,
) -> None:
    """Return as soon as this node sees a file or folder that is known to have been written.

    Args:
        path: what is waited for.
        size: bytes that the file must have.
        ready: what else must hold; an `OSError` in it counts as not yet.
        limit_s: longest wait; None: a minute, which is NFS's own limit.

    Raises:
        UserError: it did not appear; names the node and the path.

    Cost: one stat where it is there already.
    """
    limit = _LIMIT_S if limit_s is None else limit_s
    began, pause, told = time.monotonic(), _PAUSES_S[0], False
    while not _there(path, size, ready):
        waited = time.monotonic() - began
        if waited >= limit:
            raise UserError(
                f"node {socket.gethostname()} does not see {path} as it was written, after {limit:.0f} s: is it in a "
                "folder that all nodes share? Put run_dir (and dataset.prepared) there; if they are, its cache of "
                "names is too slow: mount it with a lower actimeo, then start the same command again"
            )
        if waited >= min(_SAY_AFTER_S, limit / 2) and not told:
            told = True
            print(f"xmcdist: waiting for the shared folder to show {path}", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, _PAUSES_S[1])


def _there(path: Path, size: int | None, ready: Callable[[], bool] | None) -> bool:
    try:
        found = os.stat(path)
        if (size is None or found.st_size == size) and (ready is None or ready()):
            return True
    except OSError:  # not there, or a stale handle of what it replaced
        pass
    try:
        os.listdir(path.parent)  # asks the server for the names anew
        with open(path, "rb"):  # and for what it knows of the file
            pass
    except OSError:
        pass
    return False


def seen_by_all(folder: Path, world: World) -> None:
    """Wait until each node sees every file below a folder that any of them sees, at its full size; collective.

    For a folder into which several ranks have just written, before one reads what another wrote.

    Raises:
        UserError: on every rank: a node does not see a file of another.

    Cost: on one node a barrier; else two, and a listing and a stat a file on each.
    """
    if world.world_size == world.local_world_size:
        world.barrier()
        return
    from xmcdist.parallel.collectives import gather_objects
    from xmcdist.parallel.errors import errors_together

    world.barrier()  # one that still writes may also remove what is listed too soon
    mine = _sizes(folder) if world.local_rank == 0 else {}
    sizes: dict[str, int] = {}
    for seen in gather_objects(mine):
        for name, size in seen.items():
            sizes[name] = max(size, sizes.get(name, 0))
    with errors_together():
        for name, size in sizes.items() if world.local_rank == 0 else ():
            wait_for(folder / name, size=size)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str((Path(where) / name).relative_to(folder)): (Path(where) / name).stat().st_size
        for where, _, names in os.walk(folder)
        for name in names
    }
