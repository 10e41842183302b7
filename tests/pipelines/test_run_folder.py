"""What can happen to a run folder: damaged files, a full disk, two runs at once, a folder shown late."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xmcdist
from tests.helpers.ranks import on_ranks
from tests.helpers.toy import TINY_RUN, write_text_folder
from xmcdist.checkpoint.parts import write_rows
from xmcdist.checkpoint.stages import StageStore
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import UserError
from xmcdist.observability.log import RunLog
from xmcdist.parallel import visible
from xmcdist.parallel.launch import World
from xmcdist.parallel.visible import seen_by_all, wait_for
from xmcdist.pipelines.train import train

LINEAR = ["encoder=none", "tree.nr_splits=4", "tree.max_leaf_size=5", "engine.threads=1", "ranker.negatives=[tfn,man]"]
FULL = [
    *TINY_RUN,
    "evaluation.linear_baseline=false",
    "matcher.steps=[4,8]",
    "checkpoint.every_steps=3",
    "ranker.negatives=[tfn,man]",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("run-folder") / "data", train=200)


def _train(data: Path, run: Path, *args: str) -> dict[str, Any]:
    return train(compose_run([f"dataset.path={data}", f"run_dir={run}", *args]), World.single())


@pytest.fixture(scope="module")
def linear(data: Path) -> tuple[Path, dict[str, float]]:
    run = data.parent / "linear"
    return run, _train(data, run, *LINEAR)["metrics"]


@pytest.fixture
def copied(linear: tuple[Path, dict[str, float]], tmp_path: Path) -> Path:
    """A finished linear run of one's own; its files are no links to the others."""
    shutil.copytree(linear[0], tmp_path / "run")
    return tmp_path / "run"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _lines(run: Path, *words: str) -> list[str]:
    return [line for line in (run / "run.log").read_text().splitlines() if all(w in line for w in words)]


@pytest.mark.parametrize("verify", ["sizes", "full", "off"])
def test_damaged_stages_are_put_aside_and_made_again(
    verify: str, data: Path, copied: Path, linear: tuple[Path, dict[str, float]]
) -> None:
    stages, checked = copied / "stages", f"checkpoint.verify={verify}"
    weights = stages / "linear-2" / "weights" / "part-00000-of-00001.safetensors"
    cut, flipped, gone = stages / "tree" / "Y.level-1" / "data.npy", weights, stages / "features" / "X.trn" / "data.npy"
    for name, path in (("cut", cut), ("gone", gone), ("flipped", flipped)):
        if verify == "off" and name != "flipped":
            continue
        if name == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        elif name == "gone":
            path.unlink()
        else:
            _flip(path)
    (stages / "tree.damaged").mkdir()  # of another time: one is kept
    (stages / "tree.damaged" / "old").touch()
    results = _train(data, copied, *LINEAR, checked)
    made = {"sizes": {"features", "tree"}, "full": {"features", "tree", "linear-2"}, "off": set()}[verify]
    everything = {p.name for p in (linear[0] / "stages").iterdir()}
    assert everything - set(results["stages_skipped"]) == made
    aside = {p.name.removesuffix(".damaged") for p in stages.glob("*.damaged") if not (p / "old").exists()}
    assert aside == made
    if verify == "off":
        return
    (line,) = _lines(copied, "tree: damaged since it was finished")
    assert f"{cut} has {cut.stat().st_size - 1} bytes, and {cut.stat().st_size} were written" in line
    assert len(_lines(copied, f"{gone} is missing")) == 1
    assert results["metrics"] == pytest.approx(linear[1], abs=1e-6)
    if verify == "full":
        (line,) = _lines(copied, "linear-2: damaged", str(flipped), "is not what was written")
        assert f"kept as {stages / 'linear-2.damaged'}" in line
        assert weights.read_bytes() == (linear[0] / weights.relative_to(copied)).read_bytes()


def test_a_damaged_note_of_a_stage_is_found(data: Path, copied: Path) -> None:
    note = copied / "stages" / "linear-1" / "stage.json"
    said = json.loads(note.read_text())
    note.write_text(json.dumps(said | {"seconds": 1e9}))
    (copied / "stages" / "linear-2" / "stage.json").write_text("{")
    results = _train(data, copied, *LINEAR)
    assert {"linear-1", "linear-2"}.isdisjoint(results["stages_skipped"])
    assert _lines(copied, "linear-1: damaged", "stage.json is damaged: its checksum differs")


def test_damaged_prepared_data_and_model_are_made_again(
    data: Path, copied: Path, linear: tuple[Path, dict[str, float]]
) -> None:
    _flip(copied / "prepared" / "texts.trn.bin")
    model = copied / "model"
    frequency = model / "label_frequency.npy"
    _flip(frequency)
    (model / "calibration.json").write_text("{}")  # as `calibrate` adds one
    with pytest.raises(UserError, match=rf"{frequency} is not what was written.*copy the model again"):
        xmcdist.load(str(model), verify=True)
    results = _train(data, copied, *LINEAR, "checkpoint.verify=full")
    assert results["metrics"] == pytest.approx(linear[1], abs=1e-6)
    assert (copied / "prepared.damaged").is_dir()
    assert _lines(copied, "prepared data:", "texts.trn.bin is not what was written", "prepared again")
    assert _lines(copied, f"model: damaged: {frequency}")
    assert (model / "calibration.json").read_text() == "{}"
    (model / "calibration.json").unlink()
    assert xmcdist.load(str(model), verify=True).predict(["w1 w2"], k=1)


def test_killed_between_a_stages_note_and_its_name_it_is_not_done_again(
    data: Path, copied: Path, linear: tuple[Path, dict[str, float]]
) -> None:
    stages = copied / "stages"
    partial = (stages / "linear-1").rename(stages / "linear-1.partial")
    (partial / "partial.json").write_text("{}")
    (partial / "checkpoints").mkdir()
    results = _train(data, copied, *LINEAR)
    assert "linear-1" in results["stages_skipped"]
    assert not partial.exists()
    assert not (stages / "linear-1" / "checkpoints").exists()


def test_a_second_run_is_refused_and_the_first_goes_on(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = (
        "import xmcdist.pipelines.train as t; t._stages = lambda run: (print('in', flush=True), input()) and None; "
        "from xmcdist.__main__ import main; main()"
    )
    first = [sys.executable, "-c", code, "train", f"dataset.path={data}", f"run_dir={run}", *LINEAR]
    environment = os.environ | {"PYTHONPATH": str(Path(xmcdist.__file__).parents[1])}
    with subprocess.Popen(first, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        before = sorted(run.rglob("*"))
        with pytest.raises(
            UserError, match=rf"{run} is in use by another run: host .*, process {holder.pid}, since .*"
        ):
            _train(data, run, *LINEAR)
        assert sorted(run.rglob("*")) == before
        holder.kill()
    assert _train(data, run, *LINEAR)["metrics"]  # at once, over the dead one's lock
    assert _lines(run, "run.lock of a run that has ended without a word is taken over", f"process {holder.pid}")
    assert not (run / "run.lock").exists()


def test_a_mistake_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-data"):
        _train(tmp_path / "no-data", tmp_path / "run", *LINEAR)
    assert list(tmp_path.iterdir()) == []


# a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, that can be full."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def _grow(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("args", [LINEAR, FULL], ids=["linear", "encoder"])
def test_a_disk_that_is_full_again_and_again_costs_nothing(
    args: list[str], data: Path, disk: Path, tmp_path: Path
) -> None:
    whole = _train(data, tmp_path / "whole", *args)["metrics"]
    size, step = 64, 48 if args is LINEAR else 1000
    refused: list[str] = []
    while True:
        try:
            results = _train(data, disk / "run", *args)
            break
        except UserError as error:
            refused.append(str(error))
        size += step
        _grow(disk, size)
        assert size < 100_000
    assert results["metrics"] == pytest.approx(whole, abs=1e-6)
    assert len(refused) > 5, refused
    assert [text for text in refused if f"no space left while writing {disk}" not in text] == []
    left = [p for p in (disk / "run").rglob("*") if p.suffix in (".partial", ".damaged", ".tmp", ".old")]
    assert not left
    assert xmcdist.load(str(disk / "run" / "model"), verify=True).predict(["w1 w2"], k=1)


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run.log", "metrics.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    log = RunLog(tmp_path, World.single())
    for i in range(3):
        log.say(f"word {i}")
        log.metrics({"step": i, "loss": 0.5})
    said = capsys.readouterr().err
    assert all(f"word {i}" in said for i in range(3))
    assert said.count("run.log cannot be written") == 1
    assert said.count("metrics.jsonl cannot be written") == 1


@on_ranks(2, 3)
def test_a_full_disk_of_one_rank_is_told_by_all(rank: int, world_size: int, tmp_path: Path) -> None:
    world = World(rank, world_size, rank, world_size, "cpu")
    save = np.save
    if rank == 1:

        def full(path: Path, part: object) -> None:
            raise OSError(f"{8000} requested and {512} written")  # as numpy says it

        np.save = full
    with pytest.raises(UserError, match=r"no space left while writing .*a\.npy"):
        write_rows(tmp_path / "a.npy", np.zeros((5, 2)), world)
    np.save = save
    write_rows(tmp_path / "a.npy", np.full((5, 2), rank), world)
    assert np.load(tmp_path / "a.npy").sum() == 10 * sum(range(world_size))

    stages = StageStore(tmp_path, world, lambda _: None)
    if rank == 0:
        import xmcdist.checkpoint.stages as module

        write = module.write_json

        def no_space(path: Path, value: object) -> int:
            if path.name == "stage.json":
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, value)

        module.write_json = no_space
    with pytest.raises(UserError, match=r"no space left while writing .*stage\.json.*finished stages are intact"):
        stages.run("a", {}, lambda folder: write_rows(folder / "a.npy", np.zeros((5, 2)), world))
    if rank == 0:
        module.write_json = write
    stages.run("a", {}, lambda folder: write_rows(folder / "a.npy", np.zeros((5, 2)), world))
    assert (tmp_path / "stages" / "a" / "a.npy").exists()


# a shared folder that shows a file late


def test_a_file_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    later = threading.Timer(0.3, lambda: path.write_bytes(b"12"))
    later.start()
    wait_for(path, size=2)
    assert path.read_bytes() == b"12"
    later.join()


def test_one_that_never_appears_is_told_with_node_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x"
    with pytest.raises(UserError, match=rf"node .* does not see {path} as it was written, after 0 s: .*actimeo"):
        wait_for(path, limit_s=0.2)
    assert f"waiting for the shared folder to show {path}" in capsys.readouterr().err
    path.write_bytes(b"1")
    with pytest.raises(UserError, match="does not see"):
        wait_for(path, size=2, limit_s=0.05)  # an old size is as bad as an old name
    with pytest.raises(UserError, match="does not see"):
        wait_for(path, ready=lambda: False, limit_s=0.05)


@on_ranks(2)
@pytest.mark.parametrize("never", [False, True])
def test_a_node_that_sees_a_stage_late_does_not_open_it_before(
    rank: int, world_size: int, never: bool, tmp_path: Path
) -> None:
    world = World(rank, world_size, 0, 1, "cpu")  # a node each
    seen, stat, asked = threading.Event(), os.stat, []

    def late(path: Any, **how: Any) -> os.stat_result:
        if "stages" in str(path) and str(path).endswith(("stage.json", "b.bin")) and not seen.is_set():
            asked.append(str(path))
            if len(asked) > 3 and not never:
                seen.set()
            raise FileNotFoundError(path)
        return stat(path, **how)

    def body(folder: Path) -> None:
        (folder / f"part-{rank}").write_bytes(bytes(rank + 1))
        seen_by_all(folder, world)
        assert (folder / f"part-{1 - rank}").stat().st_size == 2 - rank
        if rank == 0:
            (folder / "b.bin").write_bytes(b"123")

    if never:
        visible._LIMIT_S = 0.3
    if rank == 1:
        os.stat = late
    try:
        if never:
            with pytest.raises(UserError, match=r"does not see .*stage\.json"):  # on both
                StageStore(tmp_path, world, lambda _: None).run("a", {}, body)
            return
        place = StageStore(tmp_path, world, lambda _: None).run("a", {}, body)
    finally:
        os.stat = stat
        visible._LIMIT_S = 60.0
    assert (place / "b.bin").stat().st_size == 3
    assert rank == 0 or len(asked) > 3
