"""Every file of conf/ composes, and every fault of a configuration is told at once."""

from __future__ import annotations

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from xmcdist.config import commands, schema
from xmcdist.config.compose import compose_run, conf_dir
from xmcdist.config.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
NEEDS = {
    "hf": ["encoder.name=x"],
    "greedy_validation": ["matcher.validation_fraction=0.1"],
}
GROUPS = [p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("hydra", "site", "debug", "experiment")]


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_every_choice_composes(group: str) -> None:
    for path in sorted((CONF / group).glob("*.yaml")):
        if group == "counts":  # of plan alone
            assert compose_run([f"counts={path.stem}"], config_name="plan")
            continue
        compose_run([f"{group}={path.stem}", "dataset.path=somewhere", *NEEDS.get(path.stem, [])])


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_composes_also_with_debug(path: Path) -> None:
    command = "giant" if path.stem.startswith("giant_") else "train"
    words = [f"experiment={path.stem}", "graph.path=somewhere" if command == "giant" else "dataset.path=somewhere"]
    if not path.stem.startswith("xr_") or path.stem.endswith("_ensemble"):  # the others: test_experiments.py
        compose_run(words, config_name=command)
    assert compose_run([*words, "debug=smoke"], config_name=command).matcher.steps == [4]


def test_giant_has_every_group_of_train() -> None:
    def groups(name: str) -> list[str]:
        defaults = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))["defaults"]  # type: ignore[call-overload, index]
        return [next(iter(d)) for d in defaults if isinstance(d, dict)]

    assert groups("giant") == groups("train")


def test_the_command_line_wins_over_an_experiment() -> None:
    assert compose_run(["experiment=quickstart", "encoder=none"]).encoder.preset == "none"


def test_one_seed_reaches_both_trees() -> None:
    cfg = compose_run(["seed=7", "tree.nr_splits=4"])
    assert (cfg.tree.seed, cfg.ranker_tree.seed, cfg.ranker_tree.nr_splits) == (7, 7, 4)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("matcher.beem=3", r"unknown setting 'matcher.beem'; did you mean 'matcher.beam'"),
        ("encodr=tiny", r"unknown setting 'encodr'; did you mean 'encoder'"),
        ("lr=3", r"did you mean 'optimizer.lr'"),
        ("encoder=minilmm", r"unknown choice encoder=minilmm; did you mean 'minilm'.*there are: hf, minilm"),
        (
            "negatives.scheme=tnf",
            r"negatives.scheme=tnf is none of tfn, man, tfn\+man, consistent, .*; did you mean tfn",
        ),
        ("engine.global_batch=many", r"'many' of type 'str' could not be converted to Integer"),
        ("dataset=custom", r"not set: dataset.path"),
        ("encoder=hf", r"encoder=hf needs encoder.name"),
        ("+matcher.beems=1", r"unknown setting 'matcher.beems'; did you mean 'matcher.beam'"),
    ],
)
def test_a_mistake_is_answered_with_the_nearest_valid_name(override: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        compose_run([override])


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(["matcher.beam=0", "ranker.eps=-1", "engine.global_batch=2"], world_size=3)
    for part in ("matcher.beam=0", "ranker.eps=-1", "engine.global_batch=2 is smaller than the 3 processes"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["negatives=tfn", "negatives.weight=score"], r"weight=score has no effect on negatives.scheme=tfn"),
        (["negatives.consistent_share=0"], r"consistent_share=0.0 is a share .* in \(0, 1\]"),
        (["negatives.consistent_share=10"], r"consistent_share=10.0 is a share"),
        (["negatives.confusions_per_cluster=0"], r"confusions_per_cluster=0 must be at least 1"),
        (["negatives.weight=mass"], r"negatives.weight=mass is none of none, score"),
    ],
)
def test_negatives_that_cannot_be_meant(overrides: list[str], answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        compose_run(overrides)
    assert compose_run(["negatives=consistent", "negatives.weight=score"]).negatives.scheme == "consistent"


def test_a_given_conf_folder_without_configs_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XMCDIST_CONF", str(tmp_path))
    with pytest.raises(ConfigError, match=r"holds no train\.yaml"):
        conf_dir()


def test_every_setting_is_read_somewhere() -> None:
    """An option without effect is a lie: each field name must be used below the configuration."""
    used = set()
    for path in (ROOT / "xmcdist").rglob("*.py"):
        if path.parent.name != "config":
            used |= {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    groups = [type(getattr(schema.RunConfig(), f.name)) for f in fields(schema.RunConfig)]
    groups += [commands.PredictConfig, commands.EvaluateConfig, commands.CalibrateConfig, commands.ImportPecosConfig]
    groups += [commands.TreeShowConfig]
    unused = [f"{g.__name__}.{f.name}" for g in groups if is_dataclass(g) for f in fields(g) if f.name not in used]
    assert not unused
