"""A plan against the run itself: what is exact must be equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import launch
from tests.helpers.toy import TINY_RUN, write_text_folder
from xmcdist.config.commands import PlanConfig
from xmcdist.config.compose import compose_run
from xmcdist.pipelines.plan import make_job
from xmcdist.planning.traffic import step_traffic
from xmcdist.trees.label_tree import LabelTree


@pytest.mark.distributed
def test_tree_steps_and_traffic_are_those_of_the_run(tmp_path: Path) -> None:
    data, run_dir, log = write_text_folder(tmp_path / "data"), tmp_path / "run", tmp_path / "log"
    args = [f"dataset.path={data}", f"run_dir={run_dir}", *TINY_RUN, "matcher.steps=[3]", "checkpoint.every_steps=0"]
    args += ["engine.global_batch=15", "evaluation.linear_baseline=false", "until=match"]
    job = make_job(compose_run(args, world_size=2), PlanConfig(gpu="cpu", gpus=2))
    launch(2, "train", *args, log=log)
    tree = LabelTree.load(run_dir / "stages" / "tree" / "tree")
    assert job.tree == [tree.level_size(t) for t in range(1, tree.depth + 1)]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for level in job.match_levels:
        steps = [r for r in rows if r.get("level") == level.level and "sent_bytes_per_step" in r]
        assert [r["step"] for r in steps] == list(range(1, level.steps + 1))
        first, *later = [r["sent_bytes_per_step"] for r in steps]
        assert first == step_traffic(job, level).counted
        # Ranks agree on each window's own figures after it is closed: these few bytes are in the next.
        assert all(first <= sent <= first + 100 for sent in later)
        assert max(r["active_candidates"] for r in steps) <= level.candidates
    features = json.loads((run_dir / "stages" / "features" / "X.trn" / "shape.json").read_text())
    assert job.counts.features == features[1]
    assert job.counts.documents == features[0]
