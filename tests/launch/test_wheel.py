"""A wheel carries all that a run needs: settings and the shipped data set."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def packed() -> list[str]:
    """Files of the checkout that must be inside, by their names in the wheel."""
    places = {
        "xmcdist": "xmcdist",
        "conf": "xmcdist/_conf",
        "data/debian-packages": "xmcdist/_data/debian-packages",
        "launch/deepspeed": "xmcdist/_launch/deepspeed",
    }
    tracked = subprocess.run(
        ["git", "ls-files", *places], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        f"{inside}{name.removeprefix(outside)}"
        for name in tracked
        for outside, inside in places.items()
        if name.startswith(f"{outside}/") and (ROOT / name).exists()
    ]


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout")
def test_wheel_holds_settings_and_data(tmp_path: Path) -> None:
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if build.returncode and ("Could not find a version" in build.stderr or "NewConnectionError" in build.stderr):
        pytest.skip("no package index to get the build backend from")
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("xmcdist-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        assert archive.testzip() is None
    expected = packed()
    assert len(expected) > 50
    assert sorted(set(expected) - names) == []
    assert any(n.endswith("debian-packages/COPYRIGHT") and "licenses" in n for n in names)
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/"))]
    assert "License-Expression: Apache-2.0" in metadata
