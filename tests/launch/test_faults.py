"""One of four ranks dies, fails or hangs: the job ends with a clear word, or starts again by itself."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.launch import finish, kill_all, launch, rank_pid, start, start_node, wait_until
from tests.helpers.toy import TINY_RUN, write_text_folder

ARGS = [*TINY_RUN, "matcher.steps=[10,60]", "checkpoint.every_steps=5", "evaluation.linear_baseline=false"]
ENDS_WITHIN_S = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("faults") / "data")


def _args(data: Path, name: str) -> tuple[str, ...]:
    return (f"dataset.path={data}", f"run_dir={data.parent / name}", *ARGS)


def _metrics(data: Path, name: str) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((data.parent / name / "results.json").read_text())["metrics"]
    return metrics


def _saved(data: Path, name: str) -> bool:
    checkpoints = data.parent / name / "stages" / "match-2.partial" / "checkpoints"
    return any(checkpoints.glob("step-[0-9]*/state.json"))


@pytest.mark.distributed
@pytest.mark.slow
def test_with_restarts_a_killed_rank_costs_the_steps_since_the_checkpoint(data: Path) -> None:
    log = data.parent / "restarted.log"
    job = start_node(4, *_args(data, "restarted"), log=log, restarts=2)
    wait_until(job, log, lambda: _saved(data, "restarted"))
    os.kill(rank_pid(job, 2), signal.SIGKILL)
    finish(job, log)
    text = log.read_text()
    assert "match-1: done before, skipped" in text
    assert "match-2: going on at step" in text
    undisturbed = data.parent / "undisturbed.log"
    launch(1, "train", *_args(data, "undisturbed"), log=undisturbed)
    assert _metrics(data, "restarted") == pytest.approx(_metrics(data, "undisturbed"), abs=0.1)


@pytest.mark.distributed
@pytest.mark.slow
def test_without_restarts_the_job_ends_and_names_the_dead_rank(data: Path) -> None:
    log = data.parent / "killed.log"
    job = start(4, "train", *_args(data, "killed"), log=log)
    wait_until(job, log, lambda: _saved(data, "killed"))
    os.kill(rank_pid(job, 2), signal.SIGKILL)
    died = time.monotonic()
    try:
        code = job.wait(ENDS_WITHIN_S)
    finally:
        kill_all(job)
    assert code != 0, f"ended as if nothing had happened, {time.monotonic() - died:.0f} s later"
    root_cause = log.read_text().split("Root Cause")[1]
    assert "rank      : 2 " in root_cause
    assert "SIGKILL" in root_cause


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_the_collective_it_never_came_to(data: Path) -> None:
    log = data.parent / "hung.log"
    job = start(3, "train", *_args(data, "hung"), "engine.timeout_s=10", log=log)
    wait_until(job, log, lambda: _saved(data, "hung"))
    stopped = rank_pid(job, 1)
    os.kill(stopped, signal.SIGSTOP)  # neither dead nor alive: its connections stay open
    try:
        code = job.wait(2 * ENDS_WITHIN_S)  # the launcher gives a rank half a minute to end
    finally:
        kill_all(job)
    text = log.read_text()
    assert code != 0
    assert "did not complete after" in text, text[-3000:]
    line = next(row for row in text.splitlines() if "did not complete after" in row)
    assert line.startswith("xmcdist: rank "), line
    assert "  rank 1: gone; it was last " in text


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"), [("error", "KeyError: 'planted error'"), ("mistake", "xmcdist: rank 1: error: planted mistake")]
)
def test_a_rank_that_fails_alone_ends_the_job_with_its_own_words(data: Path, fault: str, said: str) -> None:
    log = data.parent / f"{fault}.log"
    job = start(2, "train", *_args(data, fault), log=log, module="tests.helpers.broken_rank", FAULT=fault)
    try:
        code = job.wait(ENDS_WITHIN_S)
    finally:
        kill_all(job)
    text = log.read_text()
    assert code != 0
    assert text.count(said) == 1, text[-3000:]
    # A traceback is for our errors, not for a person's.
    assert ("xmcdist/pipelines/train.py" in text) is (fault == "error")
