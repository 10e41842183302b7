"""Commands as a person types them, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
