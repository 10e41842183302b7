"""A local dashboard of runs: what they were tracked in, or their metrics.jsonl brought into one."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import tempfile
import time
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from xmcdist.config.errors import UserError
from xmcdist.observability.curve import read_rows
from xmcdist.observability.trackers import Tracker, tell

__all__ = ["BOARDS", "bring_in", "choose", "open_board"]

BOARDS = ("trackio", "tensorboard")
_PROJECT = "xmcdist"


def open_board(
    runs: Sequence[Path], *, use: str | None, host: str, port: int | None, browser: bool, say: Callable[[str], None]
) -> None:
    """Serve a dashboard until it is interrupted.

    Args:
        runs: run folders; several are shown beside one another.
        use: of `BOARDS`; None: what the run was tracked in, else the first that is installed.
        host: address to listen on; 127.0.0.1 is seen from this computer only.
        port: None: the dashboard's own, or the next free one.
        browser: open one.
        say: told what is shown.

    Raises:
        UserError: a folder holds no metrics, or no dashboard is installed.
    """
    board, folder = choose(runs, use)
    with tempfile.TemporaryDirectory(prefix="xmcdist-board-") as scratch:
        if folder is None:
            folder = Path(scratch) / board
            rows = sum(bring_in(run, board, folder) for run in runs)
            say(f"{rows} rows of metrics.jsonl as they are now; start again to see later ones")
        else:
            say(f"{folder}; it grows while the run goes on")
        serve = _serve_trackio if board == "trackio" else _serve_tensorboard
        serve(folder, host, port, browser, say)


def choose(runs: Sequence[Path], use: str | None) -> tuple[str, Path | None]:
    """Which dashboard to show some runs in, and the folder it reads; None: one has to be made.

    Raises:
        UserError: see `open_board`.
    """
    for run in runs:
        if not any((run / name).exists() for name in ("metrics.jsonl", *BOARDS)):
            raise UserError(
                f"{run} holds no metrics.jsonl, so it is no run folder, or its training has not begun: give the "
                "run_dir of xmcdist train"
            )
    installed = [name for name in BOARDS if importlib.util.find_spec(name) is not None]
    if not installed or (use is not None and use not in installed):
        raise UserError(
            f"{use or 'no dashboard'} is {'not ' if use else ''}installed here: run pip install "
            f"'xmcdist[{use or BOARDS[0]}]'; without one, xmcdist report RUN draws the curves into one HTML file"
        )
    boards = installed if use is None else [use]
    if len(runs) == 1:
        for board in boards:
            if any((runs[0] / board).glob("*")):
                return board, runs[0] / board
    return boards[0], None


def bring_in(run: Path, board: str, folder: Path) -> int:
    """Give the rows of a run's metrics.jsonl to a new dashboard folder.

    Returns:
        How many rows there were.
    """
    name, config = run.resolve().name, _config(run)
    tracker: Tracker
    if board == "trackio":
        from xmcdist.observability.trackio_tracker import TrackioTracker

        tracker = TrackioTracker(folder, _PROJECT, name, config)
    else:
        from xmcdist.observability.tensorboard_tracker import TensorBoardTracker

        tracker = TensorBoardTracker(folder / name, config)
    step = count = 0
    for row in read_rows(run / "metrics.jsonl"):
        step, count = max(step, int(row.get("global_step", 0))), count + 1
        tell(tracker, row, step)
    tracker.close()
    return count


def _config(run: Path) -> dict[str, Any]:
    """Its settings, as far as they are known."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _serve_trackio(folder: Path, host: str, port: int | None, browser: bool, say: Callable[[str], None]) -> None:
    from xmcdist.observability.trackio_tracker import local_environment

    os.environ.update(local_environment(folder))  # trackio reads it when it is imported
    trackio: Any = importlib.import_module("trackio")
    projects = sorted(path.stem for path in folder.glob("*.db"))
    project = projects[0] if projects else None
    try:
        with redirect_stdout(io.StringIO()):  # it explains its write token, which only the browser needs
            _, url, _, full_url = trackio.show(
                project=project, host=host, server_port=port, share=False, open_browser=False, block_thread=False
            )
    except OSError as error:
        raise UserError(f"the dashboard cannot listen on {host}, port {port or 'any'}: {error}") from error
    if browser:
        webbrowser.open(full_url)
    _wait(url, say)


def _serve_tensorboard(folder: Path, host: str, port: int | None, browser: bool, say: Callable[[str], None]) -> None:
    program: Any = importlib.import_module("tensorboard.program")
    board = program.TensorBoard()
    args = [
        "tensorboard",
        "--logdir",
        str(folder),
        "--host",
        host,
        "--load_fast",
        "false",
        *(["--port", str(port)] if port else []),
    ]
    board.configure(argv=args)
    try:
        url = board.launch()
    except program.TensorBoardServerException as error:
        raise UserError(f"the dashboard cannot listen on {host}, port {port or 'any'}: {error.msg}") from error
    if browser:
        webbrowser.open(url)
    _wait(url, say)


def _wait(url: str, say: Callable[[str], None]) -> None:
    say(f"dashboard at {url}  (Ctrl-C ends it)")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
