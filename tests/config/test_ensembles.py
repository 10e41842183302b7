"""The papers' ensembles: members with the published parameters, sound on eight processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from xmcdist.config.checks import check_run
from xmcdist.config.commands import CountsConfig, PlanConfig
from xmcdist.config.compose import compose_unchecked, to_object
from xmcdist.config.members import compose_members
from xmcdist.config.schema import RunConfig
from xmcdist.pipelines.plan import plan_members

ROOT = Path(__file__).parents[2]
WORLD = 8

# Steps, rate, warm-up and way of joining, from the tables of the authors' release.
X_TRANSFORMER = {
    "eurlex_4k": (1000, 5e-5, 100, "rank"),
    "wiki10_31k": (1400, 5e-5, 100, "average"),
    "amazoncat_13k": (20000, 8e-5, 2000, "average"),
    "wiki_500k": (80000, 6e-5, 1000, "average"),
}
ENCODERS = {
    "bert": "bert-large-cased-whole-word-masking",
    "roberta": "roberta-large",
    "xlnet": "xlnet-large-cased",
}


def _compose(experiment: str) -> tuple[RunConfig, dict[str, RunConfig]]:
    words = [f"experiment={experiment}", "dataset.path=none", "run_dir=RUN"]
    composed = compose_unchecked(words)
    cfg = to_object(composed, WORLD)
    members = compose_members(words, cfg, WORLD, composed)
    assert all(check_run(member, WORLD) == [] for member in members.values())
    return cfg, members


@pytest.mark.parametrize("data", X_TRANSFORMER)
def test_x_transformer_has_nine_members_as_published(data: str) -> None:
    cfg, members = _compose(f"x_transformer_{data}")
    steps, lr, warmup, ensemble = X_TRANSFORMER[data]
    assert cfg.ensemble == ensemble
    assert sorted(members) == sorted(f"{e}-{index}" for e in ENCODERS for index in ("pifa", "text", "neural"))
    for name, m in members.items():
        encoder, index = name.split("-")
        assert (m.encoder.name, m.encoder.max_length) == (ENCODERS[encoder], 128)
        assert (m.matcher.steps, m.optimizer.lr, m.schedule.warmup) == ([steps], lr, warmup)
        assert (m.engine.global_batch, m.matcher.loss, m.negatives.scheme) == (256, "squared_hinge", "tfn")
        assert (m.tree.flat, m.tree.max_leaf_size, m.ranker.clusters_by) == (True, 100, "matcher")
        assert (m.ranker.Cp, m.ranker.Cn, m.ranker.threshold, m.ranker.negatives) == ([1], [1], 0.01, ["tfn+man"])
        tree = (m.tree.label_embedding, m.tree.text_encoder, m.tree.document_embeddings)
        assert (
            tree
            == {
                "pifa": ("pifa", None, None),
                "text": ("text", "xlnet-large-cased", None),
                "neural": ("pifa", None, "RUN/members/xlnet-pifa"),
            }[index]
        )
    assert len({repr(m.tree) for m in members.values()}) == 3  # so that equal indexes are made once


@pytest.mark.parametrize(
    ("data", "ensemble", "differ"),
    [
        ("eurlex_4k", "softmax", {"bert": [600, 800, 1200], "roberta": [600, 800, 1200], "xlnet": [600, 800, 1200]}),
        ("wiki10_31k", "rank", {"bert": [1000, 1000, 400], "roberta": [600, 400, 200], "xlnet": [400, 400, 200]}),
        ("wiki_500k", "sigmoid", {f"bert{i}": [10000, 10000, 20000, 20000] for i in (1, 2, 3)}),
        ("amazon_3m", "rank", {f"bert{i}": [10000, 10000, 10000] for i in (1, 2, 3)}),
    ],
)
def test_xr_transformers_ensembles(data: str, ensemble: str, differ: dict[str, list[int]]) -> None:
    cfg, members = _compose(f"xr_transformer_{data}_ensemble")
    assert cfg.ensemble == ensemble
    assert {name: m.matcher.steps for name, m in members.items()} == differ
    assert len({(m.encoder.name, m.seed, m.tree.seed) for m in members.values()}) == 3
    if data == "amazon_3m":
        assert [m.tree.max_leaf_size for m in members.values()] == [100, 32, 32]


def test_members_can_be_planned_without_their_data(capsys: pytest.CaptureFixture[str]) -> None:
    members = _compose("x_transformer_eurlex_4k")[1]
    counts = CountsConfig(documents=15449, labels=3956, labels_per_document=5.3, columns=186104)
    some = {name: members[name] for name in ("xlnet-pifa", "bert-text")}
    found = plan_members(some, PlanConfig(gpu="a100", gpus=WORLD, counts=counts))
    assert [one["tree"] for one in found.values()] == [[64, 3956]] * 2
    assert [one["does_not_fit"] for one in found.values()] == [[], []]
    assert [[level["steps"] for level in one["levels"]] for one in found.values()] == [[1000], [1000]]
    said = capsys.readouterr().out
    assert said.index("member xlnet-pifa") < said.index("360.3 M") < said.index("member bert-text")


def test_every_ensemble_of_a_paper_has_its_page() -> None:
    page = (ROOT / "docs" / "ensembles.md").read_text(encoding="utf-8")
    for path in (ROOT / "conf" / "experiment").glob("*.yaml"):
        if "members:" in path.read_text(encoding="utf-8"):
            short = path.stem.removeprefix("xr_transformer").removeprefix("x_transformer")
            assert short in page, path.name
