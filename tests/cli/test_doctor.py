"""``xmcdist doctor`` on real ranks, with faults planted; ``xmcdist env``."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import ROOT, finish, kill_all, start
from xmcdist.cli.doctor import ranks_of_srun
from xmcdist.config.errors import UserError
from xmcdist.observability.environment import environment_report
from xmcdist.observability.host import host_facts
from xmcdist.pipelines.doctor import judge


def _alone(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, "-m", "xmcdist", *args], cwd=ROOT, env=env, capture_output=True, text=True)


def _lines(text: str) -> dict[str, str]:
    """Status by check."""
    found = {}
    for line in text.splitlines():
        status, _, rest = line.partition("  ")
        if status.strip() in ("ok", "warn", "fail"):
            found[rest.split(":")[0].strip()] = status.strip()
    return found


def test_one_process(tmp_path: Path) -> None:
    done = _alone("doctor", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    said = _lines(done.stdout)
    assert said["versions"] == said["devices"] == said["network"] == said["run folder"] == "ok"
    assert list(tmp_path.rglob(".xmcdist-doctor*")) == []


def test_a_damaged_stage_and_no_model_fail(tmp_path: Path) -> None:
    from xmcdist.checkpoint.checksums import record, sealed

    stage = tmp_path / "run" / "stages" / "tree"
    stage.mkdir(parents=True)
    (stage / "labels.npy").write_bytes(b"1234")
    files = record(stage)
    (stage / "stage.json").write_text(json.dumps(sealed({"stage": "tree", "files": files})))
    (stage / "labels.npy").write_bytes(b"123")
    done = _alone("doctor", f"run_dir={tmp_path / 'run'}", f"model={tmp_path / 'none'}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "labels.npy has 3 bytes, and 4 were written" in done.stdout
    assert _lines(done.stdout)["model"] == "fail"
    assert "something failed" in done.stdout


@pytest.mark.distributed
def test_real_collectives_on_real_ranks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    finish(start(3, "doctor", f"folder={tmp_path / 'shared'}", log=log), log)
    said = _lines(log.read_text())
    assert said["all-reduce"] in ("ok", "warn")
    assert said["all-to-all"] in ("ok", "warn")
    assert said["shared folder"] in ("ok", "warn")
    assert said["clocks"] == "ok"
    assert "kB/s" in log.read_text() or "MB/s" in log.read_text()


@pytest.mark.distributed
def test_a_folder_that_one_rank_does_not_see(tmp_path: Path) -> None:
    log, (here, elsewhere) = tmp_path / "log", (tmp_path / "here", tmp_path / "elsewhere")
    here.mkdir()
    elsewhere.mkdir()
    places = {"HERE": str(here), "ELSEWHERE": str(elsewhere)}
    module = "tests.helpers.doctor_elsewhere"
    job = start(2, "folder=shared", "wait_s=1", log=log, module=module, **places)
    assert job.wait(120) != 0
    text = log.read_text()
    said = _lines(text)
    assert said["shared folder"] == "fail"
    assert said["all-reduce"] in ("ok", "warn")
    assert f"rank 1 (host {os.uname().nodename}) does not see in {elsewhere / 'shared'}" in text


@pytest.mark.distributed
def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = time.monotonic()
    job = start(3, f"folder={tmp_path / 'shared'}", "timeout_s=6", log=log, module="tests.helpers.doctor_stopped")
    while "rank 1" not in log.read_text():
        assert time.monotonic() - started < 120, log.read_text()[-3000:]
        time.sleep(0.1)
    kill_all(job)
    assert "did not complete" in log.read_text()


def _facts(tmp_path: Path) -> list[dict[str, Any]]:
    one = host_facts("cpu", tmp_path)
    one["torch_threads"], one["machine_cores"], one["cores"] = 4, 8, 8
    return [copy.deepcopy(one) for _ in range(2)]


def test_facts_that_do_not_fit_together_are_judged(tmp_path: Path) -> None:
    def status(facts: list[dict[str, Any]], name: str) -> list[str]:
        return [f"{c.status} {c.text} {c.remedy}" for c in judge(facts) if c.name == name]

    facts = _facts(tmp_path)
    assert [c.name for c in judge(facts) if c.status == "fail"] == []
    facts[1]["versions"]["torch"] = "1.0"
    assert status(facts, "versions")[0].startswith("fail torch")
    facts = _facts(tmp_path)
    facts[1]["versions"]["wandb"] = "1.0"
    assert status(facts, "versions")[0].startswith("warn wandb")
    for fact in (facts := _facts(tmp_path)):
        fact["torch_threads"] = 8
    assert "OMP_NUM_THREADS=4" in status(facts, "threads")[0]
    for fact in (facts := _facts(tmp_path)):
        fact["device"], fact["gpu"] = "cuda:0", {"name": "G", "uuid": "a", "total": 10, "free": 10, "near_cores": None}
    assert status(facts, "devices")[0].startswith("fail ranks 0 and 1 have the same GPU")
    facts[1]["gpu"]["uuid"] = "b"
    assert status(facts, "devices")[0].startswith("ok")
    facts[1]["device"] = "cpu"
    assert status(facts, "devices")[0].startswith("fail no GPU on rank 1")
    facts = _facts(tmp_path)
    facts[0]["limits"]["NOFILE"], facts[1]["disk_free"], facts[0]["shm_free"] = 100, 10, 0
    assert status(facts, "limits")[0].startswith("fail open files: 100 on rank 0")
    assert status(facts, "disk")[0].startswith("fail")
    assert status(facts, "/dev/shm")[0].startswith("warn")


def test_srun_makes_ranks() -> None:
    env = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NNODES": "2", "SLURM_JOB_ID": "12"}
    env["MASTER_ADDR"] = "n1"
    ranks_of_srun(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == ("3", "4", "1", "2")
    assert env["MASTER_PORT"] == "20012"
    launched = {**env, "RANK": "0"}
    ranks_of_srun(launched)
    assert launched["RANK"] == "0"


def test_env_leaves_secrets_out(tmp_path: Path) -> None:
    done = _alone("env", WANDB_API_KEY="very-secret", HF_ENDPOINT="https://me:word@host/x", NCCL_DEBUG="INFO")
    assert done.returncode == 0, done.stderr
    assert "very-secret" not in done.stdout
    assert "word@host" not in done.stdout
    assert "NCCL_DEBUG=INFO" in done.stdout
    assert "torch" in done.stdout
    with pytest.raises(UserError, match="is no folder"):
        environment_report(tmp_path / "none")
