"""The whole run on 1 to 4 real processes and other engines: what comes from the data alone is identical."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.launch import launch
from tests.helpers.toy import TINY_RUN, write_text_folder

LOSS_TOLERANCE = 2e-4  # relative, fp32, a dozen steps a level


KINDS = {
    "1": (1, []),
    "3": (3, []),
    "zero3 on 2": (2, ["engine.name=zero3"]),
    "fsdp2 on 2x2": (4, ["engine.name=fsdp2", "engine.label_shards=2"]),
}
"""Processes and settings."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run of every kind.

    41 labels and 361 documents divide by no number of processes; level 1 has fewer nodes than some.
    """
    folder = tmp_path_factory.mktemp("world")
    data = write_text_folder(folder / "data", train=361, test=61, labels=41)
    for kind, (world, settings) in KINDS.items():
        args = [f"dataset.path={data}", f"run_dir={folder / kind}", "negatives.scheme=tfn", *TINY_RUN, *settings]
        launch(world, "train", *args, log=folder / f"{kind}.log")
    return {kind: folder / kind for kind in KINDS}


def _digest(run: Path, *globs: str) -> dict[str, str]:
    files = sorted(p for g in globs for p in run.glob(f"stages/{g}") if p.suffix == ".npy")
    assert files, globs
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [*KINDS][1:])
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
    runs: dict[str, Path], kind: str, globs: tuple[str, ...]
) -> None:
    assert _digest(runs[kind], *globs) == _digest(runs["1"], *globs)


def _losses(run: Path) -> dict[tuple[int, int], float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(r["level"], r["step"]): r["loss"] for r in rows if "loss" in r}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [*KINDS][1:])
def test_losses_agree_within_float32_tolerance_and_metrics_to_a_tenth_of_a_point(
    runs: dict[str, Path], kind: str
) -> None:
    want, got = _losses(runs["1"]), _losses(runs[kind])
    assert got.keys() == want.keys()
    assert len(want) >= 24
    np.testing.assert_allclose([got[k] for k in want], list(want.values()), rtol=LOSS_TOLERANCE)
    one, many = (json.loads((runs[w] / "results.json").read_text()) for w in ("1", kind))
    assert many["world_size"] == KINDS[kind][0]
    for part in ("metrics", "baseline"):
        for key in one[part]:
            assert many[part][key] == pytest.approx(one[part][key], abs=0.1), (part, key)


@pytest.mark.distributed
def test_the_run_learns(runs: dict[str, Path]) -> None:
    metrics = json.loads((runs["1"] / "results.json").read_text())["metrics"]
    assert metrics["P@1"] > 60


@pytest.mark.distributed
def test_rank_0_alone_talks(runs: dict[str, Path]) -> None:
    text = (runs["3"].parent / "3.log").read_text()
    assert text.count("linear only") == 1
    assert text.count(" tree: levels") == 1
