"""xmcdist board, as a person starts it, on loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from xmcdist.config.errors import UserError
from xmcdist.observability.board import choose

ROOT = Path(__file__).parents[2]


def _metrics(run: Path) -> Path:
    run.mkdir()
    rows = [{"time": 1.0, "global_step": s, "level": 1, "step": s, "total": 4, "loss": 1 / s} for s in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def _start(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "xmcdist", "board", *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(command, **streams, env=env, cwd=ROOT, preexec_fn=_heed_ctrl_c)
    assert isinstance(job, subprocess.Popen)
    return job


def _heed_ctrl_c() -> None:
    """A shell's background jobs ignore it, and so would the board when the tests are such a job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _get(url: str) -> bytes:
    """Without a proxy that the environment may name."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=30) as answer:
        body: bytes = answer.read()
        return body


@pytest.mark.parametrize("use", ["trackio", "tensorboard"])
def test_any_run_is_shown_on_loopback_until_ctrl_c(tmp_path: Path, use: str) -> None:
    run = _metrics(tmp_path / "run")
    job = _start(f"run_dir={run}", "--use", use, "--no-browser")
    try:
        assert job.stdout is not None
        said = ""
        while "dashboard at" not in said:
            line = job.stdout.readline()
            assert line, said
            said += line
        found = re.search(r"dashboard at (http://(?:127\.0\.0\.1|localhost):\d+/)", said)
        assert found, said
        assert "3 rows of metrics.jsonl as they are now" in said
        assert b"<html" in _get(found[1]).lower()
        if use == "tensorboard":
            tags: dict[str, object] = {}
            deadline = time.monotonic() + 180
            while not tags and time.monotonic() < deadline:
                tags = json.loads(_get(found[1] + "data/plugin/scalars/tags"))
            assert "train/loss" in json.dumps(tags)
        job.send_signal(signal.SIGINT)
        rest, _ = job.communicate(timeout=180)
        assert job.returncode == 0, rest
        assert "Traceback" not in rest
    finally:
        job.kill()
        job.wait()
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_a_folder_without_metrics_is_one_clear_line(tmp_path: Path) -> None:
    job = _start(str(tmp_path))
    said, _ = job.communicate(timeout=180)
    assert job.returncode == 2
    assert said.startswith(f"xmcdist: error: {tmp_path} holds no metrics.jsonl")
    assert len(said.splitlines()) == 1


def test_a_run_is_shown_in_what_it_was_tracked_in(tmp_path: Path) -> None:
    run = _metrics(tmp_path / "run")
    assert choose([run], None) == ("trackio", None)
    for name in ("tensorboard", "trackio"):  # trackio first where there are both
        (run / name).mkdir()
        (run / name / "file").touch()
        assert choose([run], None) == (name, run / name)
    assert choose([run], "tensorboard") == ("tensorboard", run / "tensorboard")
    assert choose([run, _metrics(tmp_path / "other")], None) == ("trackio", None)  # together: brought into one


def test_without_a_dashboard_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _metrics(tmp_path / "run")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    assert choose([run], None) == ("tensorboard", None)
    with pytest.raises(UserError, match=r"trackio is not installed here: run pip install 'xmcdist\[trackio\]'"):
        choose([run], "trackio")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no dashboard is installed here: run pip install 'xmcdist\[trackio\]'"):
        choose([run], None)
