"""Label disentanglement as a whole: two senses come apart, stages, and the same on any number of processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from safetensors.torch import load_file

import xmcdist
from tests.helpers.ranks import on_ranks
from tests.helpers.toy import TINY_RUN, write_text_folder
from xmcdist.config.commands import TreeShowConfig
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import ConfigError, UserError
from xmcdist.encoders.hf import load_encoder
from xmcdist.inference.beam import beam_search
from xmcdist.parallel.launch import World
from xmcdist.pipelines.report import write_report
from xmcdist.pipelines.train import train
from xmcdist.pipelines.tree import show_tree
from xmcdist.rankers.model import LinearTree
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import open_csr
from xmcdist.trees.label_tree import LabelTree
from xmcdist.trees.overlap import assign, count_matches

OVERLAP = ["overlap=disentangled", "overlap.balance=null"]
REGIONS, SENSES, LEAVES = 8, 64, 8
SETTINGS = ["encoder=none", "ranker.beam=2", "tree.nr_splits=8", "tree.max_leaf_size=4", "engine.threads=1"]


@dataclass
class Planted:
    """A run on documents whose labels have two senses each, in different regions of words."""

    folder: Path
    region: np.ndarray  # of every sense
    senses: np.ndarray  # [labels, 2]
    results: dict[str, Any]

    @property
    def stages(self) -> Path:
        return self.folder / "run" / "stages"

    def tree(self, stage: str) -> LabelTree:
        return LabelTree.load(self.stages / stage / "tree")

    def model(self, prefix: str, tree: LabelTree) -> LinearTree:
        levels = [LevelWeights.load(self.stages / f"{prefix}-{t}" / "weights") for t in (1, 2)]
        return LinearTree(tree, levels, levels[0].num_sparse, 0)

    def retrieved(self) -> sp.csr_matrix:
        """Leaf clusters of training documents, by the rankers of the first tree."""
        X = Features(open_csr(self.stages / "features" / "X.trn"), None)
        return beam_search(self.model("linear", self.tree("tree")), X, beam=2, topk=2, upto_level=1)

    def labels(self) -> sp.csr_matrix:
        return sp.csr_matrix(sp.load_npz(self.folder / "data" / "Y.trn.npz"))


def _write_planted(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Each sense has words of its region and some of its own; a label is two senses of different regions."""
    rng = np.random.default_rng(0)
    region = np.arange(SENSES) % REGIONS
    senses = rng.permutation(SENSES).reshape(-1, 2)
    while (region[senses[:, 0]] == region[senses[:, 1]]).any():
        senses = rng.permutation(SENSES).reshape(-1, 2)
    label = np.empty(SENSES, int)
    for k in (0, 1):
        label[senses[:, k]] = np.arange(len(senses))
    folder.mkdir()
    for split, count in (("trn", 900), ("tst", 100)):
        meant = rng.integers(SENSES, size=count)
        texts = []
        for s in meant:
            words = [f"region{region[s]}x{w}" for w in rng.integers(0, 12, 6)]
            words += [f"sense{s}x{w}" for w in rng.integers(0, 3, 1)] + [f"noise{w}" for w in rng.integers(0, 100, 4)]
            texts.append(" ".join(words))
        (folder / f"X.{split}.txt").write_text("".join(t + "\n" for t in texts))
        Y = sp.csr_matrix((np.ones(count, np.float32), (np.arange(count), label[meant])), shape=(count, len(senses)))
        sp.save_npz(folder / f"Y.{split}.npz", Y)
    (folder / "output-items.txt").write_text("".join(f"label {i}\n" for i in range(len(senses))))
    return region, senses


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("planted")
    region, senses = _write_planted(folder / "data")
    settings = [f"dataset.path={folder / 'data'}", f"run_dir={folder / 'run'}", *SETTINGS, *OVERLAP]
    return Planted(folder, region, senses, train(compose_run(settings), World.single()))


def _variation_of_information(a: np.ndarray, b: np.ndarray) -> float:
    """H(a | b) + H(b | a) of two partitions, in nats."""
    total = 0.0
    for x in np.unique(a):
        for y in np.unique(b):
            both = np.mean((a == x) & (b == y))
            if both:
                total -= both * (np.log(both / np.mean(a == x)) + np.log(both / np.mean(b == y)))
    return float(total)


def _distance(p: Planted, tree: LabelTree) -> float:
    """From the senses' regions to the clusters they came to.

    A label's two clusters go to its two senses as the regions of the labels in them suggest.
    """
    leaf = tree.slot_to_node(tree.depth - 1)
    lean = np.zeros((LEAVES, REGIONS))
    for cluster, label in zip(leaf, tree.labels, strict=True):
        lean[cluster, p.region[p.senses[label]]] += 1
    came_to = np.empty(SENSES, int)
    for label, (a, b) in enumerate(p.senses):
        slots = tree.slots_of(label)
        c, d = leaf[slots[0]], leaf[slots[-1]]
        if lean[c, p.region[a]] + lean[d, p.region[b]] < lean[d, p.region[a]] + lean[c, p.region[b]]:
            c, d = d, c
        came_to[a], came_to[b] = c, d
    return _variation_of_information(p.region, came_to)


def test_two_senses_of_a_label_come_apart(planted: Planted) -> None:
    """Far nearer to the truth than clusters at random, or those of other documents' retrievals."""
    Y, M, tree = planted.labels(), planted.retrieved(), planted.tree("tree")
    rng = np.random.default_rng(1)
    at_random, shuffled = [], []
    for _ in range(20):
        two = np.stack([rng.permutation(LEAVES) < 2 for _ in range(tree.num_labels)])
        at_random.append(_distance(planted, assign(tree, sp.csr_matrix(two.astype(np.int64)), 2).tree))
        counts = count_matches(Y, M[rng.permutation(Y.shape[0])])
        shuffled.append(_distance(planted, assign(tree, counts, 2).tree))
    found = _distance(planted, planted.tree("linear_overlap1_tree"))
    assert found < 0.75 * min(at_random)
    assert found < 0.75 * min(shuffled)
    assert abs(np.mean(shuffled) - np.mean(at_random)) < 0.15
    assert found < _distance(planted, tree)


def test_a_round_is_a_tree_by_what_is_retrieved_and_rankers_on_it(planted: Planted) -> None:
    before, after = planted.tree("tree"), planted.tree("linear_overlap1_tree")
    assert after.fingerprint == assign(before, count_matches(planted.labels(), planted.retrieved()), 2).tree.fingerprint
    changed = []
    for t in (1, 2):
        Y = open_csr(planted.stages / "linear_overlap1_tree" / f"Y.level-{t}")
        np.testing.assert_array_equal(Y.toarray(), after.lift(planted.labels(), t).toarray())
        rows = [LevelWeights.load(planted.stages / f"{p}-{t}" / "weights") for p in ("linear", "linear_overlap1")]
        changed.append(rows[0].num_nodes != rows[1].num_nodes or (rows[0].sparse_rows() != rows[1].sparse_rows()).nnz)
    assert all(changed)  # the upper level too: its nodes are the same, the labels below them are not
    scores = xmcdist.load(planted.folder / "run" / "model").scores(["region1x3 region1x4 sense9x1"], k=5)
    assert scores.shape == (1, len(planted.senses))
    assert scores.has_canonical_format  # a label once
    assert planted.results["metrics"] != planted.results["baseline"]


def test_a_second_start_has_nothing_to_do(planted: Planted) -> None:
    settings = [f"dataset.path={planted.folder / 'data'}", f"run_dir={planted.folder / 'run'}", *SETTINGS]
    again = train(compose_run([*settings, *OVERLAP]), World.single())
    done = ["linear_overlap1_tree", "linear_overlap1-1", "linear_overlap1-2"]
    assert [name for name in again["stages_skipped"] if "overlap" in name] == done
    assert again["metrics"] == planted.results["metrics"]


def test_one_copy_leaves_everything_as_it_is(planted: Planted) -> None:
    run_dir = planted.folder / "plain"
    settings = [f"dataset.path={planted.folder / 'data'}", f"run_dir={run_dir}", *SETTINGS, "overlap.copies=1"]
    plain = train(compose_run(settings), World.single())
    names = sorted(p.name for p in (run_dir / "stages").iterdir())
    assert names == ["export", "features", "linear-1", "linear-2", "tree"]
    assert plain["metrics"] == plain["baseline"] == planted.results["baseline"]
    for name in ("tree", "linear-1", "linear-2"):
        marks = [
            json.loads((p / name / "stage.json").read_text())["fingerprint"]
            for p in (run_dir / "stages", planted.stages)
        ]
        assert marks[0] == marks[1]


def test_a_person_sees_all_clusters_of_a_label(planted: Planted) -> None:
    tree = planted.tree("linear_overlap1_tree")
    label = next(j for j in range(tree.num_labels) if len(tree.slots_of(j)) == 2)
    clusters = tree.slot_to_node(1)[tree.slots_of(label)]
    text = show_tree(TreeShowConfig(run_dir=str(planted.folder / "run"), label=str(label)))
    assert f"in {len(clusters)} clusters of level 1: {clusters[0]}, {clusters[1]}" in text
    assert "place 2 of 2" in text
    assert text == show_tree(TreeShowConfig(model=str(planted.folder / "run" / "model"), label=str(label)))
    page, left_out = write_report(planted.folder / "run")
    assert not left_out
    assert "Tree with labels in several clusters" in page.read_text()


def _whole_run(folder: Path, name: str, world: World, *more: str) -> dict[str, Any]:
    return train(compose_run([f"dataset.path={folder / 'data'}", f"run_dir={folder / name}", *SETTINGS, *more]), world)


TWICE = ["overlap=disentangled", "overlap.rounds=2", "overlap.merge=mean"]


@pytest.fixture(scope="module")
def single(planted: Planted) -> Path:
    """One process's run of two rounds, with a limit on clusters."""
    _whole_run(planted.folder, "one", World.single(), *TWICE)
    return planted.folder


@on_ranks(3)
def test_three_processes_make_the_model_of_one(single: Path, rank: int, world_size: int) -> None:
    results = _whole_run(single, "three", World(rank, world_size, rank, world_size, "cpu"), *TWICE)
    alone = json.loads((single / "one" / "results.json").read_text())["metrics"]
    assert results["metrics"] == pytest.approx(alone, rel=1e-12)  # sums of float64 in another order
    one, three = (LinearTree.load(single / name / "model" / "rankers") for name in ("one", "three"))
    assert one.merge == three.merge == "mean"
    assert one.tree.fingerprint == three.tree.fingerprint
    sizes = np.diff(one.tree.child_ptr[-1])
    assert np.median(sizes) == 6  # 0.75 of 2 x 32 labels in 8 clusters; some stay in full ones
    assert sizes.max() < np.diff(LabelTree.load(single / "run" / "model" / "rankers" / "tree").child_ptr[-1]).max()
    for a, b in zip(one.levels, three.levels, strict=True):
        assert (a.sparse_rows() != b.sparse_rows()).nnz == 0
        assert a.dense_rows()[1].tobytes() == b.dense_rows()[1].tobytes()


def test_the_matchers_tree_may_be_given_out_anew_too(tmp_path: Path) -> None:
    write_text_folder(tmp_path / "data", train=120, test=20)
    settings = [f"dataset.path={tmp_path / 'data'}", *TINY_RUN, "matcher.steps=[3]", "evaluation.linear_baseline=false"]
    settings += ["overlap.copies=3", "overlap.fine_tune=true", "ranker.beam=3", "matcher.max_clusters=8"]
    results = train(compose_run([*settings, f"run_dir={tmp_path / 'run'}"]), World.single())
    stages = tmp_path / "run" / "stages"
    before, after = (LabelTree.load(stages / name / "tree") for name in ("tree", "match_overlap1_tree"))
    Y, P = sp.load_npz(tmp_path / "data" / "Y.trn.npz"), open_csr(stages / "match-2" / "P")
    assert after.fingerprint == assign(before, count_matches(sp.csr_matrix(Y), P), 3).tree.fingerprint
    for t in (1, 2):
        rows = [np.load(stages / f"{name}-{t}" / "head.npy") for name in ("match", "match_overlap1")]
        assert rows[0].shape == rows[1].shape
        assert not np.array_equal(*rows)
    names = ["match_overlap1-1", "match-2"]
    first, last = (load_file(stages / name / "encoder" / "model.safetensors") for name in names)
    fresh = load_encoder(compose_run(settings).encoder, 0).model.state_dict()
    moved = [sum(float((first[n] - other[n]).square().sum()) for n in first) for other in (last, fresh)]
    assert 0 < moved[0] < moved[1]  # begun where the first pass ended, not anew
    made_by = [json.loads((stages / n / "stage.json").read_text())["inputs"]["after"] for n in (names[0], "embed")]
    assert [set(names) for names in made_by] == [{"match_overlap1_tree", "match-2"}, {"tokens", "match_overlap1-2"}]
    assert LabelTree.load(stages / "rank_overlap1_tree" / "tree").labels.size > 40
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    numbers = [row["global_step"] for row in steps if "loss" in row]
    assert numbers == sorted(set(numbers)) == list(range(1, 13))
    assert len(xmcdist.load(tmp_path / "run" / "model").predict(["w6 w7"], k=3)[0]) == 3
    assert results["metrics"]["P@1"] > 0
    with pytest.raises(UserError, match=r"set matcher\.max_clusters to at least the 8 clusters of level 2"):
        train(compose_run([*settings, "matcher.max_clusters=4", f"run_dir={tmp_path / 'low'}"]), World.single())


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        (["overlap.copies=7"], "must be at most 6"),
        (["overlap.copies=0"], "must be at least 1"),
        (["overlap.rounds=2"], "overlap.rounds=2 has no effect with overlap.copies=1"),
        (["overlap.max_cluster_size=9"], "no effect with overlap.copies=1"),
        (["overlap.copies=2", "overlap.max_cluster_size=0"], "must be at least 1, or null"),
        (["overlap.copies=2", "overlap.balance=0.4"], "set it to at least 0.5, or null"),
        (["overlap.balance=1"], "no effect with overlap.copies=1"),
        (["overlap=disentangled", "overlap.max_cluster_size=9"], "are two limits"),
        (["overlap.copies=2", "overlap.fine_tune=true"], "needs an encoder"),
        (["overlap.merge=mode"], "did you mean"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(more: list[str], answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        compose_run(["dataset.path=x", "encoder=none", *more])


def test_clusters_too_small_for_the_labels_are_refused(planted: Planted) -> None:
    with pytest.raises(
        UserError, match=r"leaves room for 24 labels in 8 clusters, but there are 32: set it to at least 4"
    ):
        _whole_run(planted.folder, "small", World.single(), "overlap.copies=2", "overlap.max_cluster_size=3")


def test_a_given_tree_with_copies_is_merged_as_asked(planted: Planted) -> None:
    tree = planted.tree("linear_overlap1_tree")
    model = planted.model("linear_overlap1", tree)
    X = Features(open_csr(planted.stages / "features" / "X.tst"), None)
    best, mean = (beam_search(replace(model, merge=how), X, beam=8, topk=32) for how in ("max", "mean"))
    np.testing.assert_array_equal(best.indices, mean.indices)
    assert (best.data >= mean.data).all()
    assert (best.data > mean.data).any()
