"""`njit` as every compiled loop here takes it: kept on disk, and said when it has to be compiled.

Compiling takes seconds a loop, once a machine; the next start reads what was kept.  A
person who waits for it is told so on rank 0: on a terminal by a bar, elsewhere by a line
at the start and one now and then.  Other ranks compile what they need as well (whoever is
first keeps it; writing is safe side by side) and are silent.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import numba
from numba.core import event

from xmcdist.parallel.launch import rank_from_environment

__all__ = ["CompileMessages", "njit"]

_EVERY_S = 5.0  # between lines that are no bar
_BAR = 24


def njit(**options: Any) -> Any:
    """``numba.njit(cache=True, ...)`` for functions of this package.

    What was kept is used as long as the source file is the same and, unlike numba's own
    way, those that it takes other compiled functions and constants from: else a new
    version of the package would run parts of the old one.

    Args:
        options: numba's.

    Where nothing can be kept (an unwritable package and no home folder), loops are compiled
    anew by every process, and that is said once.
    """

    def decorate(function: Any) -> Any:
        _messages.known += 1
        try:
            compiled = numba.njit(**{"cache": True, **options})(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            _messages.nothing_kept()
            return numba.njit(**{**options, "cache": False})(function)
        kept = compiled._cache._cache_file
        kept._source_stamp = (kept._source_stamp, _sources(Path(function.__code__.co_filename)))
        return compiled

    return decorate


@cache
def _text(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@cache
def _sources(path: Path) -> str:
    """A hash of a file with compiled functions and of all such files that it imports."""
    root, seen, waiting = Path(__file__).parents[2], dict[Path, bytes](), [path]
    while waiting:
        file = waiting.pop()
        text = b"" if file in seen or file == Path(__file__) else _text(file)
        if b"njit" in text or b"numba" in text:
            seen[file] = text
            names = re.findall(rb"^from (xmcdist[\w.]+) import", text, re.MULTILINE)
            waiting += [root / f"{name.decode().replace('.', '/')}.py" for name in names]
    return hashlib.sha256(b"".join(seen[file] for file in sorted(seen))).hexdigest()


class CompileMessages(event.Listener):
    """Tells of loops of this package that are being compiled, not of those read from disk.

    Args:
        stream: where to; default standard error as it is at the time.
        quiet: say nothing.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.known = 0  # loops that the modules imported so far hold
        self.done = 0
        self._stream, self._quiet = stream, quiet
        self._open: list[float] = []  # when the loops being compiled were begun; one calls the other
        self._spent, self._said, self._warned = 0.0, 0.0, False

    def on_start(self, event: Any) -> None:
        """A loop is about to be compiled."""
        dispatcher = event.data["dispatcher"]
        if not _is_ours(dispatcher):
            return
        self._open.append(time.monotonic())
        self._show(dispatcher)

    def on_end(self, event: Any) -> None:
        """It is, or it failed."""
        if not _is_ours(event.data["dispatcher"]) or not self._open:
            return
        begun = self._open.pop()
        self.done += 1
        if not self._open:
            self._spent += time.monotonic() - begun
            if self._on_terminal():
                self._write("\r\x1b[K")

    def nothing_kept(self) -> None:
        """What is compiled cannot be written anywhere."""
        if not self._warned:
            self._warned = True
            self._write(
                "xmcdist: compiled kernels cannot be kept, so every start compiles them again: neither the package's "
                "folder nor the user's cache folder can be written; set NUMBA_CACHE_DIR to one that can\n"
            )

    def _show(self, dispatcher: Any) -> None:
        total, now = max(self.known, self.done + len(self._open)), time.monotonic()
        seconds = self._spent + (now - self._open[0])
        if self.done == 0 and len(self._open) == 1:
            where = f" (kept in {dispatcher.stats.cache_path})" if dispatcher.stats.cache_path else ""
            self._write(f"xmcdist: compiling kernels for this machine, once{where}\n")
            self._said = now
        if self._on_terminal():
            full = _BAR * self.done // total
            bar = "#" * full + "." * (_BAR - full)
            self._write(f"\r\x1b[Kcompiling [{bar}] {self.done}/{total} {dispatcher.__name__} {seconds:.0f} s")
        elif now - self._said >= _EVERY_S:
            self._write(f"xmcdist: compiling kernels: {self.done} of at most {total}, {seconds:.0f} s\n")
            self._said = now

    def _on_terminal(self) -> bool:
        return (self._stream or sys.stderr).isatty()

    def _write(self, text: str) -> None:
        if not self._quiet:
            print(text, end="", file=self._stream or sys.stderr, flush=True)


def _is_ours(dispatcher: Any) -> bool:
    return str(dispatcher.py_func.__module__).split(".")[0] == __name__.split(".")[0]


_messages = CompileMessages(quiet=rank_from_environment()[0] != 0)
event.register("numba:compile", _messages)  # type: ignore[no-untyped-call]
