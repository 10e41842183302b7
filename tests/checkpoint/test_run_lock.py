"""One run a folder: a living one is not disturbed, a dead one is in nobody's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import on_ranks
from xmcdist.checkpoint import run_lock
from xmcdist.checkpoint.run_lock import LOCK, RunLock, held
from xmcdist.config.errors import UserError
from xmcdist.parallel.launch import World

ELSEWHERE = {"host": "node7", "pid": 4711, "boot_id": "another machine", "id": "x", "command": "train seed=3"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_BEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "_STALE_S", 0.6)
    monkeypatch.setattr(run_lock, "_STALE_SAME_JOB_S", 0.3)
    monkeypatch.setattr(run_lock, "_GRACE_S", 0.2)


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process of this machine that takes the lock of the folder on its input, and lives on."""
    code = "import sys; from pathlib import Path; from xmcdist.checkpoint.run_lock import RunLock\n"
    code += "RunLock(Path(sys.stdin.readline().strip())).take(); print('held', flush=True); sys.stdin.readline()"
    command = [sys.executable, "-c", code, "seed=5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def _holds(process: subprocess.Popen[str], folder: Path) -> None:
    assert process.stdin is not None and process.stdout is not None  # noqa: PT018
    print(folder, file=process.stdin, flush=True)
    assert process.stdout.readline() == "held\n"


def _write(folder: Path, said: dict[str, Any], age: float = 0.0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(said))
    os.utime(folder / LOCK, (time.time() - age,) * 2)


def test_a_living_run_is_named_and_a_killed_one_is_taken_over_at_once(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    folder = tmp_path / "run"
    _holds(holder, folder)
    said: list[str] = []
    lock = RunLock(folder, said.append)
    with pytest.raises(UserError, match=rf"in use by another run: host .*, process {holder.pid}, since 20.*seed=5"):
        lock.take()
    holder.kill()  # and not waited for: a zombie is no living run
    lock.take()
    assert f"its process {holder.pid} is gone" in said[0]
    assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert list(folder.iterdir()) == []


def test_a_recycled_process_id_is_no_living_run(tmp_path: Path) -> None:
    mine = run_lock._describe((None, 0))
    _write(tmp_path, mine | {"process_start": mine["process_start"] - 1, "id": "old"})
    RunLock(tmp_path).take()


def test_a_run_elsewhere_lives_while_it_renews_its_file(tmp_path: Path) -> None:
    _write(tmp_path, ELSEWHERE)
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.05):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by another run: host node7, process 4711.*train seed=3"):
            RunLock(tmp_path).take()
    finally:
        end.set()
        thread.join()
    said: list[str] = []
    lock = RunLock(tmp_path, said.append)
    lock.take()  # after it has been silent for long enough
    assert "looking for up to" in said[0]
    assert "no sign of life" in said[1]
    lock.release()
    _write(tmp_path, ELSEWHERE, age=100)
    said.clear()
    lock.take()
    assert len(said) == 1  # it has been silent for long already: no waiting
    lock.release()


def test_a_job_that_was_queued_anew_takes_over_its_own_lock_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    _write(tmp_path, ELSEWHERE | {"slurm_job_id": "17", "slurm_restart_count": 1})
    again = RunLock(tmp_path, said.append, job=("17", 2))
    again.take()
    assert len(said) == 1
    assert "Slurm job 17 was queued anew" in said[0]
    again.release()
    _write(tmp_path, ELSEWHERE | {"slurm_job_id": "16", "slurm_restart_count": 1})
    RunLock(tmp_path, said.append, job=("17", 2)).take()
    assert "looking for" in said[1]  # another job's


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "?", "slurm_restart_count": null}'])
def test_a_damaged_lock_is_in_nobodys_way_for_long(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    RunLock(tmp_path).take()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_of_many_that_start_at_once_one_gets_it(tmp_path: Path) -> None:
    _write(tmp_path, run_lock._describe((None, 0)) | {"pid": 2**22 + 1, "id": "dead"})
    got, refused = [], []

    def start() -> None:
        lock = RunLock(tmp_path)
        try:
            lock.take()
            got.append(lock)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for lock in got:  # who took it over from a dead one, and was robbed of it in the same moment, is told
        try:
            lock.check()
        except UserError:
            refused.append("robbed")
    assert len(refused) == 7
    for lock in got:
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_without_links_it_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = RunLock(tmp_path)
    first.take()
    with pytest.raises(UserError, match="in use by another run"):
        RunLock(tmp_path).take()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_robbed_writes_nothing_more(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.check()  # never taken: of another rank
    lock.take()
    (tmp_path / LOCK).unlink()
    lock.check()  # deleted by someone: put back
    _write(tmp_path, ELSEWHERE)
    with pytest.raises(UserError, match=r"taken over by another run .host node7, process 4711.*writes nothing more"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK).exists()  # the other's


def test_the_file_is_renewed_while_it_is_held(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    os.utime(tmp_path / LOCK, (0, 0))
    deadline = time.monotonic() + 20
    while (tmp_path / LOCK).stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


@on_ranks(1, 2)
def test_all_ranks_learn_that_the_folder_is_in_use(rank: int, world_size: int, tmp_path: Path) -> None:
    world = World(rank, world_size, rank, world_size, "cpu")
    run = tmp_path / "run"
    with held(run, world, lambda _: None, (None, 0)):
        world.barrier()
        assert (run / LOCK).exists()
        with pytest.raises(UserError, match="in use by another run"), held(run, world, lambda _: None, (None, 0)):
            pass
    world.barrier()
    assert not run.exists()  # nothing was put into it
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"run_dir=.*file/run cannot be written"),
        held(tmp_path / "file" / "run", world, lambda _: None, (None, 0)),
    ):
        pass
