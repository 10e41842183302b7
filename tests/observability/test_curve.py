"""metrics.jsonl: one strictly increasing axis through restarts, whatever a kill left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xmcdist.observability.curve import MetricsFile, read_rows, series_of


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_of_before_a_restart_are_not_written_again_series_by_series(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in (2, 4, 6):
        assert first.append({"time": 1.0, "global_step": step, "level": 1, "loss": 1 / step})
    assert first.append({"global_step": 4, "level": 1, "validation_beam_recall": 0.5})
    again = MetricsFile(path)
    written = [again.append({"time": 2.0, "global_step": step, "loss": 9.0}) for step in (2, 4, 6, 8)]
    assert written == [False, False, False, True]
    assert again.append({"global_step": 6, "validation_beam_recall": 0.6})  # was killed before this one
    assert not again.append({"global_step": 8, "loss": 9.0})  # nor twice within one start
    steps = [row["global_step"] for row in _rows(path) if "loss" in row]
    assert steps == [2, 4, 6, 8]
    assert again.step == 8


@pytest.mark.parametrize("before", [b"", b'{"global_step": 1, "loss": 1.0}\n', b"x" * 70_000 + b"\n"])
def test_a_half_written_last_line_is_cut_off(tmp_path: Path, before: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before + b'{"global_step": 2, "lo')
    assert MetricsFile(path).append({"global_step": 2, "loss": 0.5})
    assert path.read_bytes() == before + b'{"global_step": 2, "loss": 0.5}\n'


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"global_step": 2, "loss": 0.5}')
    file = MetricsFile(path)
    assert not file.append({"global_step": 2, "loss": 0.5})
    assert file.append({"global_step": 3, "loss": 0.4})
    assert [row["global_step"] for row in _rows(path)] == [2, 3]


def test_what_a_run_has_once_is_known_by_stage_level_and_name(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {"histogram": "cluster_size", "level": 1, "counts": [1]}
    assert MetricsFile(path).append(row, once=True)
    again = MetricsFile(path)
    assert not again.append(row, once=True)
    assert again.append(row | {"level": 2}, once=True)
    assert again.append(row)  # a stage that is made again is told again


def test_lines_that_are_no_rows_are_left_out_and_what_is_no_number_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe\n[1]\n{"loss": 1}\n')
    MetricsFile(path).append({"global_step": 1, "loss": float("nan")})
    assert list(read_rows(path)) == [{"loss": 1}, {"global_step": 1, "loss": None}]


def test_nothing_is_touched_before_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("half")
    MetricsFile(path)
    assert path.read_text() == "half"


def test_a_series_is_named_by_what_is_measured_first() -> None:
    assert series_of({"time": 1, "global_step": 2, "level": 1, "loss": 1, "lr": 2}) == "loss"
    assert series_of({"stage": "tree", "seconds": 1}) == "seconds"
