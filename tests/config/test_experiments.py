"""The experiments of the papers: published parameters, and a plan for each without its data."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from xmcdist.config.checks import check_run
from xmcdist.config.commands import CountsConfig, PlanConfig
from xmcdist.config.compose import compose_run
from xmcdist.config.schema import RunConfig, TreeConfig
from xmcdist.pipelines.plan import make_job
from xmcdist.planning.figures import figures
from xmcdist.planning.job import level_sizes
from xmcdist.planning.memory import Runtime

ROOT = Path(__file__).parents[2]

# From the authors' release (amzn/pecos, examples/xr-transformer-neurips21/params, pecos-xrlinear-jmlr22): sizes of the
# levels that their trees have, and what their files say where data sets differ.
PUBLISHED: dict[str, dict[str, Any]] = {
    "eurlex_4k": {
        "tree": [16, 256, 3956],
        "ranker_tree": [4, 32, 256, 3956],
        "steps": [600, 800, 1200],
        "lr, warm-up, length": (5e-5, 100, 128),
        "train beam, candidates": (5, 1000),
        "bootstrap": "weighted-linear",
        "Cp, Cn": ([1, 1, 1, 2], [2, 2, 2, 4]),
        "eps, threshold": (0.1, 1e-3),
        "negatives": ["tfn", "tfn", "tfn", "tfn+man"],
        "relevance": True,
        "beams": [75, 75, 100, 25],
        "propensity": (0.55, 1.5),
    },
    "wiki10_31k": {
        "tree": [128, 2048, 30938],
        "ranker_tree": [8, 128, 2048, 30938],
        "steps": [1000, 1000, 400],
        "lr, warm-up, length": (5e-5, 100, 256),
        "train beam, candidates": (20, 1000),
        "bootstrap": "weighted-linear",
        "Cp, Cn": ([4], [1]),
        "eps, threshold": (0.1, 1e-3),
        "negatives": ["tfn", "tfn", "tfn", "tfn+man"],
        "relevance": True,
        "beams": [100, 100, 100, 100],
        "propensity": (0.55, 1.5),
    },
    "amazoncat_13k": {
        "tree": [128, 1024, 13330],
        "ranker_tree": [128, 1024, 13330],
        "steps": [5000, 10000, 30000],
        "lr, warm-up, length": (5e-5, 1000, 256),
        "train beam, candidates": (50, 10000),
        "bootstrap": "weighted-linear",
        "Cp, Cn": ([0.25], [0.5]),
        "eps, threshold": (0.01, 1e-4),
        "negatives": ["tfn", "tfn", "tfn+man"],
        "relevance": True,
        "beams": [75, 100, 200],
        "propensity": (0.55, 1.5),
    },
    "wiki_500k": {
        "tree": [64, 512, 4096, 32768, 501070],
        "ranker_tree": [8, 256, 8192, 501070],
        "steps": [10000, 10000, 20000, 20000],
        "lr, warm-up, length": (1e-4, 5000, 128),
        "train beam, candidates": (5, 500),
        "bootstrap": "weighted-linear",
        "Cp, Cn": ([4], [1]),
        "eps, threshold": (0.1, 1e-3),
        "negatives": ["tfn", "tfn", "tfn", "tfn+man"],
        "relevance": True,
        "beams": [50, 50, 50, 50],
        "propensity": (0.5, 0.4),
    },
    "amazon_670k": {
        "tree": [128, 2048, 32768, 670091],
        "ranker_tree": [8, 256, 8192, 670091],
        "steps": [4000, 4000, 12000],
        "lr, warm-up, length": (1e-4, 200, 128),
        "train beam, candidates": (5, 500),
        "bootstrap": "linear",
        "Cp, Cn": ([1], [1]),
        "eps, threshold": (0.1, 1e-3),
        "negatives": ["tfn", "tfn", "tfn", "tfn+man"],
        "relevance": False,
        "beams": [75, 75, 75, 75],
        "propensity": (0.6, 2.6),
    },
    "amazon_3m": {
        "tree": [128, 2048, 32768, 2812281],
        "ranker_tree": [32, 1024, 32768, 2812281],
        "steps": [10000, 10000, 10000],
        "lr, warm-up, length": (1e-4, 1000, 128),
        "train beam, candidates": (20, 500),
        "bootstrap": "linear",
        "Cp, Cn": ([8], [1]),
        "eps, threshold": (0.1, 1e-3),
        "negatives": ["tfn", "tfn", "tfn", "tfn+man"],
        "relevance": True,
        "beams": [50, 50, 50, 50],
        "propensity": (0.6, 2.6),
    },
}
SETS = list(PUBLISHED)
WORLD = 8  # GPUs of the authors' machine


@functools.cache  # composing takes a quarter of a second
def _composed(experiment: str) -> RunConfig:
    cfg: RunConfig = compose_run([f"experiment={experiment}", "dataset.path=none"], world_size=WORLD)
    return cfg


def _compose(experiment: str) -> RunConfig:
    return copy.deepcopy(_composed(experiment))


def _plan(cfg: RunConfig, data: str) -> dict[str, Any]:
    given = yaml.safe_load((ROOT / "conf" / "counts" / f"{data}.yaml").read_text(encoding="utf-8"))
    counts = CountsConfig(**{name: value for name, value in given.items() if name != "defaults"})
    return figures(make_job(cfg, PlanConfig(gpu="a100", gpus=WORLD, counts=counts)), Runtime())


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "conf" / "experiment").glob("xr_*.yaml")) if not p.stem.endswith("_ensemble")],
    ids=lambda p: p.stem,
)
def test_an_experiment_is_sound_and_says_whose_it_is(path: Path) -> None:
    assert check_run(_compose(path.stem), WORLD) == []
    words = path.read_text(encoding="utf-8").split("\n")[1]
    assert words.startswith("# XR-Transformer (Zhang") or words.startswith("# XR-Linear (Yu") or "As xr_" in words


@pytest.mark.parametrize("data", SETS)
def test_xr_transformer_is_as_published_and_can_be_planned(data: str) -> None:
    cfg, want = _compose(f"xr_transformer_{data}"), PUBLISHED[data]
    m, r, t = cfg.matcher, cfg.ranker, cfg.optimizer
    assert m.steps == want["steps"]
    assert (t.lr, cfg.schedule.warmup, cfg.encoder.max_length) == want["lr, warm-up, length"]
    assert (m.beam, cfg.negatives.max_active) == want["train beam, candidates"]
    assert (m.bootstrap, m.bootstrap_c, m.loss) == (want["bootstrap"], 100, "weighted_squared_hinge")
    assert (r.Cp, r.Cn) == want["Cp, Cn"]
    assert (r.eps, r.threshold, r.max_iter, r.bias) == (*want["eps, threshold"], 100, 1)
    assert (r.solver, r.cost_sensitive, r.negatives) == ("l2svc_dual", want["relevance"], want["negatives"])
    assert (r.post_processor, r.last_post_processor) == ("l3-hinge", "noop")
    assert (cfg.negatives.scheme, cfg.schedule.name, t.weight_decay, t.eps, t.clip) == ("tfn+man", "linear", 0, 1e-8, 1)
    assert (cfg.encoder.name, cfg.encoder.pooling) == ("bert-base-uncased", "pooler")
    assert cfg.encoder.dropout == (0.05 if data == "amazoncat_13k" else None)
    assert (cfg.engine.global_batch, cfg.engine.micro_batch) == (256, 32)
    assert (cfg.dataset.propensity_a, cfg.dataset.propensity_b) == want["propensity"]

    plan = _plan(cfg, data)
    assert (plan["tree"], plan["ranker_tree"]) == (want["tree"], want["ranker_tree"])
    assert [level["steps"] for level in plan["levels"]] == want["steps"]  # so many levels are fine-tuned
    assert len(r.negatives) == len(want["beams"]) == len(plan["ranker_tree"])  # a word for every level of the rankers
    assert plan["does_not_fit"] == []
    # One beam for all levels: never narrower than the published one, and the labels as many.
    *clusters, labels = want["beams"]
    sizes = plan["ranker_tree"]
    assert all(min(r.beam, size) >= min(beam, size) for beam, size in zip(clusters, sizes[:-1], strict=True))
    assert min(r.beam, sizes[-2]) == min(clusters[-1], sizes[-2])
    assert r.topk == labels


@pytest.mark.parametrize(
    ("experiment", "base", "changed"),
    [
        ("eurlex_4k_roberta", "eurlex_4k", {"ranker.Cn": [2, 2, 2, 1]}),
        ("eurlex_4k_xlnet", "eurlex_4k", {}),
        ("wiki10_31k_roberta", "wiki10_31k", {"matcher.steps": [600, 400, 200]}),
        ("wiki10_31k_xlnet", "wiki10_31k", {"matcher.steps": [400, 400, 200]}),
        ("amazoncat_13k_roberta", "amazoncat_13k", {"ranker.Cp": [0.5], "encoder.dropout": 0.1}),
        (
            "amazoncat_13k_xlnet",
            "amazoncat_13k",
            {"ranker.Cp": [0.5], "encoder.dropout": 0.1, "ranker_tree.max_leaf_size": 100},
        ),
    ],
)
def test_other_encoders_differ_from_bert_where_the_release_does(
    experiment: str, base: str, changed: dict[str, Any]
) -> None:
    cfg, bert = _compose(f"xr_transformer_{experiment}"), _compose(f"xr_transformer_{base}")
    assert cfg.encoder.name == {"roberta": "roberta-base", "xlnet": "xlnet-base-cased"}[experiment.split("_")[-1]]
    for name, value in changed.items():
        group, field = name.split(".")
        assert getattr(getattr(cfg, group), field) == value
        assert getattr(getattr(bert, group), field) != value
        setattr(getattr(bert, group), field, value)
    bert.encoder.name, bert.encoder.pooling = cfg.encoder.name, cfg.encoder.pooling
    assert cfg == bert


def test_the_larger_trees_of_amazon_3m() -> None:
    cfg = _compose("xr_transformer_amazon_3m")
    assert level_sizes(2812281, replace(cfg.tree, max_leaf_size=32)) == [32, 512, 8192, 131072, 2812281]
    assert level_sizes(2812281, cfg.ranker_tree) == PUBLISHED["amazon_3m"]["ranker_tree"]


@pytest.mark.parametrize("data", SETS)
def test_xr_linear_is_as_published_and_can_be_planned(data: str) -> None:
    labels = PUBLISHED[data]["tree"][-1]
    cfg = _compose(f"xr_linear_{data}")
    r = cfg.ranker
    assert (cfg.encoder.preset, cfg.tree.nr_splits, cfg.tree.max_leaf_size) == ("none", 32, 100)
    assert (r.Cp, r.Cn, r.threshold, r.beam, r.negatives, r.eps) == ([1], [1], 0.1, 10, ["tfn"], 0.1)
    assert (r.post_processor, r.last_post_processor, r.cost_sensitive) == ("l3-hinge", None, False)
    assert (cfg.dataset.propensity_a, cfg.dataset.propensity_b) == PUBLISHED[data]["propensity"]
    plan = _plan(cfg, data)
    leaves = {3956: 64, 30938: 512, 13330: 256, 501070: 8192, 670091: 8192, 2812281: 32768}[labels]
    assert plan["tree"][-2:] == [leaves, labels]
    assert plan["does_not_fit"] == []
    for splits, top in ((2, 2), (8, {64: 8, 512: 8, 256: 4, 8192: 2, 32768: 8}[leaves])):
        sizes = level_sizes(labels, replace(cfg.tree, nr_splits=splits))
        assert (sizes[0], sizes[-2]) == (top, leaves)


def test_x_transformers_flat_index_beside_ours() -> None:
    """Its number of clusters is 2**(floor(log2(L // 100 + 1)) + 1); ours halves until leaves hold at most 100."""
    flat = TreeConfig(flat=yaml.safe_load((ROOT / "conf" / "tree" / "flat.yaml").read_text(encoding="utf-8"))["flat"])
    for data in SETS:
        labels = PUBLISHED[data]["tree"][-1]
        assert level_sizes(labels, flat) == [1 << (labels // 100 + 1).bit_length(), labels]
    others = [n for n in range(200, 7000) if level_sizes(n, flat)[0] != 1 << (n // 100 + 1).bit_length()]
    assert others == [n for k in range(1, 7) for n in range(max(100 * (2**k - 1), 200), 100 * 2**k + 1)]
    assert all(2 * level_sizes(n, flat)[0] == 1 << (n // 100 + 1).bit_length() for n in others)
