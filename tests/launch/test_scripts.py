"""Launch scripts parse, find their interpreter, and install once; documents name every setting."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from xmcdist.config import commands, schema

ROOT = Path(__file__).resolve().parents[2]
SOURCED = {ROOT / "slurm" / "job.sh"}
SCRIPTS = sorted(
    {*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/**/*.sbatch"), *ROOT.glob("slurm/**/*.sh"), ROOT / ".ci" / "run"}
    - SOURCED
)


def bash(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_parses_and_stops_at_errors(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text or '/common.sh"' in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Just what common.sh looks at, and an interpreter that notes how it is called."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "common.sh", tmp_path / "launch")
    (tmp_path / "pyproject.toml").write_text("one", encoding="utf-8")
    (tmp_path / "constraints.txt").write_text("torch==1", encoding="utf-8")
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
        echo "$*" >> {tmp_path}/calls
        case "$*" in
          *version_info*) exit "${{TOO_OLD:-0}}" ;;
          "-m venv"*) mkdir -p {tmp_path}/.venv/bin; cp "$0" {tmp_path}/.venv/bin/python ;;
        esac
        """,
        encoding="utf-8",
    )
    python.chmod(0o755)
    return tmp_path


def use_venv(checkout: Path, extras: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    calls = checkout / "calls"
    calls.write_text("", encoding="utf-8")
    given = {"XMCDIST_PYTHON": str(checkout / "python"), "XMCDIST_VENV": "", "XMCDIST_CONSTRAINTS": "", **environment}
    done = bash(f". {checkout}/launch/common.sh; use_venv {extras}", **given)
    return done, [c for c in calls.read_text(encoding="utf-8").splitlines() if "version_info" not in c]


def test_environment_is_made_once_and_again_when_the_recipe_changes(checkout: Path) -> None:
    done, calls = use_venv(checkout, "minilm dev")
    assert done.returncode == 0, done.stderr
    assert calls[0].startswith("-m venv")
    assert calls[1].endswith(f"-c {checkout}/constraints.txt -e {checkout}[minilm]")
    assert use_venv(checkout, "minilm dev")[1] == []
    (checkout / "constraints.txt").write_text("torch==2", encoding="utf-8")
    assert len(use_venv(checkout, "minilm dev")[1]) == 1  # the same environment, installed into again
    (checkout / "pyproject.toml").write_text("two", encoding="utf-8")
    assert len(use_venv(checkout, "minilm dev")[1]) == 1


def test_the_wider_extra_serves_for_the_narrower_one_but_not_the_other_way(checkout: Path) -> None:
    use_venv(checkout, "minilm dev")
    assert len(use_venv(checkout, "dev")[1]) == 1
    assert use_venv(checkout, "minilm dev")[1] == []


def test_own_constraints(checkout: Path) -> None:
    _, calls = use_venv(checkout, "dev", XMCDIST_CONSTRAINTS="/dev/null")
    assert "-c /dev/null" in calls[1]
    done, _ = use_venv(checkout, "dev", XMCDIST_CONSTRAINTS=str(checkout / "absent.txt"))
    assert done.returncode == 1
    assert "absent.txt does not exist" in done.stderr


def test_old_python_is_refused_with_a_remedy(checkout: Path) -> None:
    done, _ = use_venv(checkout, "dev", TOO_OLD="1")
    assert done.returncode == 1
    assert "no Python >= 3.11" in done.stderr
    assert "XMCDIST_PYTHON" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(checkout: Path) -> None:
    (checkout / "home").mkdir()
    (checkout / "home" / "letter.txt").write_text("dear", encoding="utf-8")
    done, calls = use_venv(checkout, "dev", XMCDIST_VENV=str(checkout / "home"))
    assert done.returncode == 1
    assert "is no Python environment" in done.stderr
    assert calls == []
    assert (checkout / "home" / "letter.txt").exists()


def test_half_an_environment_is_not_kept(checkout: Path) -> None:
    python = checkout / "python"
    python.write_text(python.read_text(encoding="utf-8").replace("esac", "esac\n[[ $* != *venv* ]]"), encoding="utf-8")
    done, _ = use_venv(checkout, "dev")
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
    assert not (checkout / ".venv").exists()


def test_ci_runs_the_tests() -> None:
    assert "launch/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(ROOT.glob("launch/accelerate/*.yaml")), ids=lambda p: p.name)
def test_accelerate_accepts_its_config(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.num_processes == told["num_processes"]
    # With CPU as its type accelerate starts one process, whatever the number says.
    assert told["distributed_type"] == ("MULTI_GPU" if told["num_processes"] > 1 else "NO")
    assert told["use_cpu"] is False


def test_configuration_page_has_every_setting() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    run = schema.RunConfig()
    names = []
    for group in fields(schema.RunConfig):
        value = getattr(run, group.name)
        names += [f"{group.name}.{f.name}" for f in fields(value)] if is_dataclass(value) else [group.name]
    for other in (commands.PredictConfig, commands.ServeConfig, commands.EvaluateConfig, commands.TreeShowConfig):
        names += [f.name for f in fields(other) if f.name not in names]
    missing = [name for name in names if f"`{name}`" not in page]
    assert missing == []


def test_tests_named_by_the_architecture_page_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 10
    for path, test in named:
        assert f"def {test}" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"
