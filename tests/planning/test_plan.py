"""The arithmetic of a plan against small cases worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import ROOT
from xmcdist.config.commands import PlanConfig
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import ConfigError, UserError
from xmcdist.config.schema import EncoderConfig, RunConfig
from xmcdist.encoders.costs import EncoderCosts
from xmcdist.observability.devices import find_device
from xmcdist.pipelines.plan import make_job
from xmcdist.planning.counts import DataCounts, grown_vocabulary
from xmcdist.planning.figures import figures
from xmcdist.planning.job import Job, Machine, level_sizes
from xmcdist.planning.memory import Runtime, stages
from xmcdist.planning.projection import best_shards, scaling_tables
from xmcdist.planning.timing import stage_times, step_time
from xmcdist.planning.traffic import step_traffic

# 1000 parameters, 600 of them met by every token; 2 layers of 10, 4 heads.
COSTS = EncoderCosts(
    layers=2,
    hidden=10,
    heads=2,
    intermediate=20,
    parameters=1000,
    trained_parameters=900,
    embedding_parameters=300,
    token_weights=600,
    document_weights=100,
    pooler_trained=False,
    dropout=False,
)
COUNTS = DataCounts(1000, 100, 200, 3.0, 500, 20.0, 8.0)


def _job(ranks: int = 1, **changes: Any) -> Job:
    cfg = RunConfig(encoder=EncoderConfig(preset="tiny", max_length=16))
    cfg.tree.nr_splits = cfg.ranker_tree.nr_splits = 4
    cfg.tree.max_leaf_size = cfg.ranker_tree.max_leaf_size = 10
    cfg.engine.global_batch, cfg.engine.micro_batch = 12, 4
    cfg.matcher.steps, cfg.matcher.beam = [5, 7], 4
    for name, value in changes.items():
        group, _, field = name.partition("__")
        setattr(getattr(cfg, group), field, value)
    machine = Machine(ranks, ranks, None, 1e9, 0.5, 1.0, 1e6, 1e6, 0.0)
    return Job(cfg, COUNTS, machine, COSTS)


def test_tree_and_steps() -> None:
    job = _job(3)
    # 200 labels in leaves of at most 10: 2**5 leaf clusters, joined by fours while more than four.
    assert job.tree == [2, 8, 32, 200]
    assert [level.nodes for level in job.match_levels] == [2, 8, 32, 200]
    assert [level.steps for level in job.match_levels] == [5, 7, 7, 7]
    assert [level.rows for level in job.match_levels] == [1, 3, 11, 67]
    assert job.micro_steps == [12]  # three ranks of four documents
    assert _job(1).micro_steps == [4, 4, 4]
    assert _job(2).micro_steps == [8, 4]
    with pytest.raises(UserError, match="does not divide the 3"):
        _ = _job(3, engine__label_shards=2).shards
    with pytest.raises(UserError, match="raise it"):
        _ = _job(matcher__max_clusters=1).match_levels


def test_candidates_are_children_of_true_and_retrieved_parents() -> None:
    job = _job(negatives__scheme="man", negatives__max_active=1000)
    # Level 1: both nodes.  Level 3: beam of 4 parents of 4 children.
    assert job.match_levels[0].candidates == 2
    assert job.match_levels[2].candidates == 16
    assert _job(negatives__scheme="man", negatives__max_active=5).match_levels[2].candidates == 5


def test_traffic_of_a_step() -> None:
    job = _job(3)
    sent = step_traffic(job, job.match_levels[2])
    # 4 documents of 10 floats to two other ranks, and the same back.
    assert sent.gather == sent.scatter == 4 * 10 * 4 * 2
    # Loss and three signals, and the norm of the head: doubles, all-reduced over three ranks.
    assert sent.scalars == 2 * 32 * 2 // 3 + 2 * 8 * 2 // 3
    assert sent.replicas == 0
    assert sent.engine == pytest.approx(2 * 900 * 4 * 2 / 3)
    job = _job(4, engine__label_shards=2)
    sent = step_traffic(job, job.match_levels[2])
    assert sent.gather == 3 * 10 * 4 * 1  # three documents, one other shard
    assert sent.replicas == 2 * 16 * 10 * 4 // 2 + 2 * 16 * 4 // 2  # 16 rows and biases, twice half of them
    assert step_traffic(_job(1), _job(1).match_levels[0]).counted == 0


def test_memory_of_weights_moments_and_rows() -> None:
    def parts(ranks: int = 1, **changes: Any) -> dict[str, float]:
        return next(s for s in stages(_job(ranks, **changes), Runtime()) if s.name == "match-3").host

    whole = parts()
    assert whole["encoder weights"] == 4000
    assert whole["gradients"] == 3600
    assert whole["moments"] == 7200
    assert whole["head and its moments"] == 32 * 11 * 4 * 4  # weight, gradient, two moments of 32 rows of 10 + 1
    assert parts(4)["head and its moments"] == 8 * 11 * 4 * 4
    assert parts(4, engine__label_shards=2)["head and its moments"] == 16 * 11 * 4 * 4
    cut = parts(4, engine__name="zero1")
    assert cut["moments"] == 1800
    assert cut["encoder weights"] == 4000
    assert parts(4, engine__name="zero3")["encoder weights"] == 2000
    assert parts(4, engine__name="fsdp2")["encoder weights"] == 1000
    assert parts(checkpoint__every_steps=2)["checkpoint copy"] == 4000 + 7200 + 32 * 11 * 4 * 3
    assert parts(checkpoint__every_steps=100)["checkpoint copy"] == 0
    assert parts(matcher__validation_fraction=0.1)["engine buffers"] == 4000


def test_time_of_a_step() -> None:
    job = _job(1)
    time = step_time(job, job.match_levels[0])
    token = 16 * 2 * 600 + 4 * 2 * 10 * 16**2 + 2 * 100  # forward, one document
    assert time.encoder == pytest.approx(12 * (3 * token - 2 * 2 * 100) / 5e8)
    assert time.gather == time.reduction == 0
    assert step_time(_job(4), _job(4).match_levels[0]).gather > 0


def test_what_does_not_fit_is_told_with_the_setting() -> None:
    large = replace(COSTS, parameters=10**9, trained_parameters=10**9, hidden=4096, intermediate=16384, layers=40)
    gpu = find_device("l4")
    assert gpu is not None
    machine = Machine(4, 4, gpu, 1e14, 0.4, 4.0, 1e10, 1e10, 0.0)
    job = replace(_job(4, engine__name="ddp", encoder__max_length=512), encoder=large, machine=machine)
    (told,) = figures(job, Runtime())["does_not_fit"]
    assert "GB of the GPU's 24.0 GB" in told
    for setting in ("engine.micro_batch=1", "encoder.gradient_checkpointing=true", "engine=zero3"):
        assert setting in told
    assert figures(_job(), Runtime())["does_not_fit"] == []


def test_where_the_matcher_finds_the_clusters_rankers_are_for_the_labels_alone() -> None:
    by_rankers, by_matcher = _job(), _job(ranker__clusters_by="matcher")
    assert [level.nodes for level in by_matcher.match_levels] == by_matcher.tree[:-1]
    assert len(by_rankers.match_levels) == len(by_rankers.tree)
    seconds = [{s.name: s.seconds for s in stage_times(job)} for job in (by_rankers, by_matcher)]
    assert set(seconds[0]) - set(seconds[1]) == {"ranker_tree", f"match-{len(by_rankers.tree)}"}
    assert 0 < seconds[1]["rank"] < seconds[0]["rank"]
    assert "ranker_tree" not in {stage["name"] for stage in figures(by_matcher, Runtime())["stages"]}


def test_vocabulary_grows_by_a_power() -> None:
    assert grown_vocabulary(1000, 2000, 100, 200) == 4000  # twice for twice
    assert grown_vocabulary(1000, 1000, 100, 10_000) == 1000
    assert grown_vocabulary(1000, 1500, 100, 50) == 1500


@pytest.mark.parametrize("path", sorted(ROOT.glob("conf/counts/*_*.yaml")), ids=lambda p: p.stem)
def test_every_published_experiment_plans_without_data(path: Path) -> None:
    run = compose_run([f"experiment=xr_transformer_{path.stem}", "dataset.path=none", "encoder.name=bert-base-uncased"])
    cfg: PlanConfig = compose_run([f"counts={path.stem}", "gpu=h100", "gpus=8"], config_name="plan")
    plan = figures(make_job(run, cfg), Runtime())
    assert plan["tree"][-1] == cfg.counts.labels
    assert plan["tree"][0] == run.tree.min_codes
    assert plan["does_not_fit"] == []
    assert plan["peak_device_bytes"] > 2e9
    assert plan["steps"] == sum(level["steps"] for level in plan["levels"])
    assert level_sizes(plan["counts"]["labels"], run.ranker_tree) == plan["ranker_tree"]


def test_faults_are_told_at_once() -> None:
    cfg = PlanConfig(gpu="h1000", network="ndx", gpus=0, utilisation=2.0)
    cfg.counts.documents = 5
    with pytest.raises(ConfigError) as told:
        make_job(RunConfig(), cfg)
    for text in ("did you mean h100?", "did you mean ndr?", "gpus=0", "utilisation=2.0", "counts.labels go together"):
        assert text in str(told.value)


def test_the_command_prints_json(tmp_path: Path) -> None:
    given = ["counts.documents=1000", "counts.labels=500", "counts.labels_per_document=3", "encoder=none"]
    command = [sys.executable, "-m", "xmcdist", "plan", "--json", f"output={tmp_path / 'plan.json'}", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "plan.json").read_text())
    assert [s["name"] for s in json.loads(done.stdout)["stages"]] == ["features", "tree", "linear"]


def test_the_scaling_page_holds_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling_tables() in page


def test_more_labels_take_more_memory_or_more_shards() -> None:
    one, ten = (best_shards(n, 64, 2048, COSTS) for n in (3_000_000, 30_000_000))
    assert one is not None
    assert ten is not None
    assert (ten.memory, ten.shards) > (one.memory, 0)
    assert ten.time.total > one.time.total
    assert best_shards(10**10, 8, 256, replace(COSTS, hidden=768)) is None


def test_labels_in_several_clusters_are_trained_again() -> None:
    plain, again = _job(), _job(overlap__copies=2, overlap__rounds=3)
    once, more = ({s.name: s.seconds for s in stage_times(job)} for job in (plain, again))
    assert more.keys() - once.keys() == {"rank_overlap"}
    assert 3 * 2 * once["rank"] < more["rank_overlap"] < 3 * 4.01 * once["rank"]  # twice the labels, of more documents
    kept = {s.name: s.host for s in stages(again)}
    assert kept["rank_overlap"]["rankers"] == 2 * kept["rank"]["rankers"]
    tuned = _job(overlap__copies=2, overlap__fine_tune=True)
    times = {s.name: s for s in stage_times(tuned)}
    assert times["match_overlap"].steps == sum(s.steps for s in times.values() if s.name.startswith("match-"))
