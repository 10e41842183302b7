"""The whole run on 1, 2 and 3 real processes: what comes from the data alone is identical."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.launch import launch
from tests.helpers.toy import TINY_RUN, write_text_folder

LOSS_TOLERANCE = 2e-4  # relative, fp32, a dozen steps a level


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on each number of processes; 41 labels and 361 documents divide by none of them."""
    folder = tmp_path_factory.mktemp("world")
    data = write_text_folder(folder / "data", train=361, test=61, labels=41)
    for world in (1, 2, 3):
        args = [f"dataset.path={data}", f"run_dir={folder / str(world)}", "negatives.scheme=tfn", *TINY_RUN]
        launch(world, "train", *args, log=folder / f"{world}.log")
    return {world: folder / str(world) for world in (1, 2, 3)}


def _digest(run: Path, *globs: str) -> dict[str, str]:
    files = sorted(p for g in globs for p in run.glob(f"stages/{g}") if p.suffix == ".npy")
    assert files, globs
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "globs",
    [
        pytest.param(("features/X.*/*",), id="features"),
        pytest.param(("tree/tree/*", "tree/Y.level-*/*"), id="tree"),
        pytest.param(("tokens/tokens.trn/*",), id="tokens"),
        pytest.param(("match-*/M/*",), id="teacher-forced"),
    ],
)
def test_what_comes_from_the_data_alone_is_bit_identical(
    runs: dict[int, Path], world: int, globs: tuple[str, ...]
) -> None:
    assert _digest(runs[world], *globs) == _digest(runs[1], *globs)


def _losses(run: Path) -> dict[tuple[int, int], float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(r["level"], r["step"]): r["loss"] for r in rows if "loss" in r}


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_losses_agree_within_float32_tolerance_and_metrics_to_a_tenth_of_a_point(
    runs: dict[int, Path], world: int
) -> None:
    want, got = _losses(runs[1]), _losses(runs[world])
    assert got.keys() == want.keys()
    assert len(want) >= 24
    np.testing.assert_allclose([got[k] for k in want], list(want.values()), rtol=LOSS_TOLERANCE)
    one, many = (json.loads((runs[w] / "results.json").read_text()) for w in (1, world))
    assert many["world_size"] == world
    for part in ("metrics", "baseline"):
        for key in one[part]:
            assert many[part][key] == pytest.approx(one[part][key], abs=0.1), (part, key)


@pytest.mark.distributed
def test_the_run_learns(runs: dict[int, Path]) -> None:
    metrics = json.loads((runs[1] / "results.json").read_text())["metrics"]
    assert metrics["P@1"] > 60


@pytest.mark.distributed
def test_rank_0_alone_talks(runs: dict[int, Path]) -> None:
    text = (runs[3].parent / "3.log").read_text()
    assert text.count("linear only") == 1
    assert text.count(" tree: levels") == 1
