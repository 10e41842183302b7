"""Trackers really written and read back with the readers of their makers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from xmcdist.config.errors import UserError
from xmcdist.config.schema import TrackerConfig
from xmcdist.observability.log import RunLog
from xmcdist.observability.trackers import Tracker, check_trackers, open_tracker, tell
from xmcdist.parallel.launch import World

HARDEST = [{"cluster": 3, "labels": "tea | pot", "misses": 7}, {"cluster": 9, "labels": "kettle", "misses": 2}]


def _run(folder: Path, steps: range, *use: str) -> RunLog:
    """One start of a run: windows, a histogram, a table, facts."""
    cfg = TrackerConfig(use=list(use), tags=["t"])
    log = RunLog(folder, World.single())
    for name in use:
        log.track(partial(open_tracker, name, cfg, folder, {"tree": {"nr_splits": 16}}), name)
    log.histogram("label_frequency", [3, 4, 1], [0, 1, 2, 4])
    for step in steps:
        log.metrics({"global_step": step, "level": 1, "step": step, "total": 9, "loss": 1 / step, "lr": 0.1})
        if step == 6:
            log.metrics({"global_step": 6, "level": 1, "beam_recall": 0.5, "hardest_clusters": HARDEST})
    log.metrics({"stage": "tree", "seconds": 1.5})
    log.metrics({"test": {"P@1": 50.0, "head/P@1": 40.0}})
    log.close()
    return log


def _trackio(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    with sqlite3.connect(next(folder.glob("trackio/*.db"))) as db:
        rows = db.execute("SELECT step, metrics, run_id, run_name FROM metrics ORDER BY id").fetchall()
    assert {row[2] for row in rows} == {rows[0][2]}  # one run, through both starts
    assert rows[0][3] == folder.name
    return [(step, json.loads(metrics)) for step, metrics, _, _ in rows]


def _wandb(folder: Path) -> list[dict[str, Any]]:
    """All records of all starts, as ``wandb leet inspect`` prints them."""
    rows: list[dict[str, Any]] = []
    for place in sorted((folder / "wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows += [json.loads(line) for line in done.stdout.splitlines()]
    return rows


@pytest.mark.filterwarnings("ignore")
def test_all_three_at_once_draw_one_curve_through_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    folder.mkdir()
    for steps in (range(1, 7), range(4, 10)):  # killed after 6, went on from a checkpoint at 3
        _run(folder, steps, "wandb", "tensorboard", "trackio")
        assert int((folder / "wandb-step").read_text()) == steps[-1]  # what came later would be given again
    want = [(step, 1 / step) for step in range(1, 10)]

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    got = [(e.step, e.value) for e in board.Scalars("train/loss")]
    assert [s for s, _ in got] == [s for s, _ in want]
    assert [v for _, v in got] == pytest.approx([v for _, v in want])
    assert [e.step for e in board.Scalars("loss/level-1")] == list(range(1, 10))
    assert board.Scalars("test/head/P@1")[-1].value == 40
    assert board.Scalars("stages/tree/seconds")[0].value == 1.5
    texts = {tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in board.Tags()["tensors"]}
    assert "tea \\| pot" in texts["hardest_clusters/level-1/text_summary"]
    assert '"nr_splits": 16' in texts["config/text_summary"]
    histogram = board.Histograms("shapes/label_frequency")
    assert len(histogram) == 1
    assert histogram[0].histogram_value.bucket == [3, 4, 1]
    assert histogram[0].histogram_value.bucket_limit == [1, 2, 4]

    rows = _trackio(folder)
    assert [(step, row["train/loss"]) for step, row in rows if "train/loss" in row] == want
    assert [row["test/P@1"] for _, row in rows if "test/P@1" in row][-1] == 50
    tables = [row["hardest_clusters/level-1"] for _, row in rows if "hardest_clusters/level-1" in row]
    assert len(tables) == 1
    assert tables[0]["_value"] == HARDEST
    shapes = [row["shapes/label_frequency"] for _, row in rows if "shapes/label_frequency" in row]
    assert [shape["values"] for shape in shapes] == [[3, 4, 1]]

    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    ids = {place.name.split("-")[-1] for place in (folder / "wandb").glob("offline-run-*")}
    assert ids == {(folder / "wandb-id").read_text()}
    records = _wandb(folder)
    points = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(point["_step"], point["train/loss"]) for point in points if "train/loss" in point] == want
    assert all(point["global_step"] == point["_step"] for point in points)
    assert [point["_step"] for point in points if "hardest_clusters/level-1._type" in point] == [6]
    axes = [record["metric"] for record in records if record["type"] == "metric"]
    assert any(axis.get("step_metric") == "global_step" for axis in axes)
    facts = [record["summary"]["update"] for record in records if record["type"] == "summary"]
    assert {"test/P@1": 50, "test/head/P@1": 40}.items() <= {k: v for fact in facts for k, v in fact.items()}.items()


def test_a_tracker_that_is_new_to_a_run_is_given_what_came_before(tmp_path: Path) -> None:
    _run(tmp_path, range(1, 5))
    _run(tmp_path, range(3, 8), "trackio")
    steps = [step for step, row in _trackio(tmp_path) if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def test_a_tracker_that_may_have_lost_rows_is_given_those_again(tmp_path: Path) -> None:
    _run(tmp_path, range(1, 9))
    tracker = _Recorder()
    tracker.lacks_after = 6
    RunLog(tmp_path, World.single()).track(lambda: tracker, "it")
    assert [step for kind, step, _ in tracker.seen if kind == "points"] == [7, 8]
    assert [name for kind, _, name in tracker.seen if kind in ("histogram", "table")] == []  # of steps 0 and 6
    assert ("facts", 8, {"test/P@1": 50.0, "test/head/P@1": 40.0}) in tracker.seen


def test_trackio_asks_nobody_and_outlives_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process may open no socket, and Slurm's signals to a step do not end it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, socket\n"
        "def refuse(*args, **kwargs):\n"
        f"    pathlib.Path({str(tmp_path / 'asked')!r}).write_text(repr(args))\n"
        "    raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
        f"pathlib.Path({str(tmp_path / 'guarded')!r}).touch()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_something")  # with which it would look up the user's name
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")  # and send there
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    tracker: Any = open_tracker("trackio", TrackerConfig(), run, {})
    tracker.points(1, {"train/loss": 1.0})
    while not list(run.glob("trackio/*.db")):
        assert tracker._child.poll() is None
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(tracker._child.pid, number)
    tracker.points(2, {"train/loss": 0.5})
    tracker.close()
    assert [(step, row["train/loss"]) for step, row in _trackio(run)] == [(1, 1.0), (2, 0.5)]
    assert (tmp_path / "guarded").exists()
    assert not (tmp_path / "asked").exists()


class _Recorder:
    """A tracker that remembers, and fails when told to."""

    name, note = "recorder", "how it started"
    lacks_after: int | None = -1

    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[Any] = []
        self.fails_at, self.closed = fails_at, 0

    def points(self, step: int, values: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("the network is down")
        self.seen.append(("points", step, dict(values)))

    def facts(self, step: int, values: Any) -> None:
        self.seen.append(("facts", step, dict(values)))

    def table(self, step: int, name: str, rows: Any) -> None:
        self.seen.append(("table", step, name))

    def histogram(self, step: int, name: str, counts: Any, edges: Any) -> None:
        self.seen.append(("histogram", step, name))

    def close(self, failed: bool = False) -> None:
        self.closed += 1


def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = _Recorder(fails_at=2), _Recorder()
    log = RunLog(tmp_path, World.single())

    def no_start() -> Tracker:
        raise OSError("no space left")

    log.track(no_start, "wandb")
    log.track(lambda: bad, "bad")
    log.track(lambda: good, "good")
    for step in (1, 2, 3):
        log.metrics({"global_step": step, "loss": 0.5})
    log.close()
    said = capsys.readouterr().err
    assert said.count("warning: recorder failed and is given nothing more; the run goes on: the network is down") == 1
    assert said.count("wandb does not start, so this run goes without it: no space left") == 1
    assert said.count("how it started") == 2
    assert [step for _, step, _ in bad.seen] == [1]
    assert [step for _, step, _ in good.seen] == [1, 2, 3]
    assert (bad.closed, good.closed) == (1, 1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_outlives_trackio_s_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, World.single())
    log.track(partial(open_tracker, "trackio", TrackerConfig(), tmp_path, {}), "trackio")
    child: Any = log.trackers[0]
    child._child.kill()
    child._child.wait()
    for step in (1, 2):
        log.metrics({"global_step": step, "loss": 0.5})
    log.close()
    assert capsys.readouterr().err.count("trackio failed and is given nothing more") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_other_ranks_open_and_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, World(1, 2, 1, 2, "cpu"))
    log.track(partial(open_tracker, "trackio", TrackerConfig(), tmp_path, {}), "trackio")
    log.metrics({"global_step": 1, "loss": 1.0})
    log.histogram("label_frequency", [1], [0, 1])
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "want"),
    [
        (
            {"time": 5.0, "global_step": 8, "level": 2, "step": 3, "total": 9, "loss": 0.5, "mfu_percent": None},
            [("points", 8, {"train/loss": 0.5, "train/level": 2.0, "loss/level-2": 0.5})],
        ),
        (
            {"global_step": 8, "level": 2, "step": 3, "validation_beam_recall": 0.5, "validation_P@1": 0.25},
            [("points", 8, {"validation/beam_recall": 0.5, "validation/P@1": 0.25})],
        ),
        (
            {"global_step": 8, "level": 2, "beam_recall": 0.5, "hardest_clusters": HARDEST},
            [("table", 8, "hardest_clusters/level-2"), ("points", 8, {"train/level_beam_recall": 0.5})],
        ),
        ({"global_step": 8, "level": 2, "beam_recall": 1.0, "hardest_clusters": []}, None),
        ({"stage": "tree", "seconds": 2}, [("facts", 7, {"stages/tree/seconds": 2.0})]),
        (
            {"stage": "rank-2", "level": 2, "ranker_cpu_s": 3.0, "ranker_balance": 1.5},
            [("facts", 7, {"stages/rank-2/ranker_cpu_s": 3.0, "stages/rank-2/ranker_balance": 1.5})],
        ),
        (
            {"test": {"tail/P@1": 5.0}, "test_linear_only": {"P@1": 4}},
            [("facts", 7, {"test/tail/P@1": 5.0}), ("facts", 7, {"test_linear_only/P@1": 4.0})],
        ),
        ({"histogram": "x/level-1", "edges": [0, 1], "counts": [4]}, [("histogram", 7, "shapes/x/level-1")]),
        ({"preempted": True}, []),
    ],
)
def test_rows_get_the_names_that_dashboards_group_by(row: dict[str, Any], want: list[Any] | None) -> None:
    tracker = _Recorder()
    tell(tracker, row, 7)
    assert tracker.seen == ([("points", 8, {"train/level_beam_recall": 1.0})] if want is None else want)


@pytest.mark.parametrize(
    ("name", "extra"), [("trackio", "xmcdist[trackio]"), ("tensorboard", "xmcdist[tensorboard]"), ("wandb", "wandb")]
)
def test_what_is_not_installed_is_refused_with_what_to_install(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Callable[[str], Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else find(module))
    with pytest.raises(UserError, match=f"{name} is not installed here: run pip install '{extra}'".replace("[", r"\[")):
        check_trackers(TrackerConfig(use=["tensorboard", "trackio", "wandb"]))


def test_wandb_online_needs_a_key_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    online = TrackerConfig(use=["wandb"], mode="online")
    (tmp_path / ".netrc").write_text("machine example.org login user password x\n")
    with pytest.raises(UserError, match=r"no Weights & Biases key for api\.wandb\.ai .* wandb login"):
        check_trackers(online)
    check_trackers(TrackerConfig(use=["wandb"]))  # offline needs none
    check_trackers(TrackerConfig(mode="online"))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    check_trackers(online)
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    check_trackers(online)
