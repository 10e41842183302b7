"""Trees from label texts and documents' embeddings: planted groups are found where they lie, and only there."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import yaml

from tests.helpers.ranks import on_ranks
from xmcdist.checkpoint.stages import StageStore
from xmcdist.config.checks import check_run
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import UserError
from xmcdist.config.schema import EncoderConfig, RunConfig, TreeConfig
from xmcdist.observability.log import RunLog
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.pipelines import label_embedding as module
from xmcdist.pipelines.features import features_stage
from xmcdist.pipelines.prepare import prepare_data
from xmcdist.pipelines.run import Run
from xmcdist.pipelines.train import train
from xmcdist.pipelines.tree import tree_stage
from xmcdist.sparse.features import Features
from xmcdist.sparse.store import open_csr
from xmcdist.trees.label_tree import LabelTree

GROUPS, SIZE, DOCS = 4, 12, 240
LABELS = GROUPS * SIZE
GROUP = np.random.default_rng(5).permutation(np.arange(LABELS) % GROUPS)
CHANCE = 0.6  # largest group of a cluster: 0.4 on average where labels fall at random, 1 where groups are found
FLAT = [
    "encoder=none",
    "tree=flat",
    "tree.nr_splits=2",
    f"tree.max_leaf_size={SIZE}",
    "until=tree",
    "checkpoint.every_steps=0",
]


def _words(rng: np.random.Generator, group: int | None, count: int) -> list[str]:
    """Of a group's own twelve words, or of all."""
    low, high = (12 * group, 12 * group + 12) if group is not None else (0, 12 * GROUPS)
    return [f"word{n}" for n in rng.integers(low, high, size=count)]


def _write(folder: Path, *, by: str) -> Path:
    """Groups of labels that share words in their texts (``by=texts``), or in their documents (``by=documents``)."""
    rng = np.random.default_rng(11)
    folder.mkdir()
    documents, Y = [], np.zeros((DOCS, LABELS))
    for i in range(DOCS):
        group = i % GROUPS
        mine = np.flatnonzero(group == GROUP) if by == "documents" else np.arange(LABELS)
        Y[i, rng.choice(mine, 3, replace=False)] = 1
        documents.append(_words(rng, group if by == "documents" else None, 20))
    texts = [_words(rng, int(g) if by == "texts" else None, 8) for g in GROUP]
    (folder / "X.trn.txt").write_text("".join(" ".join(words) + "\n" for words in documents))
    (folder / "output-items.txt").write_text("".join(" ".join(words) + "\n" for words in texts))
    sp.save_npz(folder / "Y.trn.npz", sp.csr_matrix(Y))
    return folder


def _shuffled(data: Path) -> Path:
    """The same set with label texts at other labels."""
    other = data.with_name(data.name + "-shuffled")
    if not other.exists():
        other.mkdir()
        for name in ("X.trn.txt", "Y.trn.npz"):
            (other / name).write_bytes((data / name).read_bytes())
        lines = (data / "output-items.txt").read_text().splitlines()
        order = np.random.default_rng(3).permutation(LABELS)
        (other / "output-items.txt").write_text("".join(lines[i] + "\n" for i in order))
    return other


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("labels")
    return {by: _write(folder / by, by=by) for by in ("texts", "documents")}


@functools.cache  # composing takes a quarter of a second
def _composed(*base: str) -> RunConfig:
    cfg: RunConfig = compose_run([*base, "dataset.path=none"])
    return cfg


def _config(base: list[str], data: Path, run_dir: Path, settings: list[str]) -> RunConfig:
    """What composing all of it gives."""
    cfg = _set(copy.deepcopy(_composed(*base)), settings)
    cfg.dataset.path, cfg.run_dir = str(data), str(run_dir)
    assert check_run(cfg, 1) == []
    return cfg


def _set(cfg: RunConfig, settings: list[str]) -> RunConfig:
    for setting in settings:
        name, _, text = setting.partition("=")
        *group, field = name.split(".")
        setattr(getattr(cfg, group[0]) if group else cfg, field, yaml.safe_load(text))
    return cfg


def _tree(data: Path, *settings: str) -> LabelTree:
    runs = len(list(data.parent.glob("run-*")))
    run_dir = data.parent / f"run-{runs}"
    train(_config(FLAT, data, run_dir, list(settings)), World.single())
    return LabelTree.load(run_dir / "stages" / "tree" / "tree")


def _purity(tree: LabelTree, group: np.ndarray = GROUP) -> float:
    """Mean over clusters of the share of their largest group."""
    ends = tree.child_ptr[-1]
    return float(np.mean([np.bincount(group[tree.labels[a:b]]).max() / (b - a) for a, b in pairwise(ends)]))


TFIDF = "tree.label_text=tfidf"
TINY = "tree.text_encoder=tiny"


@pytest.mark.parametrize(
    ("by", "settings", "found"),
    [
        ("texts", [], False),
        ("texts", ["tree.label_embedding=text", TFIDF], True),
        ("texts", ["tree.label_embedding=concat", TFIDF], True),
        ("texts", ["tree.label_embedding=convex", TFIDF], True),
        ("texts", ["tree.label_embedding=convex", TFIDF, "tree.text_weight=0"], False),
        ("documents", [], True),
        ("documents", ["tree.label_embedding=text", TFIDF], False),
        ("documents", ["tree.label_embedding=text", TINY], False),
        ("documents", ["tree.label_embedding=concat", TFIDF], True),
        ("documents", ["tree.label_embedding=concat", TINY], True),
        ("documents", ["tree.label_embedding=convex", TFIDF, "tree.text_weight=0.2"], True),
        ("documents", ["tree.label_embedding=convex", TFIDF, "tree.text_weight=1"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_planted_groups(sets: dict[str, Path], by: str, settings: list[str], found: bool) -> None:
    tree = _tree(sets[by], *settings)
    assert [tree.level_size(t) for t in range(1, tree.depth + 1)] == [GROUPS, LABELS]
    assert (_purity(tree) > 0.9) if found else (_purity(tree) < CHANCE)
    if found and by == "texts":
        assert _purity(_tree(_shuffled(sets[by]), *settings)) < CHANCE


KITCHEN = ["spoon", "kettle", "frying pan", "oven", "plate", "cup", "saucepan", "toaster", "corkscrew", "whisk"]
KITCHEN += ["grater", "mug"]
COUNTRIES = ["France", "Japan", "Brazil", "Kenya", "Norway", "Peru", "Egypt", "Canada", "Vietnam", "Poland", "Chile"]
COUNTRIES += ["Morocco"]


def test_an_encoder_finds_what_texts_mean_though_they_share_no_word(sets: dict[str, Path], tmp_path: Path) -> None:
    data, rng = tmp_path / "data", np.random.default_rng(1)
    data.mkdir()
    (data / "X.trn.txt").write_bytes((sets["texts"] / "X.trn.txt").read_bytes())
    sp.save_npz(data / "Y.trn.npz", sp.load_npz(sets["texts"] / "Y.trn.npz").tocsc()[:, : 2 * SIZE])
    order = rng.permutation(2 * SIZE)

    def purity(texts: list[str], *settings: str) -> float:
        (data / "output-items.txt").write_text("".join(text + "\n" for text in texts))
        return _purity(_tree(data, "tree.label_embedding=text", *settings), (order < SIZE).astype(int))

    names = [(KITCHEN + COUNTRIES)[i] for i in order]
    assert purity(names, "tree.text_encoder=minilm") > 0.9
    assert purity([names[i] for i in rng.permutation(2 * SIZE)], "tree.text_encoder=minilm") < 0.75
    assert purity(names, TFIDF) < 0.75  # no word of theirs is in a document


def test_embeddings_in_place_of_tfidf(sets: dict[str, Path], tmp_path: Path) -> None:
    """Documents whose words say nothing, and whose given embeddings say the groups of their labels."""
    data, rng = sets["texts"], np.random.default_rng(0)
    Y = sp.load_npz(data / "Y.trn.npz").toarray()
    E = Y @ np.eye(GROUPS)[GROUP] + 0.1 * rng.normal(size=(DOCS, GROUPS))
    scale = 2.0 ** rng.integers(-3, 4, size=(DOCS, 1))  # only directions count
    np.save(tmp_path / "E.npy", (E * scale).astype(np.float64))
    np.save(tmp_path / "other.npy", E[rng.permutation(DOCS)].astype(np.float32))
    tree = _tree(data, f"tree.document_embeddings={tmp_path / 'E.npy'}")
    unit = E / np.linalg.norm(E, axis=1, keepdims=True)
    want = (Y / np.linalg.norm(Y, axis=1, keepdims=True)).T @ unit
    assert _purity(tree) > 0.9
    ends = tree.child_ptr[-1]
    centres = np.stack([want[tree.labels[a:b]].mean(0) for a, b in pairwise(ends)])
    assert len(set(centres.argmax(1).tolist())) == GROUPS
    assert _purity(_tree(data, f"tree.document_embeddings={tmp_path / 'other.npy'}")) < CHANCE
    assert not list(data.parent.glob("run-*/stages/tree/document_embeddings.npy"))
    # Other contents of the same file make the tree of the same run anew.
    again = [FLAT, data, tmp_path / "run", [f"tree.document_embeddings={tmp_path / 'E.npy'}"]]
    made = []
    for source in ("E.npy", "E.npy", "other.npy"):
        np.save(tmp_path / "E.npy", np.load(tmp_path / source))
        train(_config(*again), World.single())  # type: ignore[arg-type]
        made.append(json.loads((tmp_path / "run" / "stages" / "tree" / "stage.json").read_text())["id"])
    assert made[0] == made[1] != made[2]


SOURCES = {
    "both": ["tree.label_embedding=concat"],
    "words": ["tree.label_embedding=convex", TFIDF, "tree.text_weight=0.4"],
    "neural": ["tree.label_embedding=convex", "tree.document_embeddings={E}", "tree.text_weight={w}"],
}


def _settings(folder: Path, name: str) -> list[str]:
    files = {"E": folder / "E.npy", "w": folder / "w.npy"}
    more = [text.format(**files) for text in SOURCES[name]]
    return [f"dataset.prepared={folder / 'prepared'}", *more]


def _stages(folder: Path, name: str, world: World, mesh: Mesh) -> None:
    """Features, label texts and tree of some source, in blocks of so few labels that there are more than ranks."""
    run_dir = folder / f"{name}-{world.world_size}"
    base = ["encoder=tiny", "tree=flat", "tree.max_leaf_size=6"]
    cfg = _config(base, folder / "texts", run_dir, _settings(folder, name))
    log = RunLog(run_dir, world)
    run = Run(cfg, world, log, StageStore(run_dir, world, log.say), prepare_data(cfg, world, log.say), mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 7)
        module.check_label_embedding(run)
        features = Features(sparse=open_csr(features_stage(run) / "X.trn"))
        tree_stage(run, "tree", cfg.tree, features, ("features",))


def _made(folder: Path, name: str, world_size: int) -> dict[str, bytes]:
    stages = folder / f"{name}-{world_size}" / "stages"
    files = [*stages.glob("label_text/**/*.npy"), *stages.glob("tree/**/*.npy")]
    return {str(path.relative_to(stages)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with a label without text, embeddings of its documents, and one process's trees."""
    import torch

    folder = tmp_path_factory.mktemp("ranks")
    data = _write(folder / "texts", by="texts")
    lines = (data / "output-items.txt").read_text().splitlines()
    (data / "output-items.txt").write_text("".join(line + "\n" for line in [*lines[:9], " ", *lines[10:]]))
    rng = np.random.default_rng(0)
    np.save(folder / "E.npy", rng.normal(size=(DOCS, 64)).astype(np.float32))
    np.save(folder / "w.npy", rng.random(LABELS))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # blocks at once; the ranks have one
    for name in SOURCES:
        _stages(folder, name, World.single(), Mesh(World.single()))
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    return folder


def test_vectors_of_label_texts(single: Path) -> None:
    """The mean over real tokens of the last hidden states, of unit length, whatever else is in the batch."""
    import torch

    from xmcdist.encoders.hf import load_encoder
    from xmcdist.encoders.tokenizer import open_tokenizer

    stage = single / "both-1" / "stages" / "label_text"
    Z, tokenizer = np.load(stage / "dense.npy"), open_tokenizer(stage / "tokenizer")
    model = load_encoder(EncoderConfig(preset="tiny", max_length=32)).model.eval()
    assert Z.shape == (LABELS, 64)
    assert not Z[9].any()  # no text
    for label, text in enumerate((single / "texts" / "output-items.txt").read_text().splitlines()):
        if label != 9:
            ids = tokenizer(text, truncation=True, max_length=32)["input_ids"]
            with torch.no_grad():
                mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
            np.testing.assert_allclose(Z[label], mean / np.linalg.norm(mean), atol=1e-5)
    words = open_csr(single / "words-1" / "stages" / "label_text" / "sparse")
    np.testing.assert_allclose(np.sqrt(words.multiply(words).sum(1)).A1, np.arange(LABELS) != 9, atol=1e-6)


@on_ranks(3, timeout_s=180)
def test_one_and_three_ranks_make_the_same_bits(single: Path, rank: int, world_size: int) -> None:
    world = World(rank, world_size, rank, world_size, "cpu")
    for name in SOURCES:
        _stages(single, name, world, Mesh(world, world_size))
        got, want = _made(single, name, world_size), _made(single, name, 1)
        assert [file for file in want if got.get(file) != want[file]] == []
        assert got.keys() == want.keys()
        assert any(file.startswith("label_text") for file in got)


def test_embeddings_of_a_finished_run(sets: dict[str, Path], tmp_path: Path) -> None:
    """Fine-tuned vectors of documents, alone and with the same encoder's of label texts; other data are refused."""
    data, first = sets["documents"], tmp_path / "first"
    common = ["encoder=tiny", "tree=flat", f"tree.max_leaf_size={SIZE}", "engine.global_batch=12", "engine.threads=1"]
    fine_tuned = ["matcher.steps=[8]", "matcher.max_clusters=4", "optimizer.lr=0.002", "until=match"]
    train(_config(common, data, first, fine_tuned), World.single())
    neural = [f"tree.document_embeddings={first}", "until=tree"]
    for name, more in (("pifa", []), ("convex", ["tree.label_embedding=convex", "tree.text_weight=0.1"])):
        train(_config(common, data, tmp_path / name, neural + more), World.single())
        tree = LabelTree.load(tmp_path / name / "stages" / "tree" / "tree")
        assert _purity(tree) > 0.9, name
    with pytest.raises(
        UserError, match=r"first\) is the folder of a run over other data; if its documents are the same"
    ):
        train(_config(common, sets["texts"], tmp_path / "bad", neural), World.single())


def test_what_cannot_be_is_said_before_any_stage(sets: dict[str, Path], tmp_path: Path) -> None:
    data = sets["texts"]
    unnamed, given = tmp_path / "unnamed", tmp_path / "given"
    for folder in (unnamed, given):
        folder.mkdir()
        (folder / "X.trn.txt").write_bytes((data / "X.trn.txt").read_bytes())
        (folder / "Y.trn.npz").write_bytes((data / "Y.trn.npz").read_bytes())
    (given / "output-items.txt").write_bytes((data / "output-items.txt").read_bytes())
    sp.save_npz(given / "X.trn.npz", sp.eye_array(DOCS, format="csr", dtype=np.float32))
    np.save(tmp_path / "short.npy", np.ones((DOCS - 1, 4)))
    np.save(tmp_path / "narrow.npy", np.ones((DOCS, 4)))
    np.save(tmp_path / "flat.npy", np.ones(DOCS))
    np.save(tmp_path / "w.npy", np.ones(LABELS + 1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "E.txt").write_text("1")
    text, E = "tree.label_embedding=text", f"tree.document_embeddings={tmp_path}"
    for source, settings, message in (
        (unnamed, [text, TFIDF], r"this data set has none: its labels are numbers\. Add output-items\.txt"),
        (given, [text, TFIDF], r"tree\.label_text=tfidf needs the vocabulary of features\.kind=tfidf"),
        (data, [f"{E}/short.npy"], r"short\.npy\) has 239 rows; the data set has 240 training documents"),
        (data, [f"{E}/flat.npy"], r"flat\.npy\) is 1-D float64"),
        (data, [f"{E}/gone.npy"], r"gone\.npy\) does not exist"),
        (data, [f"{E}/folder"], r"folder\) is a folder without a finished embed stage"),
        (data, [f"{E}/E.txt"], r"E\.txt\) must end in \.npy"),
        (data, ["tree.label_embedding=convex", TFIDF, f"tree.text_weight={tmp_path}/w.npy"], r"has 48 labels"),
        (
            data,
            ["tree.label_embedding=convex", TINY, f"{E}/narrow.npy"],
            r"tree\.document_embeddings has 4 columns and the encoder of label texts 64",
        ),
        (data, [text, f"tree.text_encoder={tmp_path}/folder"], r"folder is no HuggingFace model folder"),
    ):
        run_dir = tmp_path / "run"
        with pytest.raises(UserError, match=message):
            train(_config(FLAT, source, run_dir, settings), World.single())
        assert not (run_dir / "stages").exists() or not list((run_dir / "stages").iterdir())
        shutil.rmtree(run_dir)


def test_a_row_that_is_not_finite_is_named(sets: dict[str, Path], tmp_path: Path) -> None:
    E = np.ones((DOCS, 4))
    E[17, 2] = np.inf
    np.save(tmp_path / "E.npy", E)
    with pytest.raises(UserError, match=r"E\.npy\): row 17 holds a value that is not finite"):
        _tree(sets["texts"], f"tree.document_embeddings={tmp_path / 'E.npy'}")


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        (["tree.label_embedding=both"], r"tree\.label_embedding=both is none of pifa, text, concat, convex"),
        (["tree.label_text=tfidf"], r"tree\.label_text=tfidf has no effect on tree\.label_embedding=pifa"),
        (["tree.text_encoder=minilm"], r"tree\.text_encoder=minilm has no effect"),
        (
            ["tree.label_embedding=text", "encoder.preset=none"],
            r"label_text=encoder needs an encoder.*set tree\.text_encoder",
        ),
        (["tree.label_embedding=text", "tree.document_embeddings=E.npy"], r"no effect on tree\.label_embedding=text"),
        (["tree.label_embedding=text", "tree.path=x"], r"label_embedding=text has no effect beside tree\.path"),
        (["tree.document_embeddings=E.npy", "tree.label_features=Z.npy"], r"no effect beside tree\.label_features"),
        (["tree.label_embedding=convex"], r"PIFA is made of TF-IDF and tree\.label_text=encoder: take"),
        (
            ["tree.label_embedding=convex", "tree.label_text=tfidf", "tree.document_embeddings=E.npy"],
            r"PIFA is made of embeddings and tree\.label_text=tfidf",
        ),
        (
            ["ranker_tree.label_embedding=convex", "ranker_tree.label_text=tfidf"],
            r"PIFA is made of TF-IDF beside embeddings and .*ranker\.features=sparse with tfidf",
        ),
        (["tree.text_weight=0.3"], r"text_weight=0\.3 has no effect on tree\.label_embedding=pifa: use convex"),
        (["tree.label_embedding=convex", "tree.text_weight=1.5"], r"text_weight=1\.5 must be in \[0, 1\]"),
        (["tree.label_embedding=convex", "tree.text_weight=w.txt"], r"w\.txt is neither a number in"),
        (["tree.flat=true", "tree.min_codes=8"], r"tree\.min_codes=8 has no effect on tree\.flat=true"),
    ],
)
def test_settings_that_cannot_be_meant(settings: list[str], answer: str) -> None:
    cfg = _set(RunConfig(encoder=EncoderConfig(preset="tiny")), settings)
    assert any(re.search(answer, fault) for fault in check_run(cfg, 1)), check_run(cfg, 1)


def test_sound_settings_pass() -> None:
    for preset in ("tiny", "none"):
        cfg = RunConfig(encoder=EncoderConfig(preset=preset))
        cfg.tree = TreeConfig(label_embedding="convex", label_text="tfidf", text_weight="w.npy", flat=True)
        assert check_run(cfg, 1) == []
    cfg.tree = TreeConfig(label_embedding="convex", text_encoder="minilm", document_embeddings="E.npy", text_weight=1)
    assert check_run(cfg, 1) == []
