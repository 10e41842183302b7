"""What slurm/train.sbatch decides from how a step ended, and what the submitting scripts submit; without a Slurm."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from xmcdist.config.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# Stand-ins for Slurm's commands. `scontrol requeue` ends the batch script, as Slurm does.
STUBS = {
    "srun": 'echo "$@" >> "$STUB/srun.words"; source "$STUB/step"',
    "scancel": 'echo "$@" >> "$STUB/scancel.words"; kill -s USR1 "$(< "$STUB/step.pid")"',
    "scontrol": """
      case "$1 $2" in
        "show hostnames") echo localhost ;;
        "show job") echo "JobId=7 JobState=$(cat "$STUB/state" 2>/dev/null || echo RUNNING) Reason=None" ;;
        requeue*) echo requeued >> "$STUB/requeued"; kill -9 "$PPID" ;;
      esac""",
}


class Batch:
    """Attempts of one job, its step replaced by a few lines of bash."""

    def __init__(self, folder: Path) -> None:
        self.stub, self.run_dir = folder / "stub", folder / "run"
        self.stub.mkdir()
        for name, text in STUBS.items():
            (self.stub / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (self.stub / name).chmod(0o755)

    def attempt(self, step: str, number: int = 0, *settings: str) -> int:
        """Run the batch file; its status, -9 when it was requeued."""
        (self.stub / "step").write_text(step)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "XMCDIST_"))}
        env = kept | {
            "PATH": f"{self.stub}:{os.environ['PATH']}",
            "STUB": str(self.stub),
            "RUN": str(self.run_dir),
            "XMCDIST_RUN_DIR": str(self.run_dir),
            "XMCDIST_SITE": "/dev/null",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "xmcdist",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_RESTART_COUNT": str(number),
        }
        command = ["bash", "slurm/train.sbatch", *settings]
        return subprocess.run(command, env=env, cwd=ROOT, timeout=60, capture_output=True).returncode

    @property
    def launches(self) -> str:
        return (self.run_dir / "launches.log").read_text()


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


CRASH = """
mkdir -p $XMCDIST_LOG_DIR/node-{0,1}
echo 'ValueError: bad' > $XMCDIST_LOG_DIR/node-0/stderr.log
echo 'xmcdist: rank 1: collective #9 did not complete' > $XMCDIST_LOG_DIR/node-1/stderr.log
exit 1
"""
# The step as Slurm runs it: signalled, it leaves what it has saved.
SIGNALLED = """
echo $$ > $STUB/step.pid
trap 'SAVE; exit 1' USR1
for i in $(seq 50); do ((i != 3)) || kill -s USR1 $PPID; sleep 0.1; done
"""
SAVE = "mkdir -p $RUN/stages/match-2.partial/checkpoints; touch $RUN/stages/match-2.partial/checkpoints/a"


def test_an_end_in_good_order(batch: Batch) -> None:
    batch.run_dir = batch.run_dir.with_name("it's here")
    assert batch.attempt("exit 0", 0, "seed=1", f"run_dir={batch.run_dir}") == 0
    words = (batch.stub / "srun.words").read_text()
    place = str(batch.run_dir).replace("'", "\\'")
    assert words == f"--kill-on-bad-exit=1 launch/node.sh run_dir='{place}' seed=1\n"
    assert "attempt 0 of job 7 on localhost" in batch.launches
    assert "finished" in batch.launches


def test_results_count_more_than_a_launcher_that_fails_at_exit(batch: Batch) -> None:
    assert batch.attempt("sleep 0.1; touch $RUN/results.json; exit 1") == 0
    assert "finished" in batch.launches


def test_crashes_are_requeued_twice(batch: Batch) -> None:
    assert [batch.attempt(CRASH, n) for n in range(3)] == [-9, -9, 1]
    assert batch.launches.count("crash of job 7: status 1: ValueError: bad\n") == 3
    assert "given up: crash 3, and XMCDIST_MAX_REQUEUES=2: status 1: ValueError: bad" in batch.launches


def test_a_mistake_is_not_requeued(batch: Batch) -> None:
    assert batch.attempt("""echo '{"error": "no such file"}' > $XMCDIST_ERROR_FILE; exit 1""") == 2
    assert not (batch.stub / "requeued").exists()
    assert "no such file" in batch.launches


def test_near_the_time_limit_the_step_is_told_and_the_job_requeued(batch: Batch) -> None:
    assert batch.attempt(SIGNALLED.replace("SAVE", SAVE)) == -9
    assert (batch.stub / "scancel.words").read_text() == "--signal=USR1 7.0\n"
    assert "crash" not in batch.launches


def test_a_time_limit_without_progress_is_a_crash(batch: Batch) -> None:
    assert [batch.attempt(SIGNALLED.replace("SAVE", "true"), n) for n in range(3)] == [-9, -9, 1]
    assert batch.launches.count("crash of job 7: no stage and no checkpoint was finished within the time limit") == 3


@pytest.mark.parametrize(("state", "status"), [("RUNNING", -9), ("COMPLETING", 0), ("CANCELLED", 0)])
def test_after_a_pre_emption_only_a_job_that_slurm_left_running_is_requeued(
    batch: Batch, state: str, status: int
) -> None:
    (batch.stub / "state").write_text(state)
    assert batch.attempt("sleep 0.1; touch $RUN/preempted.json; exit 1") == status
    assert (batch.stub / "requeued").exists() is (status == -9)


def test_a_node_that_fails_takes_others_with_it_and_that_is_no_pre_emption(batch: Batch) -> None:
    step = "touch $XMCDIST_LOG_DIR/asked-to-end; exit 1"
    assert batch.attempt(f"touch $XMCDIST_LOG_DIR/failed; {step}") == -9
    assert "crash of job 7" in batch.launches
    assert batch.attempt(step, 1) == -9
    assert batch.launches.count("crash of job 7") == 1


@pytest.fixture(scope="module")
def settings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slurm_settings", ROOT / "slurm" / "settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sweep_is_read_as_hydra_reads_it(settings: ModuleType) -> None:
    runs = settings.expand(
        ["seed=1,2", "matcher.steps=[10,20],[30]", "dataset.path='/a,b'", "tree.nr_splits=range(2,4)"]
    )
    assert len(runs) == 8
    assert runs[1] == (
        "seed-1_matcher.steps-10-20_tree.nr_splits-3",
        ["seed=1", "matcher.steps=[10,20]", "dataset.path='/a,b'", "tree.nr_splits=3"],
    )
    assert len({name for name, _ in runs}) == 8
    named_alike = settings.expand(["dataset.name='a b','a,b'"])
    assert len({name for name, _ in named_alike}) == 2
    with pytest.raises(UserError, match="seed=1,2"):
        settings.expand(["seed=1", "seed=2"])
    with pytest.raises(UserError, match="not a sweep that Hydra reads"):
        settings.expand(["seed=1,("])


def test_the_table_has_finished_runs_first(settings: ModuleType, tmp_path: Path) -> None:
    for name, p1 in (("a", 30.0), ("b", 40.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"metrics": {"P@1": p1}}))
    (tmp_path / "c" / "stages" / "tree").mkdir(parents=True)
    (tmp_path / "c" / "stages" / "tree" / "stage.json").write_text("{}")
    rows = settings.table(tmp_path).splitlines()
    assert [row.split()[0] for row in rows] == ["run", "b", "a", "c"]
    assert rows[3].rstrip().endswith("last stage: tree")


def _dry(*command: str) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "XMCDIST_SITE": "/dev/null"}
    env |= {"XMCDIST_VENV": "none", "XMCDIST_RUNS": "/runs"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)
    return done.stdout + done.stderr


def test_the_chain_has_the_jobs_that_have_something_to_do() -> None:
    command = ["slurm/pipeline.sh", "--dry-run", "--name", "n", "--cpu", "--mem=9G", "--gpu", "--nodes=2 --mem=0"]
    jobs = _dry(*command, "engine.label_shards=2", "evaluation.linear_baseline=false").splitlines()
    assert [job.split("--job-name=n-")[1].split("'")[0] for job in jobs] == ["tree", "match", "rank", "end"]
    assert "--dependency" not in jobs[0]
    assert "'--dependency=afterok:<tree>' '--kill-on-invalid-dep=yes'" in jobs[1]
    assert ["'--nodes=2' '--mem=0'" in job for job in jobs] == [False, True, False, False]
    assert ["engine.label_shards=null" in job for job in jobs] == [True, False, True, True]
    assert ["until=" in job for job in jobs] == [True, True, True, False]


def test_a_misspelt_setting_is_told_before_anything_is_submitted() -> None:
    assert "did you mean 'seed'?" in _dry("slurm/sweep.sh", "--dry-run", "sed=1,2")
