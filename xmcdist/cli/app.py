"""What all commands share: Hydra in front, one clear line for a person's mistake, orderly exit."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from xmcdist.config.compose import compose_run, conf_dir, register, to_object
from xmcdist.config.errors import UserError
from xmcdist.parallel.launch import rank_from_environment
from xmcdist.parallel.watch import CollectiveError
from xmcdist.training.preemption import unhandled

__all__ = ["run"]

_FIRST_WORD_S = 3.0


def run(config_name: str, body: Callable[[Any], None]) -> None:
    """Compose the configuration from ``sys.argv``, check it, and hand it to ``body``.

    Hydra's own flags work (``--help``, ``--cfg job``, ``-m``).  A `UserError` ends with
    its message and status 2; every other exception is ours and keeps its traceback
    (``XMCDIST_DEBUG=1`` shows the traceback of the former too).
    """
    import hydra

    rank, world_size = rank_from_environment()
    overrides = [a for a in sys.argv[1:] if not a.startswith("-")]
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    try:
        if flags and set(flags) <= {"-h", "--help"}:
            from xmcdist.config.help import help_text

            _say(help_text(overrides, config_name))
            return
        register()
        if not flags:
            compose_run(overrides, config_name=config_name, world_size=world_size)

        def job(composed: Any) -> None:
            try:
                body(to_object(composed, world_size))
                sys.stdout.flush()
            except UserError as error:
                _give_up(error, rank)
            except CollectiveError as error:
                # The fault lies with another rank, which tells it; this one says whom it waited for.
                if os.environ.get("XMCDIST_DEBUG") == "1":
                    traceback.print_exc()
                print(f"xmcdist: rank {rank}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            except BrokenPipeError:
                _reader_left()
            except KeyboardInterrupt:
                _interrupted(rank)
            except Exception:
                # Said here, whole and once: Hydra would shorten it and hide the cause.
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1) if world_size > 1 else sys.exit(1)

        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(job)()
    except UserError as error:
        _give_up(error, rank)


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _reader_left()


def _reader_left() -> None:
    """The reader of our output, such as head, has seen enough: that is no mistake."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _interrupted(rank: int) -> None:
    """Ctrl-C: a person knows what they did, and needs no traceback."""
    if rank == 0:
        print("xmcdist: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def _leave_note(error: UserError, rank: int) -> None:
    """Launchers hide the status of a rank: batch scripts know a person's mistake by this file."""
    path = os.environ.get("XMCDIST_ERROR_FILE")
    if path and (rank == 0 or not os.path.exists(path)):
        with suppress(OSError), open(path, "w", encoding="utf-8") as f:
            json.dump({"error": str(error), "rank": rank, "status": 2}, f)
            f.write("\n")


def _give_up(error: UserError, rank: int) -> None:
    world_size = rank_from_environment()[1]
    if os.environ.get("XMCDIST_DEBUG") == "1":
        traceback.print_exc()
    asked_to_end = unhandled()
    _leave_note(error, rank)
    if rank == 0:
        print(f"xmcdist: error: {error}", file=sys.stderr, flush=True)
    elif world_size > 1 and not asked_to_end:
        # Most such errors come to all ranks alike, and the first has said it: then the launcher
        # ends this process while it waits. If not, it is this rank's own.
        time.sleep(_FIRST_WORD_S)
        print(f"xmcdist: rank {rank}: error: {error}", file=sys.stderr, flush=True)
    # A rank that is alone in its error must not wait for the others in interpreter shutdown.
    os._exit(2) if world_size > 1 else sys.exit(2)
