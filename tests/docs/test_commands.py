"""Every command of the documents is run as it stands, on a desk laid out with what they name.

Training is composed and checked, and in the README, where it needs no GPU, shortened
(``debug=smoke``, a tiny encoder, few documents) and run.  Servers are started, asked once and
stopped; of batch jobs the settings are composed.  What has a test of its own is listed with it;
quickstart.sh takes minutes and is run by people; other people's programs are not run.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.docs.pages import PAGES, ROOT, commands
from tests.helpers.launch import free_port
from tests.helpers.pecos_model import Chain
from tests.helpers.toy import write_text_folder
from xmcdist.__main__ import COMMANDS
from xmcdist.config.compose import compose_run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ELSEWHERE = {  # how a command begins, and what tests it
    "bash launch/test.sh": ".ci/run",
    "bash launch/quickstart.sh": "tests/launch/test_scripts.py",
    "XMCDIST_CONSTRAINTS=": "tests/launch/test_scripts.py",
    "bash slurm/local/": "tests/slurm",
    "slurm/pipeline.sh": "tests/slurm",
    "slurm/sweep.sh": "tests/slurm",
}
_FOREIGN = (  # programs of others, on machines or with accounts that a test has not
    "apptainer|cat|cp|curl|df|docker|du|export|git|kill|kubectl|ls|mv|nginx|nvidia-smi|pip|ps|py-spy|rsync|sbatch|scancel|"
    "scontrol|squeue|srun|ssh|sudo|systemctl|tail|tensorboard|ulimit|wandb"
)
_SMALL = ("debug=smoke", "tree.nr_splits=4", "tree.max_leaf_size=5", "engine.threads=1", "engine.precision=fp32")
_IN_README = "README.md"


def _is_foreign(command: str) -> bool:
    words = [w for w in command.split() if not re.match(r"^[A-Z_]+=", w)]
    return bool(words) and re.fullmatch(_FOREIGN, words[0]) is not None


def _asked(command: str) -> list[str] | None:
    """The words of ours in a command; None where there are none."""
    found = re.search(r"(?:^|\s)(?:-m )?xmcdist (.*)", command)
    return shlex.split(found[1], comments=True) if found else None


def _environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "SLURM_"))}
    env |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "HF_HUB_OFFLINE": "1"}
    return env | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | more


def _run(desk: Path, command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command], cwd=desk, env=_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the documents call by name."""
    desk = tmp_path_factory.mktemp("desk")
    for name in ("launch", "slurm", "conf", "data", "benchmarks"):
        (desk / name).symlink_to(ROOT / name)
    (desk / "DIR").symlink_to(ROOT / "data" / "debian-packages")
    write_text_folder(desk / "small")
    (desk / "docs.txt").write_text("terminal program that shows the weather\nnumeric arrays for scientists\n")
    _run(desk, "python -m xmcdist train run_dir=RUN encoder=none matcher.steps=[1]")
    for name in ("RUN1", "RUN2", "runs/first", "runs/second"):
        shutil.copytree(desk / "RUN", desk / name)
    chain = Chain()
    chain.write(desk / "XLINEAR_FOLDER")
    (desk / "FEATURES").mkdir()
    rows = np.arange(chain.X.shape[0])
    Y = sp.csr_matrix((np.ones(rows.size, np.float32), (rows, rows % 20)), shape=(rows.size, 20))
    for split in ("trn", "tst"):
        sp.save_npz(desk / "FEATURES" / f"X.{split}.npz", sp.csr_matrix(chain.X))
        sp.save_npz(desk / "FEATURES" / f"Y.{split}.npz", Y)
    shutil.copy(desk / "FEATURES" / "X.tst.npz", desk)
    shutil.copy(desk / "FEATURES" / "Y.trn.npz", desk)
    for folder in (desk, desk / "FEATURES"):
        (folder / "output-items.txt").write_text("".join(f"item {i}\n" for i in range(20)))
    return desk


def test_every_command_is_known() -> None:
    """Nothing that looks like a command of ours escapes the tests below."""
    count = 0
    for page in PAGES:
        for command in commands(page):
            asked = _asked(command)
            if asked is None or command.startswith(tuple(ELSEWHERE)):
                continue
            count += 1
            assert asked[0] in (*COMMANDS, "COMMAND"), f"{page.name}: {command}"
    assert count > 20
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_run(page: Path, desk: Path) -> None:
    for command in dict.fromkeys(commands(page)):
        if "slurm/train.sbatch" in command:
            settings = shlex.split(command.split("slurm/train.sbatch")[1], comments=True)
            compose_run([*settings, "engine.global_batch=256"], world_size=16)
        asked = _asked(command)
        if command.startswith(tuple(ELSEWHERE)) or asked is None or asked[0] == "COMMAND":
            continue
        own = {"train": _train, "giant": _giant, "prepare": _prepare, "serve": _serve, "board": _board}
        special = own.get(asked[0])
        if special is not None:
            special(desk, command, asked[1:], page.name)
        elif not _is_foreign(command):
            _once(desk, re.sub(r"^((?:[A-Z_]+=\S+ )*)xmcdist ", r"\1python -m xmcdist ", command))


def _once(desk: Path, command: str) -> None:
    """Run a command unless another page has shown it already."""
    _memory(desk, command)


@functools.cache
def _memory(desk: Path, command: str) -> None:
    _run(desk, command)


def _train(desk: Path, command: str, words: list[str], page: str) -> None:
    """Check the settings; those of the README that need no GPU really train."""
    world = 16 if "2x8" in command else 8 if "8gpu" in command else 1
    overrides = [w for w in words if "=" in w]
    compose_run([*overrides, "engine.global_batch=256"], world_size=world)
    file = re.search(r"--config_file (\S+)", command)
    assert file is None or (desk / file[1]).is_file(), command
    if page != _IN_README or "gpu.yaml" in command:
        return
    short = command.replace("run_dir=", "run_dir=short-").replace("dataset.path=DIR", "dataset.path=small")
    tiny = () if "encoder=none" in command else ("encoder=tiny",)
    _once(desk, " ".join([short, *tiny, *_SMALL]))


def _giant(desk: Path, command: str, words: list[str], page: str) -> None:
    """Its settings; that graphs are read and nodes classified has tests of its own."""
    if words[0] == "classify":
        compose_run(words[1:], config_name="giant_classify")
    else:
        compose_run([*words, "engine.global_batch=256"], config_name="giant")
    file = re.search(r"--config_file (\S+)", command)
    assert file is None or (desk / file[1]).is_file(), command


def _prepare(desk: Path, command: str, words: list[str], page: str) -> None:
    _once(desk, command.replace("run_dir=", "run_dir=prepared-"))


def _serve(desk: Path, command: str, words: list[str], page: str) -> None:
    overrides = [w for w in words if "=" in w]
    compose_run(overrides, config_name="serve")
    if page == _IN_README:
        rest = [w for w in overrides if not w.startswith("port=")]
        _ask(desk, lambda port: ["serve", *rest, f"port={port}"], "/health")


def _board(desk: Path, command: str, words: list[str], page: str) -> None:
    if page == _IN_README:
        _ask(desk, lambda port: ["board", *words, "--port", str(port), "--no-browser"], "/")
    else:
        assert all((desk / w).is_dir() for w in words if w.startswith(("RUN", "runs/"))), command


def _ask(desk: Path, words: Callable[[int], list[str]], path: str) -> None:
    """Start a server, get one page from it, stop it."""
    port = free_port()
    job = subprocess.Popen([sys.executable, "-m", "xmcdist", *words(port)], cwd=desk, env=_environment())
    try:
        deadline = time.monotonic() + 120
        while True:
            assert job.poll() is None, words(port)
            assert time.monotonic() < deadline, words(port)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                    assert answer.status == 200
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
    finally:
        job.terminate()
        try:
            job.wait(20)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
