"""Real jobs on a real Slurm: time limits, pre-emption, crashes, chains of jobs, sweeps.

They need the Slurm of slurm/local/test.sh, and minutes: that script is their only way to run.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import LINEAR, SHIPPED, TWO_BY_TWO, Job, removed_afterwards, run, submit

WANDB_INSPECT = ("python", "-m", "wandb", "leet", "inspect", "--json")

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(autouse=True)
def queue() -> Iterator[None]:
    assert "SLURM_CONF" in os.environ, "start these by: bash slurm/local/test.sh"
    with removed_afterwards():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, Any]:
    """Metrics of two nodes of two processes that nobody disturbs."""
    with removed_afterwards():
        job = submit(folder, "undisturbed", *SHIPPED)
        results = job.finish()
        assert job.show("Restarts") == "0"
        logs = sorted(p.relative_to(job.run_dir).parts for p in job.run_dir.glob("logs/*/*/*/*/*/stderr.log"))
        assert [(p[1], p[2], p[5]) for p in logs] == [
            (f"{job.id}-0", f"node-{node}", str(rank)) for node in (0, 1) for rank in (0, 1)
        ]
    return results


def test_two_nodes_of_two_processes(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["world_size"] == 4
    assert undisturbed["metrics"]["P@1"] > 25


def _same_metrics(results: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    assert results["metrics"] == pytest.approx(undisturbed["metrics"], abs=0.1)
    assert results["baseline"] == pytest.approx(undisturbed["baseline"], abs=0.1)


def _one_curve(job: Job) -> None:
    """No optimizer step twice, none left out, in metrics.jsonl and every tracker."""
    steps = [row["global_step"] for row in job.rows() if "loss" in row and "level" in row]
    assert steps == sorted(set(steps))
    assert set(range(25, 1021, 5)) <= set(steps)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(job.run_dir / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("train/loss")] == steps

    with sqlite3.connect(next(job.run_dir.glob("trackio/*.db"))) as db:
        rows = db.execute("SELECT step, metrics, run_id FROM metrics ORDER BY id").fetchall()
    assert len({run_id for _, _, run_id in rows}) == 1
    assert [step for step, metrics, _ in rows if "train/loss" in json.loads(metrics)] == steps

    starts = sorted((job.run_dir / "wandb").glob("offline-run-*"))
    assert len(starts) == 2
    assert {place.name.split("-")[-1] for place in starts} == {(job.run_dir / "wandb-id").read_text()}
    # A pre-emption ends wandb's own process, too; what it had not written is given to it again.
    records = [json.loads(line) for p in starts for line in run(*WANDB_INSPECT, str(p)).splitlines()]
    points = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert {point["_step"] for point in points if "train/loss" in point} == set(steps)


def _saved_by(job: Job, signal: str) -> None:
    """The log tells that this signal ended the first attempt at a checkpoint, from which the second went on."""
    text = job.log.read_text()
    assert re.search(rf"ended in match-2, saved at step \d+, as {signal} asked", text), text[-4000:]
    assert re.search(r"match-2: going on at step \d+", text)
    assert "attempt 0" in job.launches()
    assert "attempt 1" in job.launches()
    assert job.launches().count("crash of job") == 0
    assert job.show("Restarts") == "1"


@pytest.mark.filterwarnings("ignore")
def test_a_time_limit_ends_in_a_checkpoint_and_a_requeue(folder: Path, undisturbed: dict[str, Any]) -> None:
    options = [*TWO_BY_TWO, "--signal=B:USR1@90"]
    job = submit(folder, "limit", *SHIPPED, "tracker=all", options=options, XMCDIST_GRACE_S="70")
    job.wait(lambda: job.steps(2) >= 10, "steps")
    hours, minutes, _ = map(int, job.show("RunTime").split(":"))
    # Slurm looks every half minute, so the signal comes within that, and there is a minute to save.
    run("scontrol", "update", f"jobid={job.id}", f"TimeLimit={60 * hours + minutes + 2}")
    job.wait(lambda: job.show("Restarts") == "1", "requeue")
    assert json.loads((job.run_dir / "preempted.json").read_text())["signal"] == "SIGUSR1"
    run("scontrol", "update", f"jobid={job.id}", "TimeLimit=60")
    _same_metrics(job.finish(), undisturbed)
    _saved_by(job, "SIGUSR1")
    assert not (job.run_dir / "preempted.json").exists()
    _one_curve(job)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("partition", ["main", "graced"])
def test_a_job_that_is_more_urgent_pre_empts_it_and_it_comes_back(
    folder: Path, undisturbed: dict[str, Any], partition: str
) -> None:
    job = submit(
        folder, f"preempted-{partition}", *SHIPPED, "tracker=all", options=[*TWO_BY_TWO, f"--partition={partition}"]
    )
    job.wait(lambda: job.steps(2) >= 10, "steps")
    urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"]
    run("sbatch", "--parsable", *urgent)
    job.wait(lambda: job.show("Restarts") == "1", "pre-emption")
    _same_metrics(job.finish(), undisturbed)
    _saved_by(job, "SIGTERM")
    _one_curve(job)


def test_the_stages_as_five_jobs(folder: Path, undisturbed: dict[str, Any]) -> None:
    command = ["slurm/pipeline.sh", "--name", "chain", "--cpu", "--time=60", "--gpu", "--nodes=2 --time=60"]
    told = run(*command, *SHIPPED, XMCDIST_RUNS=str(folder), SBATCH_OUTPUT=str(folder / "chain-%x.log"))
    jobs = re.findall(r"^job (\d+): (\w+)$", told, re.MULTILINE)
    assert [stage for _, stage in jobs] == ["tree", "linear", "match", "rank", "end"]
    last = Job(jobs[-1][0], folder / "chain", folder / "chain-chain-end.log")
    assert last.show("Dependency").startswith(f"afterok:{jobs[-2][0]}")
    results = last.finish()
    assert results["metrics"] == pytest.approx(undisturbed["metrics"], abs=0.5)
    skipped, stages = set(results["stages_skipped"]), {p.parent.name for p in last.run_dir.glob("stages/*/stage.json")}
    assert stages - skipped == {"export"}
    nodes = re.findall(r"== \S+ attempt 0 of job (\d+) on (\S+)", last.launches())
    assert [job for job, _ in nodes] == [job for job, _ in jobs]
    assert [place for _, place in nodes][2] == "n[1-2]"
    assert last.launches().count("finished") == 5


@pytest.fixture(scope="module")
def sweep(folder: Path) -> Path:
    """A finished sweep of three linear runs."""
    with removed_afterwards():
        told = run(
            *("slurm/sweep.sh", "--name", "sweep", "--sbatch", "--time=60", "ranker.Cp=[1.0],[2.0],[4.0]", *LINEAR),
            XMCDIST_RUNS=str(folder),
            SBATCH_OUTPUT=str(folder / "sweep-%j.log"),
        )
        started = re.findall(r"^job (\d+): (\S+)$", told, re.MULTILINE)
        assert [Path(place).name for _, place in started] == [f"ranker.Cp-{c}" for c in ("1.0", "2.0", "4.0")]
        for job, place in started:
            Job(job, Path(place), folder / f"sweep-{job}.log").finish()
    return folder / "sweep"


def test_a_sweep_of_three_runs(sweep: Path) -> None:
    table = run("slurm/sweep.sh", "--table", str(sweep)).splitlines()
    assert table[0].split()[:2] == ["run", "P@1"]
    assert sorted(row.split()[0] for row in table[1:]) == [f"ranker.Cp-{c}" for c in ("1.0", "2.0", "4.0")]
    assert all(row.split()[-1] == "finished" for row in table[1:])
    again = run(
        "slurm/sweep.sh", "--name", "sweep", "ranker.Cp=[1.0],[2.0],[4.0]", *LINEAR, XMCDIST_RUNS=str(sweep.parent)
    )
    assert again.count("is finished") == 3


def test_a_crash_is_requeued_a_bounded_number_of_times_and_its_reason_is_told(folder: Path) -> None:
    # What every Python process runs first: a fault of the program, not of a person.
    broken = folder / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        """
import os, sys
if "RANK" in os.environ:
    sys.stderr.write("KeyError: 'planted error'\\n")
    os._exit(1)
"""
    )
    job = submit(folder, "crash", *LINEAR, options=["--time=60"], XMCDIST_MAX_REQUEUES="1", PYTHONPATH=str(broken))
    assert job.end() == "FAILED"
    assert job.show("Restarts") == "1"
    assert job.launches().count(f"crash of job {job.id}: status 1") == 2
    assert "requeued: crash 1" in job.launches()
    assert "given up: crash 2, and XMCDIST_MAX_REQUEUES=1: status 1: KeyError: 'planted error'" in job.launches()


def test_a_mistake_is_not_requeued(folder: Path) -> None:
    job = submit(folder, "mistake", *LINEAR, "dataset.path=/nowhere", options=["--time=60"])
    assert job.end() == "FAILED"
    assert job.show("Restarts") == "0"
    assert job.show("ExitCode") == "2:0"
    assert "not requeued, as it would fail again" in job.launches()
    assert "/nowhere" in job.launches()


def test_a_job_that_a_person_cancels_does_not_come_back(folder: Path) -> None:
    job = submit(folder, "cancelled", *SHIPPED)
    job.wait(lambda: job.steps(1) >= 5, "steps")
    run("scancel", job.id)
    assert job.end() == "CANCELLED"
    time.sleep(5)
    assert job.show("JobState") == "CANCELLED"
    assert job.show("Restarts") == "0"
    assert (job.run_dir / "preempted.json").exists()  # it saved nevertheless


def test_prediction_on_two_nodes_equals_one_process(folder: Path, sweep: Path) -> None:
    model = sweep / "ranker.Cp-1.0" / "model"
    lines = folder / "lines.txt"
    lines.write_text("a library to read and write images\nweb server in python\nfonts for greek\n")
    settings = [f"model={model}", f"input={lines}", "k=3"]
    job = submit(folder, "predict", *settings, f"output={folder}/two.jsonl", script="slurm/predict.sbatch")
    assert job.end() == "COMPLETED", job.text()
    run("python", "-m", "xmcdist", "predict", *settings, f"output={folder}/one.jsonl")
    assert (folder / "two.jsonl").read_text() == (folder / "one.jsonl").read_text()
