"""kill -9 of every process in the middle of a level and of the rankers; the same command goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import kill_when, launch, start
from tests.helpers.toy import TINY_RUN, write_text_folder

ARGS = [
    *TINY_RUN,
    "encoder.dropout=0.1",
    "matcher.steps=[12,40]",
    "checkpoint.every_steps=5",
    "negatives.scheme=tfn+man",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("kill") / "data")


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> dict[str, float]:
    run = data.parent / "undisturbed"
    launch(2, "train", f"dataset.path={data}", f"run_dir={run}", *ARGS, log=data.parent / "undisturbed.log")
    return _metrics(run)


def _metrics(run: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((run / "results.json").read_text())["metrics"]
    return metrics


@pytest.mark.distributed
def test_killed_in_the_middle_of_level_2_and_of_the_rankers(data: Path, undisturbed: dict[str, float]) -> None:
    run, log = data.parent / "killed", data.parent / "killed.log"
    args = ("train", f"dataset.path={data}", f"run_dir={run}", *ARGS)
    in_level_2 = run / "stages" / "match-2.partial" / "checkpoints"
    kill_when(start(2, *args, log=log), log, lambda: any(in_level_2.glob("step-[0-9]*/state.json")))
    assert not (run / "stages" / "match-2").exists()

    rankers = run / "stages"
    kill_when(start(2, *args, log=log), log, lambda: (rankers / "rank-2.partial").exists())
    text = log.read_text()
    assert "match-1: done before, skipped" in text
    assert "going on at step" in text  # not from the start of the level
    assert not (rankers / "rank-3" / "stage.json").exists()
    assert not (run / "results.json").exists()

    launch(2, *args, log=log)
    assert "rank-1: done before, skipped" in log.read_text()
    assert _metrics(run) == pytest.approx(undisturbed, abs=1e-6)
    assert not list(rankers.glob("*.partial"))
