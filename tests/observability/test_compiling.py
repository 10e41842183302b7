"""Kernels that are compiled are told of, those read from disk are not."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from xmcdist.observability import compiling

_ROOT = Path(__file__).parents[2]
_CALL = (
    "import numpy as np; from xmcdist.trees.halving import rearrange; "
    "rearrange(np.arange(3, dtype=np.uint32), np.zeros(3, dtype=np.uint8), np.empty(4, dtype=np.uint32)); print('done')"
)


def _run(cache: Path | None, root: Path = _ROOT, **more: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(root), **more}
    env.pop("NUMBA_CACHE_DIR", None)
    if cache is not None:
        env["NUMBA_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, "-c", _CALL], env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    return done.stderr


def test_the_first_start_tells_and_the_second_has_nothing_to_tell(tmp_path: Path) -> None:
    first = _run(tmp_path)
    assert first.startswith(f"xmcdist: compiling kernels for this machine, once (kept in {tmp_path}")
    assert _run(tmp_path) == ""


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    assert _run(tmp_path, RANK="1", WORLD_SIZE="2") == ""


def test_a_package_nobody_may_write_to_keeps_kernels_with_the_user(tmp_path: Path) -> None:
    """A file stands where numba would make a folder: that stops the superuser as well."""
    package = tmp_path / "site"
    shutil.copytree(_ROOT / "xmcdist", package / "xmcdist", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "xmcdist" / "trees" / "__pycache__").write_text("")
    home = tmp_path / "home"
    home.mkdir()
    first = _run(None, package, HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
    assert f"(kept in {home}" in first
    assert _run(None, package, HOME=str(home), XDG_CACHE_HOME=str(home / "cache")) == ""
    (tmp_path / "file").write_text("")
    nowhere = _run(None, package, HOME=str(tmp_path / "file"), XDG_CACHE_HOME=str(tmp_path / "file" / "cache"))
    assert nowhere.count("compiled kernels cannot be kept") == 1
    assert "set NUMBA_CACHE_DIR" in nowhere


def test_a_new_version_of_a_callee_in_another_file_is_compiled_again(tmp_path: Path) -> None:
    package = tmp_path / "xmcdist"
    shutil.copytree(_ROOT / "xmcdist", package, ignore=shutil.ignore_patterns("__pycache__"))
    head = "from xmcdist.observability.compiling import njit\n"
    (package / "callee.py").write_text(f"{head}@njit()\ndef number():\n    return 1\n")
    (package / "caller.py").write_text(
        f"from xmcdist.callee import number\n{head}@njit()\ndef answer():\n    return number() + 40\n"
    )
    code = "from xmcdist.caller import answer; print(answer())"

    def call() -> tuple[str, str]:
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout, done.stderr

    assert call()[0] == "41\n"
    assert call() == ("41\n", "")
    (package / "callee.py").write_text(f"{head}@njit()\ndef number():\n    return 2\n")
    assert call()[0] == "42\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _event(name: str, module: str = "xmcdist.trees.halving") -> SimpleNamespace:
    function = SimpleNamespace(__module__=module)
    stats = SimpleNamespace(cache_path="/cache")
    return SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=function, stats=stats, __name__=name)})


def test_a_bar_on_a_terminal_counts_and_goes_away() -> None:
    stream = _Terminal()
    messages = compiling.CompileMessages(stream)
    messages.known = 4
    for name in ("outer", "inner"):  # the one calls the other
        messages.on_start(_event(name))
    messages.on_end(_event("inner"))
    messages.on_end(_event("outer"))
    messages.on_start(_event("third"))
    said = stream.getvalue()
    assert said.count("xmcdist: compiling kernels for this machine, once (kept in /cache)\n") == 1
    assert "0/4 inner" in said
    assert "[############............] 2/4 third 0 s" in said
    messages.on_end(_event("third"))
    assert stream.getvalue().endswith("\r\x1b[K")


def test_lines_elsewhere_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(compiling.time, "monotonic", lambda: now[0])
    messages = compiling.CompileMessages(stream)
    messages.known = 30
    for i in range(30):
        messages.on_start(_event(f"kernel{i}"))
        now[0] += 1
        messages.on_end(_event(f"kernel{i}"))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[1] == "xmcdist: compiling kernels: 5 of at most 30, 5 s"


def test_loops_of_other_packages_are_not_told() -> None:
    stream = io.StringIO()
    messages = compiling.CompileMessages(stream)
    messages.on_start(_event("theirs", "numba.np.arraymath"))
    messages.on_end(_event("theirs", "numba.np.arraymath"))
    assert stream.getvalue() == ""
    assert messages.done == 0
