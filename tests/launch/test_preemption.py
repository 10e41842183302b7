"""Signals: the run ends in good order, with a checkpoint that all ranks agreed on, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.launch import ROOT, finish, kill_all, launch, rank_pid, start, wait_until
from tests.helpers.ranks import on_ranks
from tests.helpers.toy import TINY_RUN, write_text_folder
from tests.training import problem
from tests.training.problem import Hooks, Setting
from xmcdist.parallel.collectives import gather_objects
from xmcdist.parallel.launch import World
from xmcdist.pipelines.interruptible import InterruptibleStages
from xmcdist.training import preemption
from xmcdist.training.loop import train_level
from xmcdist.training.preemption import Preempted

pytestmark = pytest.mark.waiting

ENDS_WITHIN_S = 240  # far more than it takes: for machines that are busy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("preempted") / "data")


def _steps(run: Path) -> int:
    """Steps of level 2 that a run has logged."""
    try:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    return max((row["step"] for row in rows if row.get("level") == 2 and "step" in row), default=0)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint_and_the_same_result(data: Path) -> None:
    args = [*TINY_RUN, "encoder.dropout=0.1", "matcher.steps=[6,30]", "checkpoint.every_steps=0"]
    args += ["evaluation.linear_baseline=false", "until=match", "matcher.max_clusters=8", f"dataset.path={data}"]
    run, log = data.parent / "signalled", data.parent / "signalled.log"
    job = start(2, "train", *args, f"run_dir={run}", log=log)
    wait_until(job, log, lambda: _steps(run) >= 5)
    os.kill(rank_pid(job, 1), signal.SIGUSR1)
    try:
        code = job.wait(ENDS_WITHIN_S)
    finally:
        kill_all(job)
    text = log.read_text()
    assert code != 0  # the launcher's own; scripts go by the mark
    assert "Traceback" not in text.split("Root Cause")[0].split("torch/distributed")[0], text[-3000:]
    assert "exitcode  : 75" in text
    mark = json.loads((run / "preempted.json").read_text())
    assert (mark["signal"], mark["stage"], list(mark)) == ("SIGUSR1", "match-2", ["signal", "stage", "step", "time"])
    assert (run / "stages" / "match-2.partial" / "checkpoints" / f"step-{mark['step']}" / "state.json").exists()
    assert f"ended in match-2, saved at step {mark['step']}, as SIGUSR1 asked" in text

    launch(2, "train", *args, f"run_dir={run}", log=log)
    assert f"match-2: going on at step {mark['step']}" in log.read_text()
    assert not (run / "preempted.json").exists()
    undisturbed = data.parent / "undisturbed"
    launch(2, "train", *args, f"run_dir={undisturbed}", log=log)
    for name in ("match-2/head.npy", "match-2/E.npy"):
        got, want = (np.load(where / "stages" / name) for where in (run, undisturbed))
        assert np.allclose(got, want, rtol=0, atol=1e-6), name


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(data: Path) -> None:
    run, log = data.parent / "interrupted", data.parent / "interrupted.log"
    args = ("train", f"dataset.path={data}", f"run_dir={run}", *TINY_RUN, "encoder=none", "until=linear")
    job = start(1, *args, log=log)
    wait_until(job, log, lambda: (run / "config.json").exists())
    job.send_signal(signal.SIGINT)
    assert job.wait(ENDS_WITHIN_S) == 130, log.read_text()
    text = log.read_text()
    assert text.endswith("xmcdist: interrupted; the same command goes on from what is saved\n")
    assert "Traceback" not in text
    finish(start(1, *args, log=log), log)


class _Signalled(Hooks):
    """The last rank gets a signal after the second step; the others know nothing of it."""

    def __init__(self, me: bool) -> None:
        super().__init__()
        self.me = me

    def log(self, values: dict[str, Any]) -> None:
        super().log(values)
        if self.me and values["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while preemption.received() is None:
                time.sleep(0.001)


@on_ranks(3)
def test_all_ranks_leave_a_level_at_the_same_step_and_go_on_bit_for_bit(rank: int, world_size: int) -> None:
    setting = Setting(micro_batch=2, dropout=0.2, steps=6)

    def train(hooks: Hooks, resume: dict[str, Any] | None = None) -> list[float]:
        engine, head = problem.engine(setting, rank, world_size), problem.head(rank, world_size)
        return train_level(engine, problem.encoder(setting), head, problem.task(setting), hooks, resume).losses

    hooks = _Signalled(rank == world_size - 1)
    with preemption.handled(rank), pytest.raises(Preempted) as caught:
        train(hooks)
    error = caught.value
    assert (error.signal, error.stage, error.step) == ("SIGTERM", "match-2", 3)
    ((step, state),) = hooks.saved
    assert step == 3
    assert train(Hooks(), {"step": step, **state}) == train(Hooks())[3:]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@on_ranks(2)
def test_a_signal_in_a_stage_waits_for_its_end_and_the_next_does_not_begin(
    rank: int, world_size: int, tmp_path: Path
) -> None:
    said: list[str] = []
    stages = InterruptibleStages(tmp_path, World(rank, world_size, rank, world_size, "cpu"), lambda _: None)

    def first(folder: Path) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
            while preemption.received() is None:
                time.sleep(0.001)
        if rank == 0:
            (folder / "work").write_text("done")

    def second(folder: Path) -> None:
        raise AssertionError("it was not to begin")

    with preemption.handled(rank):
        preemption.begin(tmp_path, said.append)
        stages.run("first", {}, first)
        with pytest.raises(Preempted, match="ended before second, as SIGUSR2 asked"):
            stages.run("second", {}, second)
    assert (tmp_path / "stages" / "first" / "work").read_text() == "done"
    told = gather_objects(said)
    assert told[0] == []
    assert len(told[1]) == 1
    assert "SIGUSR2 received: the run ends when stage first is committed" in told[1][0]


SLEEPER = """
import sys, time
from pathlib import Path
from xmcdist.training import preemption
preemption._COPIES_WITHIN_S = 0.5
with preemption.handled():
    preemption.begin(Path(sys.argv[1]), lambda text: print(text, flush=True))
    preemption.where("rank-2", "stage rank-2 is committed")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_copies_of_a_signal_are_one_and_a_second_ends_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLEEPER, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGUSR1)
    said = job.stdout.readline()  # though the main thread does not come back
    assert said == ("SIGUSR1 received: the run ends when stage rank-2 is committed; a second signal ends it at once\n")
    job.send_signal(signal.SIGUSR1)  # the launcher's copy
    time.sleep(0.7)
    assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=ENDS_WITHIN_S)
    assert job.returncode == 75
    assert "SIGTERM received again: ended at once" in said
    assert json.loads((tmp_path / "preempted.json").read_text())["stage"] == "rank-2"


def test_handlers_are_put_back_and_another_thread_changes_nothing() -> None:
    before = [signal.getsignal(s) for s in (*preemption.SIGNALS, signal.SIGINT)]
    with preemption.handled():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        os.kill(os.getpid(), signal.SIGUSR1)
        while preemption.received() is None:
            time.sleep(0.001)
    assert [signal.getsignal(s) for s in (*preemption.SIGNALS, signal.SIGINT)] == before
    assert preemption.received() is None

    seen = []

    def elsewhere() -> None:
        with preemption.handled():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == before[:1]


def test_a_forked_child_keeps_its_own_signals() -> None:
    with preemption.handled():
        ready, say = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(say, b".")
            time.sleep(60)
            os._exit(0)
        assert os.read(ready, 1) == b"."
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert preemption.received() is None
