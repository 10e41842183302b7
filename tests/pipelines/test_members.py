"""An ensemble as one experiment: members are runs of their own, and what they make together is what `evaluate` says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xmcdist
from tests.helpers.launch import launch
from tests.helpers.toy import write_text_folder
from xmcdist.config.commands import EvaluateConfig, PredictConfig
from xmcdist.config.compose import compose_run, compose_unchecked, conf_dir, to_object
from xmcdist.config.errors import ConfigError, UserError
from xmcdist.config.members import compose_members
from xmcdist.config.schema import DatasetConfig, RunConfig
from xmcdist.encoders.embed import TextEmbedder
from xmcdist.inference.ensemble import Ensemble
from xmcdist.parallel.launch import World
from xmcdist.pipelines.doctor_folders import model_checks
from xmcdist.pipelines.evaluation import evaluate_model
from xmcdist.pipelines.members import train_members
from xmcdist.pipelines.predict import predict_file
from xmcdist.pipelines.train import train
from xmcdist.serving.folders import count_labels
from xmcdist.training import preemption

SMALL = [
    "tree.flat=true",
    "tree.max_leaf_size=5",
    "matcher.max_clusters=8",
    "engine.threads=1",
    "evaluation.linear_baseline=false",
]
TINY = "encoder=tiny,encoder.dropout=0.0,matcher.steps=[6],matcher.beam=4,optimizer.lr=2e-3,engine.global_batch=12"
THREE = [
    "+members.pifa=[]",
    "+members.seed=['seed=3']",
    "+members.neural=['tree.document_embeddings=${run_dir}/members/pifa']",
]
LINEAR = ["encoder=none", "+members.a=[]", "+members.b=['ranker.Cp=[4.0]']"]
FULL = [*SMALL, *THREE, *TINY.replace("[6]", "[4]").split(",")]


def _words(data: Path, run: Path, *words: str) -> list[str]:
    return [f"dataset.path={data}", f"run_dir={run}", *SMALL, *words]


def _go(data: Path, run: Path, *words: str) -> dict[str, Any]:
    composed = compose_unchecked(_words(data, run, *words))
    cfg = to_object(composed)
    return train_members(cfg, compose_members(_words(data, run, *words), cfg, composed=composed), World.single())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("members") / "data", train=120, labels=20)


@pytest.fixture(scope="module")
def done(data: Path) -> tuple[Path, dict[str, Any]]:
    """Three members with encoders, joined; the third's tree is made of the first's embeddings."""
    return data.parent / "done", _go(data, data.parent / "done", *FULL)


def _evaluate(data: Path, model: Any, **settings: Any) -> dict[str, float]:
    cfg = EvaluateConfig(model=model, dataset=DatasetConfig(path=str(data)), **settings)
    return evaluate_model(cfg, World.single())


def test_an_ensemble_is_measured_as_evaluate_measures_its_members(
    data: Path, done: tuple[Path, dict[str, Any]]
) -> None:
    run, results = done
    folders = [str(run / "members" / name / "model") for name in ("pifa", "seed", "neural")]
    assert results["metrics"] == pytest.approx(_evaluate(data, folders), abs=1.7)  # a document; rounding of embeddings
    assert results["metrics"]["P@1"] > 60
    assert (results["complete"], results["missing"], list(results["members"])) == (
        True,
        [],
        ["pifa", "seed", "neural"],
    )
    for name, told in results["members"].items():
        own = json.loads((run / "members" / name / "results.json").read_text())
        assert own["metrics"] == told["metrics"]
    assert len({tuple(told["metrics"].values()) for told in results["members"].values()}) == 3  # they differ
    assert json.loads((run / "results.json").read_text())["metrics"] == results["metrics"]
    again = _go(data, run, *FULL, "ensemble=rank")
    assert (run / "run.log").read_text().count("finished before, skipped") == 3
    assert again["metrics"] != results["metrics"]
    assert again["metrics"] == pytest.approx(_evaluate(data, folders, ensemble="rank"), abs=1.7)
    assert isinstance(model := xmcdist.load(str(run / "model")), Ensemble)
    assert model.method == "rank"


def test_linear_members_are_measured_to_the_last_digit(data: Path, tmp_path: Path) -> None:
    for method in ("average", "round_robin"):
        results = _go(data, tmp_path / "run", *LINEAR, f"ensemble={method}")
        members = [str(tmp_path / "run" / "members" / name / "model") for name in "ab"]
        assert results["metrics"] == _evaluate(data, members, ensemble=method)
        assert results["metrics"] == _evaluate(data, str(tmp_path / "run" / "model"))
    assert results["members"]["a"]["metrics"] != results["members"]["b"]["metrics"]


def test_members_share_data_and_equal_stages(done: tuple[Path, dict[str, Any]]) -> None:
    run, _ = done
    assert (run / "prepared" / "manifest.json").is_file()
    pifa, seed, neural = (run / "members" / name for name in ("pifa", "seed", "neural"))
    for folder in (pifa, seed, neural):
        assert not (folder / "prepared").exists()

    def inode(folder: Path, place: str) -> int:
        return (folder / "stages" / place).stat().st_ino

    for place in ("features/X.trn/data.npy", "tokens/tokens.tst/lengths.npy"):
        assert inode(pifa, place) == inode(seed, place) == inode(neural, place)
    assert inode(pifa, "match-1/E.npy") != inode(seed, "match-1/E.npy")
    assert "taken from there" not in (pifa / "run.log").read_text()


def test_the_model_folder_can_be_moved_and_copied_by_itself(
    data: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = done
    texts = (data / "X.tst.txt").read_text().splitlines()[:4]
    want = xmcdist.load(str(run / "model")).predict(texts, k=3)
    assert count_labels(str(run / "model")) == 20
    assert model_checks(run / "model", verify=True)[0][1] == "ok"
    shutil.copytree(run / "model", tmp_path / "elsewhere")
    assert xmcdist.load(str(tmp_path / "elsewhere"), verify=True).predict(texts, k=3) == want
    with pytest.raises(UserError, match="is an ensemble itself: name the folders of its members"):
        xmcdist.load([str(tmp_path / "elsewhere"), str(run / "members" / "seed" / "model")])
    shutil.rmtree(tmp_path / "elsewhere" / "members" / "seed")
    with pytest.raises(UserError, match=r"elsewhere is an ensemble of 3 models, of which these are not there: seed \("):
        xmcdist.load(str(tmp_path / "elsewhere"))


def test_one_encoder_at_a_time_gives_the_same_bits(
    data: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = done
    alive, most = 0, 0

    class Counted(TextEmbedder):
        def __init__(self, *args: Any, **more: Any) -> None:
            nonlocal alive, most
            super().__init__(*args, **more)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    monkeypatch.setattr("xmcdist.encoders.embed.TextEmbedder", Counted)
    lines = {}
    for one in (True, False):
        alive = most = 0
        out = tmp_path / f"{one}.jsonl"
        words = {"model": str(run / "model"), "input": str(data / "X.tst.txt"), "output": str(out), "batch": 40}
        predict_file(PredictConfig(**words, one_encoder=one), World.single())
        lines[one] = out.read_text()
        assert most == (1 if one else 3)
    assert lines[True] == lines[False]
    assert len(lines[True].splitlines()) == 60


def test_a_changed_member_is_trained_anew_and_the_others_are_not(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = _go(data, run, *LINEAR)
    stamp = {name: (run / "members" / name / "results.json").stat().st_mtime_ns for name in "ab"}
    other = [LINEAR[0], LINEAR[1], "+members.b=['ranker.Cp=[4.0]','ranker.threshold=0.3']"]
    second = _go(data, run, *other)
    assert second["members"]["a"] == first["members"]["a"]
    assert second["members"]["b"]["metrics"] != first["members"]["b"]["metrics"]
    assert (run / "members" / "a" / "results.json").stat().st_mtime_ns == stamp["a"]
    log = (run / "members" / "b" / "run.log").read_text()
    assert "tree: made from the same as in" in log  # what the change does not touch is not made again
    third = _go(data, run, *LINEAR)
    assert third["metrics"] == first["metrics"]
    assert (run / "members" / "b" / "results.json").stat().st_mtime_ns == stamp["b"]  # it was kept


def test_members_may_be_jobs_of_their_own_and_a_missing_one_is_named(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"no member is finished \(a: not begun; b: not begun\)"):
        _go(data, run, *LINEAR, "only_members=[]")
    assert _go(data, run, *LINEAR, "only_members=[b]") == {}
    assert not (run / "model").exists()
    assert "not finished: a. The ensemble is made when all are" in (run / "run.log").read_text()
    results = _go(data, run, *LINEAR, "only_members=[]")
    assert (results["missing"], results["complete"], list(results["members"])) == (["a"], False, ["b"])
    assert results["metrics"]["P@1"] == results["members"]["b"]["metrics"]["P@1"]  # of one member: its own
    log = (run / "run.log").read_text()
    assert "member a is missing from the ensemble: not begun; `" in log
    assert "only_members=[a]" in log
    assert "INCOMPLETE ensemble of 1 of 2 members" in log
    assert json.loads((run / "model" / "ensemble.json").read_text())["missing"] == ["a"]
    (run / "members" / "b" / "test_scores" / "labels.npy").unlink()
    results = _go(data, run, *LINEAR, "only_members=[a]")  # b has to be measured again
    assert results == {}
    results = _go(data, run, *LINEAR, "only_members=[b]")  # now all are finished
    assert (results["missing"], results["complete"]) == ([], True)
    assert results["metrics"] == _evaluate(data, [str(run / "members" / name / "model") for name in "ab"])


def test_a_member_that_needs_another_says_so(data: Path, tmp_path: Path) -> None:
    needy = "+members.neural=['tree.document_embeddings=${run_dir}/members/pifa']"
    with pytest.raises(ConfigError, match="member neural needs member pifa, which is not trained before it"):
        compose_run(_words(data, tmp_path / "run", "encoder=tiny", needy, "+members.pifa=[]"))
    words = ["encoder=tiny", "+members.pifa=[]", needy, "only_members=[neural]"]
    with pytest.raises(
        UserError, match=r"neural needs member pifa \(tree.document_embeddings=.*\), which is not begun"
    ):
        _go(data, tmp_path / "run", *words)


def test_until_stops_every_member(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    needy = "+members.c=['tree.path=${run_dir}/members/a/stages/tree/tree']"
    assert _go(data, run, *LINEAR, needy, "until=tree") == {}
    assert "member c: left for later, as until=tree does not finish a" in (run / "run.log").read_text()
    assert not (run / "members" / "c").exists()
    for name in "ab":
        assert {p.name for p in (run / "members" / name / "stages").iterdir()} == {"features", "tree"}
    assert not (run / "model").exists()


def test_folders_of_another_kind_are_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "stages").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run of one model"):
        _go(data, tmp_path / "one", *LINEAR)


@pytest.mark.distributed
def test_stopped_in_the_second_member_and_ended_on_three_processes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, log, want = tmp_path / "run", tmp_path / "log", _go(data, tmp_path / "undisturbed", *LINEAR)
    begun: list[str] = []

    def asked_to_end(cfg: RunConfig, world: World, **more: Any) -> dict[str, Any]:
        begun.append(Path(cfg.run_dir).name)
        if begun == ["a", "b"]:
            os.kill(os.getpid(), signal.SIGTERM)
            while preemption.received() is None:
                time.sleep(0.01)
        return train(cfg, world, **more)

    with monkeypatch.context() as patch, preemption.handled():
        patch.setattr("xmcdist.pipelines.members.train", asked_to_end)
        with pytest.raises(preemption.Preempted, match="before linear-1"):
            _go(data, run, *LINEAR)
    assert not (run / "members" / "b" / "results.json").exists()
    stamp = (run / "members" / "a" / "results.json").stat().st_mtime_ns
    (run / "preempted.json").write_text("{}")  # as the command leaves it
    launch(3, "train", *_words(data, run, *LINEAR), log=log)
    assert not (run / "preempted.json").exists()
    assert "member a: finished before, skipped" in log.read_text()
    assert (run / "members" / "a" / "results.json").stat().st_mtime_ns == stamp
    got = json.loads((run / "results.json").read_text())
    assert got["world_size"] == 3
    assert got["metrics"] == pytest.approx(want["metrics"], rel=1e-12)
    assert got["members"]["b"]["metrics"] == pytest.approx(want["members"]["b"]["metrics"], rel=1e-12)
    for name in ("scores", "labels"):
        one, three = (
            np.load(r / "members" / "b" / "test_scores" / f"{name}.npy") for r in (tmp_path / "undisturbed", run)
        )
        assert np.array_equal(one, three)


def test_what_counts_more(tmp_path: Path) -> None:
    """The command line over an experiment's members, a member of the command line over its other words."""
    told = (
        "# @package _global_\ndefaults: [{override /encoder: tiny}]\n"
        "members: {a: [matcher.beam=3, seed=5], b: [encoder=none]}\n"
    )
    conf = tmp_path / "conf"
    shutil.copytree(conf_dir(), conf)
    (conf / "experiment" / "two.yaml").write_text(told)

    def members(*words: str) -> dict[str, Any]:
        given = ["experiment=two", f"run_dir={tmp_path / 'run'}", *words]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XMCDIST_CONF", str(conf))
            composed = compose_unchecked(given)
            return compose_members(given, to_object(composed), composed=composed)

    found = members()
    assert (found["a"].matcher.beam, found["a"].seed, found["a"].tree.seed) == (3, 5, 5)
    assert (found["a"].encoder.preset, found["b"].encoder.preset) == ("tiny", "none")
    assert found["a"].run_dir == str(tmp_path / "run" / "members" / "a")
    assert found["a"].dataset.prepared == str(tmp_path / "run" / "prepared")
    found = members("matcher.beam=7", "+members.c=['matcher.beam=9']", "~members.b")
    assert list(found) == ["a", "c"]
    assert (found["a"].matcher.beam, found["a"].seed, found["c"].matcher.beam) == (7, 5, 9)
    found = members("debug=smoke", "matcher.beam=6", "~members.b")
    assert (found["a"].matcher.steps, found["a"].matcher.beam) == ([4], 6)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["+members.a=['matcher.beem=3']"], "member a: unknown setting 'matcher.beem'; did you mean 'matcher.beam'"),
        (["+members.a=['matcher.beam=0']"], "member a: matcher.beam=0 must be at least 1"),
        (["+members.a=['encoder=tny']"], "member a: unknown choice encoder=tny; did you mean 'tiny'"),
        (["+members.a=['dataset.test_fraction=0.3']"], "member a: dataset differs from the run's"),
        (["+members.a=[]", "only_members=[b]"], "b is none of a"),
        (["only_members=[b]"], "needs members: this run has none"),
        (["+members.a=[]", "ensemble=averge"], "did you mean average"),
        (["members.a=[]"], r"a member is added by \+members.NAME="),
        (["+members={a%: []}"], "'a%' must be made of letters"),
    ],
)
def test_faults_of_members_are_told_before_anything_begins(words: list[str], answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        compose_run(words)
