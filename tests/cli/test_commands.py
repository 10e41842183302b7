"""Commands as a person types them, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tests.helpers.pecos_model import Chain
from tests.helpers.toy import write_jsonl, write_text_folder


def _xmcdist(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, "-m", "xmcdist", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=300,
    )


def test_help_of_everything() -> None:
    assert "train" in _xmcdist("--help").stdout
    for command, setting in (
        ("prepare", "dataset"),
        ("train", "matcher"),
        ("predict", "text_column"),
        ("evaluate", "model"),
        ("serve", "max_batch"),
        ("calibrate", "split"),
        ("import-pecos", "label_frequency"),
        ("tree", "cluster"),
        ("env", "usage"),
    ):
        done = _xmcdist(command, "--help")
        assert done.returncode == 0, done.stderr
        assert setting in done.stdout, command


def test_help_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['xmcdist', '--help']; import xmcdist.__main__ as m; m.main(); import xmcdist; "
    code += "assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], capture_output=True)


def test_an_unknown_command_names_the_nearest() -> None:
    done = _xmcdist("trian")
    assert done.returncode == 1
    assert "did you mean train?" in done.stderr


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (("train", "matcher.beem=3"), "did you mean 'matcher.beam'"),
        (("train", "dataset.path=/nowhere/at/all", "encoder=none", "run_dir=RUN"), "/nowhere/at/all"),
        (("predict", "model=/nowhere", "input=/nowhere", "output=out.jsonl"), "input=/nowhere does not exist"),
        (("evaluate", "model=/nowhere", "dataset.path=x"), "no model folder"),
        (("evaluate", "model=[/nowhere,x]", "dataset.path=x"), "no model folder"),
        (("evaluate", "model=x", "ensemble=rank", "dataset.path=x"), "ensemble=rank needs several models"),
        (("calibrate", "model=/nowhere", "dataset.path=x"), "no model folder"),
        (("calibrate", "model=/nowhere", "dataset.path=x", "method=spline"), "is none of isotonic, platt"),
        (("import-pecos", "source=/nowhere", "output=out"), "source=/nowhere is no folder"),
        (("import-pecos", "sauce=x"), "did you mean 'source'"),
        (("tree", "show"), "give one of run_dir=RUN or model="),
        (("tree", "draw"), "there is only `tree show`"),
    ],
)
def test_a_mistake_is_one_line_without_traceback_and_writes_nothing(
    args: tuple[str, ...], answer: str, tmp_path: Path
) -> None:
    done = _xmcdist(*args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert answer in done.stderr
    assert "Traceback" not in done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_cfg_job_prints_the_resolved_settings() -> None:
    done = _xmcdist("train", "--cfg", "job", "seed=5")
    assert "seed: 5" in done.stdout


def test_env_names_versions() -> None:
    assert "numpy" in _xmcdist("env").stdout


@pytest.fixture(scope="module")
def linear_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linear")
    write_text_folder(folder / "data")
    done = _xmcdist(
        "train", f"dataset.path={folder / 'data'}", f"run_dir={folder / 'run'}", "encoder=none", "tree.max_leaf_size=5"
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_predict_evaluate_and_tree_from_another_folder(linear_run: Path, tmp_path: Path) -> None:
    model = linear_run / "run" / "model"
    (tmp_path / "docs.txt").write_text("w0 w1 noise3\n\nw20 w21\n")
    done = _xmcdist("predict", f"model={model}", "input=docs.txt", "output=out.jsonl", "k=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(r["labels"]) for r in rows] == [3, 3, 3]  # the empty document too: from the bias
    assert rows[0]["labels"][0] == {**rows[0]["labels"][0], "label": "label 0 : w0 w1", "id": 0}
    assert rows[2]["labels"][0]["id"] == 10
    done = _xmcdist("evaluate", f"model={model}", f"dataset.path={linear_run / 'data'}", "output=m.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((linear_run / "run" / "results.json").read_text())
    again = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert again == pytest.approx(results["metrics"], abs=1e-9)
    assert results["metrics"]["P@1"] > 60
    shown = _xmcdist("tree", "show", f"run_dir={linear_run / 'run'}", "label=label 3")
    assert "label 3 : w6 w7" in shown.stdout, shown.stderr
    missing = _xmcdist("tree", "show", f"run_dir={linear_run / 'run'}", "label=no such thing")
    assert missing.returncode == 2
    assert "no label reads 'no such thing'" in missing.stderr


def test_a_linear_model_is_opened_and_answers_without_torch(linear_run: Path) -> None:
    """Nor is the vocabulary read, with what it needs, before the first text comes."""
    code = f"import sys, xmcdist; m = xmcdist.load({str(linear_run / 'run' / 'model')!r}); "
    code += "assert 'sklearn' not in sys.modules; a = m.predict(['w0 w1'], k=1); assert 'torch' not in sys.modules; "
    code += "print(a[0][0].label_id)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_damaged_vocabulary_is_told_in_one_line(linear_run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(linear_run / "run" / "model", tmp_path / "model")
    (model / "tfidf" / "idf.npy").write_bytes(b"short")
    (tmp_path / "docs.txt").write_text("w0 w1\n")
    done = _xmcdist("predict", f"model={model}", "input=docs.txt", "output=out.jsonl", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "holds no whole TF-IDF vocabulary" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_second_start_skips_every_stage_and_another_setting_is_refused(linear_run: Path) -> None:
    args = ("train", f"dataset.path={linear_run / 'data'}", f"run_dir={linear_run / 'run'}", "encoder=none")
    again = _xmcdist(*args, "tree.max_leaf_size=5")
    assert again.returncode == 0
    results = json.loads((linear_run / "run" / "results.json").read_text())
    assert {"features", "tree", "linear-1", "export"} <= set(results["stages_skipped"])
    other = _xmcdist(*args, "tree.max_leaf_size=6")
    assert other.returncode == 2
    assert "tree.max_leaf_size: there 5, asked 6" in other.stderr


def test_prepare_tells_counts_and_is_reused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path)
    done = _xmcdist("prepare", f"dataset.path={path}", f"dataset.prepared={tmp_path / 'p'}")
    assert done.returncode == 0, done.stderr
    stamp = (tmp_path / "p" / "manifest.json").stat().st_mtime_ns
    assert _xmcdist("prepare", f"dataset.path={path}", f"dataset.prepared={tmp_path / 'p'}").returncode == 0
    assert (tmp_path / "p" / "manifest.json").stat().st_mtime_ns == stamp


def test_from_a_pecos_folder_to_probabilities(tmp_path: Path) -> None:
    """import-pecos, evaluate, calibrate, predict, as a person moving over types them."""
    chain = Chain(topk=(3, 3, 6))
    chain.write(tmp_path / "pecos")
    best = [max(row, key=lambda j: (row[j], -j)) for row in chain.scores(3)]
    (tmp_path / "data").mkdir()
    Y = sp.csr_matrix((np.ones(9, np.float32), (np.arange(9), best)), shape=(9, 20))
    X = sp.csr_matrix(chain.X)
    for split, rows in (("trn", slice(0, 3)), ("tst", slice(0, 9))):
        sp.save_npz(tmp_path / "data" / f"X.{split}.npz", X[rows])
        sp.save_npz(tmp_path / "data" / f"Y.{split}.npz", Y[rows])
    done = _xmcdist("import-pecos", "source=pecos", "output=model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model: 20 labels, levels 3 > 7 > 20" in done.stdout
    assert "note: labels are named by their numbers" in done.stdout
    done = _xmcdist("evaluate", "model=model", "dataset.path=data", "output=m.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "m.json").read_text())["metrics"]["P@1"] == 100
    done = _xmcdist("calibrate", "model=model", "dataset.path=data", "method=platt", "k=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "platt on 9 documents, 27 labels, 33.3% of them right" in done.stdout
    done = _xmcdist("predict", "model=model", "input=data/X.tst.npz", "output=out.jsonl", "k=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line)["labels"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row[0]["id"] for row in rows] == best
    assert all(0 < row[1]["probability"] <= row[0]["probability"] < 1 for row in rows)
    assert all(row[0]["label"] == str(row[0]["id"]) for row in rows)
