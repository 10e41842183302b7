"""report.html of real runs: what it shows is what the files say, and no text of the data becomes part of the page."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

import xmcdist
from tests.helpers.toy import TINY_RUN, texts_and_labels, write_text_folder
from tests.report.page_reader import Page
from xmcdist.cli import report as command
from xmcdist.config.compose import compose_run
from xmcdist.data.dataset import PreparedDataset
from xmcdist.parallel.launch import World
from xmcdist.pipelines import report
from xmcdist.pipelines.train import train
from xmcdist.trees.label_tree import LabelTree

EVIL = """<script>alert(1)</script>"'><img src=http://x.example/a.png onerror=alert(2)>&lt; \x00\x1b"""
SECTIONS = ["Quality", "Training", "Labels and tree", "What the matcher confuses", "Sample documents"]
LAST = ["Time and memory", "Settings and versions"]


def _train(data: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    words = [f"dataset.path={data}", "dataset.name='toys & <more>'", f"run_dir={run_dir}", *TINY_RUN, *overrides]
    return train(compose_run(words), World.single())


def _page(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents and labels that try to become part of a page."""
    folder = write_text_folder(tmp_path_factory.mktemp("report") / "data", train=160, test=50)
    for name in ("X.tst.txt", "output-items.txt"):
        lines = (folder / name).read_text().splitlines()
        (folder / name).write_text("".join(f"{line} {EVIL}\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    """A run with an encoder, with validation, to its end."""
    run_dir = data.parent / "run"
    _train(data, run_dir, "matcher.steps=[6]", "matcher.validation_fraction=0.1", "matcher.eval_every=3")
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """Of that run, to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _check_whole(page: Page) -> None:
    assert not page.unclosed
    assert len(page.ids) == len(set(page.ids))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {f"#{name}" for name in page.ids} == set(links)
    for tag, attributes in page.tags:
        assert tag not in ("img", "link", "iframe", "object", "base")
        assert not {"src", "onerror", "onclick", "onload"} & attributes.keys()
        assert "href" not in attributes or tag == "a"
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(str(attributes["aria-label"])) > 10
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text.replace("predict(None", "")


def test_every_section_of_a_whole_run(finished: Path) -> None:
    page = _page(finished)
    _check_whole(page)
    assert page.headings == SECTIONS + LAST
    wanted = ["Precision, P@k", "Order, nDCG@k", "Rare labels, PSP@k", "Recall by label frequency, R@k", "Loss"]
    wanted += ["Beam recall", "Learning rate", "Gradient norm", "Validation", "Speed", "Waiting", "Label frequency"]
    wanted += ["Label tree", "Refined tree", "Hardest clusters", "Worst confusions", "Stages"]
    assert set(wanted) <= set(page.figures)
    assert "toys & <more>" in page.text.splitlines()
    assert (finished / "report.html").stat().st_size < 300_000


def test_values_are_those_of_the_results(finished: Path) -> None:
    results, page = json.loads((finished / "results.json").read_text()), _page(finished)
    metrics, baseline = results["metrics"], results["baseline"]
    tiles = dict(zip(page.of_class("k"), page.of_class("n"), strict=True))
    assert tiles == {k: f"{metrics[k]:.1f}" for k in ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")}
    beside = [text for text in page.of_class("d") if text.startswith("linear only")]
    assert beside == [f"linear only {baseline[k]:.1f}" for k in tiles]
    table = {row[0]: row[1:] for row in page.rows if row and row[0] in metrics}
    assert table.keys() == metrics.keys()
    for key, cells in table.items():
        digits = 0 if key.startswith("documents") else 2
        assert cells == [f"{metrics[key]:.{digits}f}", f"{baseline[key]:.{digits}f}"]
    labels = " ".join(str(a["aria-label"]) for tag, a in page.tags if tag == "svg")
    for band in ("head", "torso", "tail"):
        for k in (1, 3, 5, 10):
            key = f"{band}/R@{k}"
            if key in metrics:
                assert f"{key} full model {metrics[key]:.1f} %, linear only {baseline[key]:.1f} %" in labels
    stages = {text.split(": ")[0] for tag, a in page.tags if tag == "div" and (text := str(a.get("title", "")))}
    assert stages == results["seconds"].keys()
    settings = {k for k, v in results["config"].items() if not isinstance(v, dict)}
    settings |= {f"{g}.{k}" for g, v in results["config"].items() if isinstance(v, dict) for k in v}
    shown = [text for names, _, text in page.texts if names[-1] == "dt" and names.count("details")]
    assert settings | results["versions"].keys() == set(shown)
    assert results["command"] in page.text
    assert set(results["hardware"].values()) <= set(page.text.splitlines())


def test_tables_are_those_of_the_files(finished: Path) -> None:
    page = _page(finished)
    with open(finished / "confusions" / "hardest-level-2.tsv", encoding="utf-8", newline="") as f:
        first = next(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    share = f"{100 * float(first['recall']):.0f} %"
    assert any(row[1:] == [first["positives"], first["misses"], share] for row in page.rows)
    recalls = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    said = ", ".join(
        f"level {r['level']} {100 * r['beam_recall']:.1f} %" for r in recalls if "beam_recall" in r and "level" in r
    )
    assert f"Beam recall: {said}" in [a.get("aria-label") for tag, a in page.tags if tag == "svg"]


def test_text_of_the_data_stays_text(finished: Path) -> None:
    """Also without escaping nothing would run: the page allows its own script alone."""
    source, page = (finished / "report.html").read_text(encoding="utf-8"), _page(finished)
    documents = page.of_class("doc")
    assert documents
    assert all("<script>alert(1)</script>\"'><img src=http" in text for text in documents)
    assert any("<script>alert(1)" in text for text in page.of_class("name"))
    assert source.count("<script") == 1
    assert "\x00" not in source
    assert "\x1b" not in source
    script = re.search(r"<script>(.*)</script>", source, re.DOTALL)
    policy = [str(a["content"]) for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert script is not None
    allowed = b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert policy == [f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"]


def test_samples_are_what_the_model_answers(finished: Path) -> None:
    facts, left_out = report._gather(finished)
    model, prepared = xmcdist.load(str(finished / "model")), PreparedDataset.open(finished / "prepared")
    Y = prepared.Y("tst")
    assert not left_out
    assert [s.picked for s in facts.samples[:6]] == ["random"] * 6
    assert any(s.picked == "wrong" for s in facts.samples)
    assert len(facts.samples) == 10
    for sample in facts.samples:
        true = set(Y[sample.document].indices.tolist())
        answers = model.predict([prepared.texts("tst")[sample.document]], k=5)[0]
        assert [a.label for a in sample.answers] == [a.label for a in answers]
        assert [a.hit for a in sample.answers] == [a.label_id in true for a in answers]
        assert sum(hit for _, hit in sample.truths) == sum(a.hit for a in sample.answers)
        assert len(sample.truths) == len(true)
        assert sample.picked == "random" or not sample.answers[0].hit
    page = _page(finished)
    assert len(page.of_class("tick")) == sum(a.hit for s in facts.samples for a in s.answers)
    assert len(page.of_class("badge")) == len(facts.samples)


def test_cluster_sizes_and_frequencies_do_not_depend_on_blocks(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = LabelTree.load(finished / "stages" / "tree" / "tree")
    frequency = np.load(finished / "model" / "label_frequency.npy")
    for chunk in (3, 1 << 20):
        monkeypatch.setattr(report, "_CHUNK", chunk)
        found = report._trees(finished)[0]
        assert list(found.nodes) == [tree.level_size(t) for t in range(1, tree.depth + 1)]
        for level in found.levels:
            sizes, counts = np.unique(np.diff(tree.slot_ptr(level.level)), return_counts=True)
            assert (level.sizes, level.counts) == (sizes.tolist(), counts.tolist())
        labels = report._frequency(finished / "model" / "label_frequency.npy")
        assert labels is not None
        assert labels.total == len(frequency)
        assert np.repeat(labels.frequency, labels.labels).tolist() == sorted(frequency[frequency > 0].tolist())[::-1]


def test_the_same_files_give_the_same_page(copy: Path, finished: Path) -> None:
    once = report.write_report(copy)[0].read_bytes()
    assert report.write_report(copy)[0].read_bytes() == once
    assert once.decode().replace(str(copy), str(finished)) == (finished / "report.html").read_text(encoding="utf-8")


def test_a_stopped_run_tells_how_far_it_came(copy: Path) -> None:
    for name in ("results.json", "confusions/level-2.tsv"):
        (copy / name).unlink()
    for name in ("model", "stages/export", "stages/embed", "stages/ranker_tree"):
        shutil.rmtree(copy / name)
    for stage in (copy / "stages").glob("rank-*"):
        shutil.rmtree(stage)
    (copy / "stages" / "match-2").rename(copy / "stages" / "match-2.partial")
    with open(copy / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"level": 2, "step": 3, "tot')  # torn
    path, left_out = report.write_report(copy)
    page = Page(path.read_text(encoding="utf-8"))
    _check_whole(page)
    assert not left_out
    assert page.headings == ["Training", "Labels and tree", "What the matcher confuses", *LAST]
    (notice,) = page.of_class("notice")
    assert "not finished" in notice
    assert "match-2 is under way" in notice
    assert "match-1" in notice
    assert "Loss" in page.figures
    (copy / "preempted.json").write_text(json.dumps({"signal": "SIGUSR1", "stage": "match-2", "step": 3}))
    report.write_report(copy)
    assert "stopped by SIGUSR1 in match-2 at step 3" in _page(copy).of_class("notice")[0]


def test_what_cannot_be_read_is_left_out_and_named(copy: Path) -> None:
    whole = (copy / "model" / "label_frequency.npy").read_bytes()
    (copy / "model" / "label_frequency.npy").write_bytes(whole[:40])
    (copy / "results.json").write_text("{")
    path, left_out = report.write_report(copy)
    page = Page(path.read_text(encoding="utf-8"))
    _check_whole(page)
    assert [note.split(" (")[0] for note in left_out] == ["results", "the model's answers", "label frequencies"]
    assert "Quality" not in page.headings
    assert "Training" in page.headings


def test_a_linear_run_shows_what_it_has(data: Path, tmp_path: Path) -> None:
    results = _train(data, tmp_path / "run", "encoder=none")
    page = _page(tmp_path / "run")
    _check_whole(page)
    assert page.headings == ["Quality", "Labels and tree", "Sample documents", *LAST]
    assert f"{results['metrics']['P@1']:.1f}" in page.of_class("n")
    assert "linear only" not in page.text


def test_a_run_on_features_without_texts(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("trn", 90), ("tst", 20)):
        _, Y = texts_and_labels(count, 12)
        sp.save_npz(folder / f"Y.{split}.npz", Y)
        X = sp.csr_matrix(Y @ np.eye(12, 30) + 0.1 * rng.random((count, 30)), dtype=np.float32)
        sp.save_npz(folder / f"X.{split}.npz", X)
    _train(folder, tmp_path / "run", "encoder=none")
    page = _page(tmp_path / "run")
    _check_whole(page)
    assert "Sample documents" in page.headings
    assert not page.of_class("doc")
    assert "predict(None, features=X, k=5)" in page.text


def test_a_failure_to_draw_does_not_fail_a_finished_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(facts: object) -> str:
        raise ZeroDivisionError("made up")

    monkeypatch.setattr(report, "page", broken)
    results = _train(data, tmp_path / "run", "encoder=none", "evaluation.ks=[1]")
    assert results["metrics"]["P@1"] > 0
    assert (tmp_path / "run" / "results.json").is_file()
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert not (tmp_path / "run" / "report.html").exists()
    said = (tmp_path / "run" / "run.log").read_text()
    assert "warning: no report.html (ZeroDivisionError: made up); the run itself is complete" in said


def test_the_command_makes_it_again(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (copy / "report.html").unlink()
    monkeypatch.setattr("sys.argv", ["xmcdist report", str(copy)])
    command.main()
    assert capsys.readouterr().out.strip() == str(copy / "report.html")
    assert _page(copy).headings == SECTIONS + LAST
    monkeypatch.setattr("sys.argv", ["xmcdist report", str(copy / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "is no run folder" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["xmcdist report"])
    with pytest.raises(SystemExit, match="takes one run folder"):
        command.main()
