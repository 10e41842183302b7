"""``xmcdist serve`` as processes: what it says, its workers, signals, and what they share."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import xmcdist
from tests.helpers.toy import texts_and_labels
from xmcdist.inference.calibration import fit_calibration
from xmcdist.serving.server import listen

pytestmark = [pytest.mark.distributed, pytest.mark.waiting]
ROOT = Path(__file__).parents[2]
WAIT_S = 90  # for what takes a few seconds on a machine that is not busy
TEXTS = texts_and_labels(40, 40, seed=9)[0]


class _Server:
    """One running ``serve``; ``home`` is its temporary folder."""

    def __init__(self, home: Path, *settings: str) -> None:
        home.mkdir(parents=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "xmcdist", "serve", "port=0", "threads=1", *settings]
        self.home, self._errors = home, home / "errors"
        with open(self._errors, "w") as errors:
            self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"http://\S+:\d+", self.said)
        assert found, self.said + self.errors()
        self.url = found[0]

    def errors(self) -> str:
        return self._errors.read_text()

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        told = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in told if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]

    def predict(self, texts: list[str]) -> Any:
        answer = httpx.post(f"{self.url}/predict", json={"texts": texts}, timeout=WAIT_S)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]

    def meter(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=WAIT_S).text
        return sum(float(v) for v in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[_Server, Path]]:
    """Two workers on a link to the model, which tests may turn to another."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "current").symlink_to(model)
    server = _Server(folder / "home", f"model={folder / 'current'}", "workers=2", "max_body_mb=10")
    try:
        _until(lambda: server.meter("xmcdist_workers_ready") == 2)
        yield server, folder / "current"
    finally:
        server.process.kill()
        server.process.wait()


def test_clients_side_by_side_get_the_bits_of_one(served: tuple[_Server, Path], model: Path) -> None:
    server, _ = served
    assert re.fullmatch(r"xmcdist: serving \S+, 40 labels, at \S+ \(2 workers of 1 thread; .*\)\n", server.said)
    want = [[(a.label_id, a.score) for a in row] for row in xmcdist.load(str(model)).predict(TEXTS)]
    count = 'xmcdist_requests_total{path="/predict",status="200"}'
    before = server.meter(count)

    def client(number: int) -> bool:
        with httpx.Client(timeout=WAIT_S) as web:
            right = []
            for i in range(8):
                own = [(number + i) % 40, (number * 7 + i) % 40]
                answer = web.post(f"{server.url}/predict", json={"texts": [TEXTS[j] for j in own]}).json()
                got = [[(a["id"], a["score"]) for a in row] for row in answer["predictions"]]
                right.append(got == [want[j] for j in own])
            return all(right)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(client, range(16)))
    assert {server.meter(count) - before for _ in range(6)} == {128}  # whichever worker is asked
    assert server.meter("xmcdist_requests_in_flight") == 1


def test_workers_of_a_linear_model_have_no_torch_and_map_it(served: tuple[_Server, Path]) -> None:
    for pid in served[0].workers():
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "libtorch" not in maps
        assert re.search(r"/model/rankers/", maps)


def test_a_killed_worker_is_replaced(served: tuple[_Server, Path]) -> None:
    server, _ = served
    before = server.workers()
    os.kill(before[0], signal.SIGKILL)
    _until(lambda: before[0] not in server.workers() and len(server.workers()) == 2)
    _until(lambda: server.meter("xmcdist_workers_ready") == 2)
    assert before[1] in server.workers()
    assert f"Child process [{before[0]}] died" in server.errors()
    assert len(server.predict(TEXTS)) == 40


def _turn(link: Path, to: Path) -> None:
    fresh = link.with_name("fresh")
    fresh.symlink_to(to)
    fresh.replace(link)


def test_a_worker_killed_while_it_is_asked_whether_it_lives_is_replaced(served: tuple[_Server, Path]) -> None:
    server, _ = served
    before = server.workers()
    os.kill(before[0], signal.SIGSTOP)  # it does not answer: the supervisor is now waiting for it
    time.sleep(2)
    os.kill(before[0], signal.SIGKILL)
    _until(lambda: before[0] not in server.workers() and len(server.workers()) == 2)
    _until(lambda: server.meter("xmcdist_workers_ready") == 2)
    assert before[1] in server.workers()


def test_a_worker_killed_while_the_model_is_damaged_leaves_the_others(
    served: tuple[_Server, Path], model: Path, tmp_path: Path
) -> None:
    server, link = served
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "tfidf" / "tfidf.json").unlink()
    _turn(link, broken)
    killed, kept = server.workers()
    os.kill(killed, signal.SIGKILL)
    _until(lambda: server.errors().count("a new worker could not open the model") >= 2)
    assert kept in server.workers()
    assert len(server.predict(TEXTS)) == 40
    _turn(link, model)
    _until(lambda: len(server.workers()) == 2 and server.meter("xmcdist_workers_ready") == 2)
    assert kept in server.workers()


def test_sighup_takes_up_another_model_and_keeps_the_old_one_when_it_is_damaged(
    served: tuple[_Server, Path], model: Path, tmp_path: Path
) -> None:
    server, link = served
    before = server.workers()
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "tfidf" / "tfidf.json").unlink()
    _turn(link, broken)
    said = server.errors().count("a new worker could not open the model")
    server.process.send_signal(signal.SIGHUP)
    _until(lambda: server.errors().count("a new worker could not open the model") > said)
    _until(lambda: server.workers() == before)
    assert len(server.predict(TEXTS)) == 40
    better = Path(shutil.copytree(model, tmp_path / "better"))
    fit_calibration([0.0, 0.5, 1.0], [0, 0, 1], "isotonic").save(better)
    _turn(link, better)
    server.process.send_signal(signal.SIGHUP)
    _until(lambda: len(server.workers()) == 2 and not set(before) & set(server.workers()))
    assert all("probability" in a for _ in range(6) for row in server.predict(TEXTS[:2]) for a in row)


def test_sigterm_lets_requests_end_and_leaves_nothing(served: tuple[_Server, Path]) -> None:
    server, _ = served
    workers, long = server.workers(), [" ".join(TEXTS) * 10] * 180
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.predict, long) for _ in range(4)]
        _until(lambda: server.meter("xmcdist_requests_in_flight") > 2)
        assert server.stop() == 0
        assert [len(a.result()) for a in asked] == [180] * 4
    assert not any(map(_alive, workers))
    assert [path.name for path in server.home.iterdir()] == ["errors"]


def test_one_worker_and_an_address_that_is_taken(model: Path, tmp_path: Path) -> None:
    server = _Server(tmp_path / "home", f"model={model}")
    try:
        assert "(1 thread; ready" in server.said
        port = server.url.rsplit(":", 1)[1]
        done = _serve(f"model={model}", f"port={port}")
        assert done.returncode == 2
        assert re.fullmatch(rf"xmcdist: error: cannot listen at host=127\.0\.0\.1 port={port}: .*\n", done.stderr)
        assert len(server.predict(["a"])) == 1
        assert server.stop() == 0
        assert server.errors() == ""
    finally:
        server.process.kill()
        server.process.wait()


def test_workers_end_when_their_supervisor_is_killed(model: Path, tmp_path: Path) -> None:
    server = _Server(tmp_path / "home", f"model={model}", "workers=2", "host=0.0.0.0")
    workers = server.workers()
    assert "there is no authentication" in server.errors()
    server.stop(signal.SIGKILL)
    _until(lambda: not any(map(_alive, workers)))
    with socket.socket() as free:
        free.bind(("0.0.0.0", int(server.url.rsplit(":", 1)[1])))


def test_connections_send_at_once() -> None:
    """Else an answer's second part waits 40 ms for the client's ACK of the first."""
    with listen("127.0.0.1", 0) as bound, socket.create_connection(bound.getsockname()):
        connection, _ = bound.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def _serve(*settings: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "xmcdist", "serve"] if code is None else ["-c", code, "serve"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *start, *settings]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=WAIT_S)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_model_is_one_line_and_status_2(model: Path, tmp_path: Path, workers: int) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "tfidf" / "tfidf.json").unlink()
    done = _serve(f"model={broken}", "port=0", f"workers={workers}")
    assert done.returncode == 2
    assert re.fullmatch(r"xmcdist: error: .*tfidf.*\n", done.stderr)


def test_mistakes_are_told_before_anything_is_started(model: Path) -> None:
    done = _serve(f"model={model}", "workers=0", "max_k=0", "port=99999")
    assert done.returncode == 2
    assert all(name in done.stderr for name in ("workers=0", "max_k=0", "port=99999"))
    assert "no model folder" in _serve(f"model={model.parent}").stderr


def test_the_extra_is_named_where_it_is_missing(model: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; import xmcdist.__main__ as m; m.main()"
    done = _serve(f"model={model}", code=code)
    assert done.returncode == 2
    assert "pip install 'xmcdist[serve]'" in done.stderr
