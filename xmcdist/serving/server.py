"""An HTTP server for a model: its socket, its workers, and what is said about them.

With several workers uvicorn's supervisor starts them, replaces one that died or hangs, and
on SIGHUP one after the other, each once its successor has the model open.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from xmcdist.config.commands import ServeConfig
from xmcdist.config.errors import ConfigError, UserError
from xmcdist.serving.folders import count_labels
from xmcdist.serving.limits import Limits

__all__ = ["Started", "address_of", "check", "is_loopback", "limits_of", "listen", "run_server", "worker_app"]

_HEALTH_S = 120  # a worker that is silent for so long is replaced; a new one has so long to open its model
_RETRY_S = 1.0  # before a model that could not be opened is tried again
_GRACE_S = 5.0  # beyond timeout_s, for requests that are answered while the server stops
_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than a proxy keeps its connections, so that it never asks on one that is being closed


def limits_of(cfg: ServeConfig) -> Limits:
    """The limits among the settings.

    Raises:
        ConfigError: a value is out of its range.
    """
    return Limits(**{f.name: getattr(cfg, f.name) for f in fields(Limits)})


def check(cfg: ServeConfig) -> None:
    """What can be said before a worker is started.

    Raises:
        UserError: packages are missing, there is no model, or a setting is out of its range.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serve needs FastAPI, uvicorn and prometheus-client ({error}): pip install 'xmcdist[serve]'"
        ) from None
    faults = []
    try:
        limits_of(cfg)
    except ConfigError as error:
        faults.append(str(error))
    if cfg.workers < 1:
        faults.append(f"workers={cfg.workers} must be at least 1")
    if cfg.threads is not None and cfg.threads < 1:
        faults.append(f"threads={cfg.threads} must be at least 1, or null")
    if not 0 <= cfg.port <= 65535:
        faults.append(f"port={cfg.port} must be between 0 and 65535; 0 takes any that is free")
    if faults:
        raise ConfigError("\n".join(faults))
    count_labels(cfg.model)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, which all workers share.

    Raises:
        UserError: the address is in use, not this machine's, or not allowed.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. uvicorn opens a socket that it is handed as one of another family, and asyncio
        # then leaves it out: every answer, which is sent in two parts, would wait 40 ms for the client's ACK.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        raise UserError(
            f"cannot listen at host={host} port={port}: {error.strerror}. "
            "Give another port=..., port=0 for any free one, or an address of this machine as host=..."
        ) from None
    bound.set_inheritable(True)
    return bound


@dataclass(frozen=True, slots=True)
class Started:
    """What a worker knows of the server it belongs to; travels as JSON.

    Attributes:
        folder: of this server alone, for meters and marks.
        main_pid: the process to stop when no model can be opened.
        address: for people.
    """

    folder: str
    main_pid: int
    address: str


def run_server(cfg: ServeConfig, bound: socket.socket, folder: Path, factory: str) -> None:
    """Serve until a signal ends it.

    Args:
        bound: of `listen`.
        folder: as of `Started`.
        factory: where a worker finds the function that makes its application, ``module:name``.

    Raises:
        UserError: the model could not be opened.
    """
    import uvicorn

    _notice_deaths_at_once()
    # uvicorn ends one worker alone by raising the signal anew, which would leave the folder behind.
    before = signal.signal(signal.SIGTERM, _leave)
    failed = folder / "failed"
    try:
        uvicorn.run(
            factory,
            factory=True,
            fd=bound.fileno(),
            workers=cfg.workers,
            backlog=_BACKLOG,
            access_log=cfg.access_log,
            log_config=_logging(cfg.access_log),
            timeout_graceful_shutdown=int(cfg.timeout_s + _GRACE_S),
            timeout_worker_healthcheck=_HEALTH_S,
            timeout_keep_alive=_KEEP_ALIVE_S,
            server_header=False,
            lifespan="on",
        )
    except SystemExit:
        if not failed.is_file():
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed.is_file():
        raise UserError(failed.read_text(encoding="utf-8"))


def _leave(_: int, __: Any) -> None:
    sys.exit(0)


def _notice_deaths_at_once() -> None:
    """Let the supervisor hear of a worker that is killed while it is asked whether it lives.

    uvicorn keeps the worker's end of the pipe open in the supervisor too, so that nothing ends
    when the worker does, and the question waits for all of `_HEALTH_S`.
    """
    from uvicorn.supervisors.multiprocess import Process

    def start(process: Process) -> None:
        process.process.start()
        process.child_conn.close()

    Process.start = start  # type: ignore[assignment, method-assign]


def worker_app(cfg: ServeConfig, started: Started) -> Any:
    """The application of one worker.

    The first workers open the model in the background, so that ``/health`` and ``/ready`` answer
    at once.  One that replaces another opens it before it takes a connection: until then
    the others answer, and on SIGHUP the one it replaces.
    """
    from xmcdist.serving.application import app

    folder, began = Path(started.folder), time.monotonic()
    _end_with_parent()
    threads = cfg.threads or max(1, _cores() // cfg.workers)

    def opened(outcome: Any) -> None:
        if isinstance(outcome, BaseException):
            _failed(outcome, started)
        elif _first(folder / "ready"):
            workers = f"{cfg.workers} workers of " if cfg.workers > 1 else ""
            many = f"{threads} thread{'s' if threads > 1 else ''}"
            print(
                f"xmcdist: serving {outcome.info()['model']}, {outcome.predictor.num_labels:,} labels, at "
                f"{started.address} ({workers}{many}; ready after {time.monotonic() - began:.1f} s)",
                flush=True,
            )

    return app(
        cfg.model,
        ensemble=cfg.ensemble,
        limits=limits_of(cfg),
        threads=threads,
        exact=cfg.exact,
        wait=(folder / "ready").exists(),
        opened=opened,
    )


def _failed(error: BaseException, started: Started) -> None:
    """The model cannot be opened: at the start that ends the server, later it keeps its other workers."""
    if not isinstance(error, UserError):
        logging.getLogger("xmcdist.serving").error("the model could not be opened", exc_info=error)
    if Path(started.folder, "ready").exists():
        print(f"xmcdist: a new worker could not open the model: {error}", file=sys.stderr, flush=True)
        # uvicorn stops the whole server when a worker's start fails; a worker that merely died is tried again.
        time.sleep(_RETRY_S)
        os._exit(1)
    elif _first(Path(started.folder, "failed"), str(error)):
        os.kill(started.main_pid, signal.SIGTERM)


def _first(path: Path, text: str = "") -> bool:
    """Make a file; whether this process was the one that did."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    own.write_text(text, encoding="utf-8")
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    finally:
        own.unlink()
    return True


def _end_with_parent() -> None:
    """A worker whose supervisor was killed stops too, and does not hold the port."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def address_of(bound: socket.socket, host: str) -> str:
    """What to type into a browser."""
    port = bound.getsockname()[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Worth(logging.Filter):
    """Of what uvicorn says: warnings, and that a worker died or all are replaced."""

    def filter(self, record: logging.LogRecord) -> bool:
        told = str(record.msg)
        return record.levelno >= logging.WARNING or "died" in told or "SIGHUP" in told


def _logging(access_log: bool) -> dict[str, Any]:
    plain = {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stderr"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"worth": {"()": _Worth}},
        "formatters": {"plain": {"format": "xmcdist: %(message)s"}, "access": {"format": "%(asctime)s %(message)s"}},
        "handlers": {
            "errors": {**plain, "filters": ["worth"]},
            "access": {**plain, "formatter": "access", "stream": "ext://sys.stdout"},
        },
        "loggers": {
            "uvicorn": {"handlers": ["errors"], "level": "INFO", "propagate": False},
            "uvicorn.access": {"handlers": ["access"] if access_log else [], "level": "INFO", "propagate": False},
            "xmcdist.serving": {"handlers": ["errors"], "level": "INFO", "propagate": False},
        },
    }
