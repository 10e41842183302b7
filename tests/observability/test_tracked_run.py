"""A run that dies between two checkpoints, and its curves after it went on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.toy import TINY_RUN, write_text_folder
from xmcdist.config.compose import compose_run
from xmcdist.observability.board import bring_in
from xmcdist.parallel.launch import World
from xmcdist.pipelines.level_log import LevelLog
from xmcdist.pipelines.train import train

SETTINGS = [
    *TINY_RUN,
    "matcher.steps=[8,6]",
    "matcher.validation_fraction=0.2",
    "matcher.eval_every=4",
    "checkpoint.every_steps=4",
    "tracker=tensorboard",
]
WINDOW = {
    "time", "global_step", "level", "step", "total", "loss", "lr", "head_lr", "grad_norm", "encoder_grad_norm",
    "head_grad_norm", "docs_per_s", "tokens_per_s", "padding_percent", "mfu_percent", "data_wait_percent",
    "collective_percent", "collective_s", "sent_bytes_per_step", "active_candidates", "memory_mb", "skipped_steps",
    "eta_s",
}  # fmt: skip


class _PowerCutError(Exception):
    pass


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_a_resumed_run_has_one_curve_and_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = write_text_folder(tmp_path / "data"), tmp_path / "run"
    cfg = compose_run([f"dataset.path={data}", f"run_dir={run}", *SETTINGS])
    window = LevelLog.window

    def dies(self: LevelLog, values: dict[str, Any]) -> None:
        window(self, values)
        if (values["level"], values["step"]) == (2, 6):
            raise _PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(LevelLog, "window", dies)
        with pytest.raises(_PowerCutError):
            train(cfg, World.single())
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"global_step": 14, "lev')  # as a kill leaves it
    results = train(cfg, World.single())

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    windows = [row for row in rows if "loss" in row]
    assert [row["global_step"] for row in windows] == list(range(1, 8 + 6 + 6 + 1))
    assert [(row["level"], row["step"]) for row in windows] == [
        (level, step) for level, steps in ((1, 8), (2, 6), (3, 6)) for step in range(1, steps + 1)
    ]
    assert "goes on after step 14 of the whole run" in (run / "run.log").read_text()
    assert all(row.keys() == WINDOW for row in windows)
    assert all(0 < row["mfu_percent"] < 100 and row["tokens_per_s"] > row["docs_per_s"] for row in windows)
    assert all(row["collective_percent"] < 50 for row in windows)  # of one process: no backward pass among it
    norms = [(row["encoder_grad_norm"] ** 2 + row["head_grad_norm"] ** 2, row["grad_norm"] ** 2) for row in windows]
    assert all(parts == pytest.approx(whole) for parts, whole in norms)

    held = [(row["global_step"], row["step"]) for row in rows if "validation_beam_recall" in row]
    assert held == [(4, 4), (8, 8), (12, 4), (14, 6), (18, 4), (20, 6)]
    ends = [(row["global_step"], row["level"]) for row in rows if "hardest_clusters" in row]
    assert ends == [(8, 1), (14, 2), (20, 3)]
    stages = [row["stage"] for row in rows if "seconds" in row]
    assert len(stages) == len(set(stages))
    assert set(results["seconds"]) == set(stages)
    shapes = [row["histogram"] for row in rows if "histogram" in row]
    assert len(shapes) == len(set(shapes))
    assert {"label_frequency", "cluster_size/tree/level-1", "cluster_size/ranker_tree/level-1"} <= set(shapes)
    assert {row["stage"] for row in rows if "ranker_cpu_s" in row} >= {"linear-1", "rank-1"}
    (final,) = [row for row in rows if "test" in row]
    assert final["test"] == results["metrics"]
    assert final["test_linear_only"] == results["baseline"]
    assert "head/P@1" in final["test"]

    drawn = _scalars(run / "tensorboard")
    assert [step for step, _ in drawn["train/loss"]] == list(range(1, 21))
    assert [step for step, _ in drawn["loss/level-2"]] == list(range(9, 15))
    assert [step for step, _ in drawn["validation/P@1"]] == [step for step, _ in held]
    assert drawn["test/P@1"][-1][1] == pytest.approx(results["metrics"]["P@1"])

    assert bring_in(run, "tensorboard", tmp_path / "board") == len(rows)  # what xmcdist board shows of any run
    brought = _scalars(tmp_path / "board" / "run")
    assert {tag: points for tag, points in brought.items() if tag.startswith(("train", "validation"))} == {
        tag: points for tag, points in drawn.items() if tag.startswith(("train", "validation"))
    }
