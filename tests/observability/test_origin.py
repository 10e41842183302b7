"""Where a result comes from: what is told can be pasted, and is true."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from xmcdist.observability import origin


def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["xmcdist train", "dataset.path=my data", "matcher.steps=[1,2]"])
    said = origin.command_line()
    assert shlex.split(said) == ["python", "-m", "xmcdist", "train", "dataset.path=my data", "matcher.steps=[1,2]"]
    monkeypatch.setattr("sys.argv", ["/my tools/run.py", "x"])
    assert shlex.split(origin.command_line()) == ["/my tools/run.py", "x"]


def test_the_commit_is_that_of_the_checkout_and_tells_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / "xmcdist" / "observability").mkdir(parents=True)
    file = tmp_path / "xmcdist" / "observability" / "origin.py"
    file.write_text("1")
    monkeypatch.setattr(origin, "__file__", str(file))
    assert origin.git_commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag is no commit")
    assert origin.git_commit() == git("rev-parse", "HEAD").strip()
    file.write_text("2")
    assert origin.git_commit() == git("rev-parse", "HEAD").strip() + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert origin.git_commit() is None


def test_the_machine_is_told_in_words() -> None:
    said = origin.hardware()
    assert all(said.values())
    assert f", {len(os.sched_getaffinity(0))} cores" in said["processor"]
    assert said["host"] == os.uname().nodename
