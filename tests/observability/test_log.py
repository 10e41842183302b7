from __future__ import annotations

import json
from pathlib import Path

import pytest

from xmcdist.observability.environment import environment_report, peak_memory_mb, versions
from xmcdist.observability.log import RunLog
from xmcdist.parallel.launch import World


def test_rank_0_writes_lines_and_metrics_the_others_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (1, 0):
        log = RunLog(tmp_path, World(rank, 2, rank, 2, "cpu"))
        log.say(f"hello from {rank}")
        log.metrics({"loss": 0.5, "rank": rank})
    assert "hello from 0" in capsys.readouterr().err
    assert "hello from 1" not in (tmp_path / "run.log").read_text()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["rank"], r["loss"]) for r in rows] == [(0, 0.5)]


def test_a_warning_is_seen_from_any_rank_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, world_size in ((1, 2), (0, 2), (0, 1)):
        RunLog(tmp_path, World(rank, world_size, rank, world_size, "cpu")).warn(f"odd thing {rank} of {world_size}")
    said = capsys.readouterr().err
    assert "warning: rank 1: odd thing 1 of 2" in said
    assert "warning: odd thing 0 of 1" in said
    kept = (tmp_path / "run.log").read_text()
    assert "odd thing 1" not in kept  # many writers of one file on a shared disk tear its lines
    assert "rank 0: odd thing 0 of 2" in kept


def test_the_report_names_versions_and_memory() -> None:
    assert "python" in versions()
    assert "cpu cores" in environment_report()
    assert 10 < peak_memory_mb() < 100_000
