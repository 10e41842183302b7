"""``until``: the stages of one run as several, on nodes that differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.toy import TINY_RUN, write_text_folder
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import ConfigError
from xmcdist.parallel.launch import World
from xmcdist.pipelines import precision
from xmcdist.pipelines.train import train

STAGES = {
    "prepare": [],
    "tree": ["features", "tree"],
    "linear": ["linear-1", "linear-2", "linear-3"],
    "match": ["embed", "match-1", "match-2", "match-3", "tokens"],
    "rank": ["rank-1", "rank-2", "rank-3", "ranker_tree"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("until") / "data", train=160, test=40)


def _train(data: Path, name: str, *more: str) -> dict[str, Any]:
    settings = [*TINY_RUN, f"dataset.path={data}", f"run_dir={data.parent / name}", "matcher.steps=[4]", *more]
    return train(compose_run(settings), World.single())


def test_a_chain_of_runs_is_one_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("engine=ddp", "engine.precision=auto")
    run_dir, seen = data.parent / "chain", set[str]()
    for until, stages in STAGES.items():
        # Only the node of the matcher has bf16: what it decides, holds for the others.
        monkeypatch.setattr(precision, "has_bf16", lambda _, here=until == "match": here)
        if until == "rank":  # a stage that computes is lost, and made again where bf16 is not at hand
            shutil.rmtree(run_dir / "stages" / "embed")
        assert _train(data, "chain", *asked, f"until={until}") == {}
        committed = {p.parent.name for p in run_dir.glob("stages/*/stage.json")}
        assert sorted(committed - seen) == stages
        seen = committed
        assert not (run_dir / "results.json").exists()
    assert (run_dir / "prepared" / "manifest.json").exists()
    assert json.loads((run_dir / "precision.json").read_text()) == {"precision": "bf16"}
    monkeypatch.setattr(precision, "has_bf16", lambda _: False)
    chained = _train(data, "chain", *asked)
    assert sorted(chained["stages_skipped"]) == sorted(seen)
    whole = _train(data, "whole", "engine=ddp", "engine.precision=bf16")
    assert chained["metrics"] == whole["metrics"]
    assert chained["baseline"] == whole["baseline"]


def test_without_a_baseline_until_linear_ends_after_the_tree(data: Path) -> None:
    """Without a baseline to train there is nothing between tree and matcher, and that is no fault."""
    _train(data, "no-baseline", "until=linear", "evaluation.linear_baseline=false")
    run_dir = data.parent / "no-baseline"
    assert {p.parent.name for p in run_dir.glob("stages/*/stage.json")} == {"features", "tree"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["until=math"], "until=math is none of prepare, tree, linear, match, rank; did you mean match?"),
        (["until=rank", "encoder=none"], "until=rank has no stage to end after with encoder=none: use until=linear"),
    ],
)
def test_mistakes_are_told(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as told:
        compose_run(settings)
    assert str(told.value) == said
