"""Ranker stages with the solver for GPUs: the same model, and a message where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pipelines.test_rank_stages import SCHEMES, _rank, single
from xmcdist.parallel.launch import World
from xmcdist.parallel.mesh import Mesh
from xmcdist.pipelines import ranking
from xmcdist.rankers.model import LinearTree

__all__ = ["single"]


def _weights(model: LinearTree) -> np.ndarray:
    """Of all levels, flat."""
    flat = []
    for level in model.levels:
        flat += [level.sparse_rows().toarray().ravel(), *(a.ravel() for a in level.dense_rows())]
    return np.concatenate(flat)


def _train(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, *overrides: str) -> np.ndarray:
    monkeypatch.setitem(SCHEMES, name, [*SCHEMES["weighted"], "ranker.eps=1e-4", "ranker.max_iter=10000", *overrides])
    return _weights(_rank(folder, name, World.single(), Mesh(World.single())))


def test_stages_on_a_device_train_the_model_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, single: Path, tmp_path: Path
) -> None:
    want = _train(monkeypatch, single, "on-cpu", "ranker.device=cpu")
    calls = []
    real = ranking.solve_level_on_device
    monkeypatch.setattr(ranking, "ranker_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(ranking, "solve_level_on_device", lambda *a, **k: calls.append(k["nodes"]) or real(*a, **k))
    got = _train(monkeypatch, single, "on-device", "ranker.device=auto")
    assert calls == [(0, 3), (0, 7), (0, 23)]
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert np.abs(want).max() > 0.5


def test_cuda_without_a_gpu_says_so_once_and_trains_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, single: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    want = _train(monkeypatch, single, "cpu", "ranker.device=cpu")
    assert "CUDA" not in capsys.readouterr().err
    got = _train(monkeypatch, single, "auto", "ranker.device=auto")
    assert "CUDA" not in capsys.readouterr().err
    np.testing.assert_array_equal(got, want)
    got = _train(monkeypatch, single, "cuda", "ranker.device=cuda")
    assert capsys.readouterr().err.count("there is no CUDA device") == 1
    np.testing.assert_array_equal(got, want)
