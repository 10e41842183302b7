"""A rank or a node dies, fails or hangs: the job ends with a clear word, or starts again by itself."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.launch import finish, free_port, kill_all, launch, rank_pid, start, start_node, wait_until
from tests.helpers.toy import TINY_RUN, write_text_folder

pytestmark = pytest.mark.waiting

ARGS = [*TINY_RUN, "matcher.steps=[10,60]", "checkpoint.every_steps=5", "evaluation.linear_baseline=false"]
ENDS_WITHIN_S = 240  # far more than it takes: for machines that are busy


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
        code = job.wait(ENDS_WITHIN_S)  # the launcher gives a rank half a minute to end
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


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("held", [False, True], ids=["interpreter free", "interpreter held"])
def test_a_rank_whose_data_do_not_come_ends_the_job_and_says_what_it_read(data: Path, held: bool) -> None:
    name = "stalled-held" if held else "stalled"
    log = data.parent / f"{name}.log"
    fault = {"module": "tests.helpers.broken_rank", "FAULT": "stall-held" if held else "stall"}
    job = start(2, "train", *_args(data, name), log=log, **fault)
    try:
        code = job.wait(ENDS_WITHIN_S)
    finally:
        kill_all(job)
    text = log.read_text()
    assert code != 0
    if held:  # no Python runs in that rank any more: its stacks, and what it had told the others
        stack = text.split("Timeout (0:00:12)!")[1]
        assert "in _stalled" in stack
        assert "in _micro_loss" in stack
        assert "  rank 1: gone; it was last in data loading (level 1, step 2) since 1" in text
        return
    said = text.split("xmcdist: rank 1 on ")[1]
    assert said.split(": ", 1)[1].startswith("level 1, step 2: its data have not come within 2 s. It was reading ")
    assert f"{data.parent / name}/stages/tokens/tokens.trn/shard-00000.tokens.npy, or the candidates" in said
    assert "raise engine.data_timeout_s" in said
    assert "in _stalled\n" in said
    assert "rank 0 on" not in text


@pytest.mark.distributed
@pytest.mark.slow
def test_the_head_nodes_launcher_is_killed_and_nothing_is_left_behind(data: Path) -> None:
    args = (*_args(data, "headless"), "until=match", "matcher.max_clusters=8")
    logs = [data.parent / f"node-{i}.log" for i in range(2)]
    port = str(free_port())
    jobs = [
        start_node(1, *args, log=logs[i], SLURM_NNODES="2", SLURM_NODEID=str(i), MASTER_PORT=port) for i in range(2)
    ]
    try:
        wait_until(jobs[0], logs[0], lambda: _saved(data, "headless"))
        ranks = [rank_pid(jobs[i], i) for i in range(2)]
        jobs[0].kill()
        deadline = time.monotonic() + ENDS_WITHIN_S
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < deadline, [log.read_text()[-2000:] for log in logs]
            time.sleep(0.05)
        assert jobs[1].wait(ENDS_WITHIN_S) != 0
    finally:
        for job in jobs:
            kill_all(job)
    assert (
        f"the launcher of this machine (process {jobs[0].pid}) is gone. The same command goes on" in logs[0].read_text()
    )
    told = logs[1].read_text()
    assert "xmcdist: rank 1" in told
    assert "(rank 0, or its launcher) is gone" in told or "rank 0: gone" in told, told[-3000:]

    again = data.parent / "again.log"
    launch(1, "train", *args, log=again)
    assert "match-2: going on at step" in again.read_text()
