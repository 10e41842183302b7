"""Weights as rows, as chunks, as files in one part or several; damaged files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.rankers.tiny import csr, problem
from xmcdist.rankers.model import LevelWeights, LinearTree
from xmcdist.rankers.solver import SolverParams, solve_level
from xmcdist.trees.label_tree import LabelTree

CHILD_PTR = np.array([0, 3, 3, 9, 12])


def tree() -> LabelTree:
    return LabelTree([np.array([0, 4]), CHILD_PTR], np.arange(12)[::-1].copy(), 12)


def model(parts: int = 1) -> LinearTree:
    """Random weights on both levels, the last in several parts that cut clusters."""
    rng, levels = np.random.default_rng(0), []
    for child_ptr in tree().child_ptr:
        n = int(child_ptr[-1])
        W = csr(rng.normal(size=(n, 9)) * (rng.random((n, 9)) < 0.5))
        E, b = rng.normal(size=(n, 3)).astype(np.float32), rng.normal(size=n).astype(np.float32)
        cuts = np.linspace(0, n, parts + 1).astype(int)
        levels.append(
            LevelWeights.concat(
                [LevelWeights.from_rows(W[i:j], E[i:j], b[i:j], child_ptr, i) for i, j in pairwise(cuts)]
            )
        )
    return LinearTree(tree(), levels, 9, 3, last_post_processor="noop", bias=2.0)


@pytest.mark.parametrize("width", [1, 30])
def test_rows_to_chunks_and_back(width: int) -> None:
    rng = np.random.default_rng(1)
    W = csr(rng.normal(size=(12, width)) * (rng.random((12, width)) < 0.3 + (width == 1)))
    for start, stop in ((0, 12), (2, 8), (3, 3), (4, 5)):
        w = LevelWeights.from_rows(W[start:stop], None, np.zeros(stop - start, np.float32), CHILD_PTR, start)
        np.testing.assert_array_equal(w.sparse_rows(CHILD_PTR).toarray(), W.toarray()[start:stop])
        part = w.parts[0]
        for c in range(part.num_clusters):
            features = part.feature[part.chunk_ptr[c] : part.chunk_ptr[c + 1]].astype(int)
            assert (np.diff(features) > 0).all()


def test_solved_weights_have_the_layout_of_given_ones() -> None:
    p = problem()
    solved = solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams()).parts[0]
    W = LevelWeights((solved,)).sparse_rows(p.child_ptr)
    given = LevelWeights.from_rows(W, solved.dense, solved.bias, p.child_ptr).parts[0]
    for name in ("chunk_ptr", "feature", "entry_ptr", "child", "value", "dense", "bias"):
        np.testing.assert_array_equal(getattr(solved, name), getattr(given, name), err_msg=name)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_saved_model_opens_as_it_was(tmp_path: Path, parts: int) -> None:
    m = model(parts)
    m.save(tmp_path / "m")
    m.save(tmp_path / "m")  # over an older one
    back = LinearTree.load(tmp_path / "m")
    assert (back.num_sparse, back.num_dense, back.bias) == (9, 3, 2.0)
    assert (back.post_processor, back.last_post_processor) == ("l3-hinge", "noop")
    np.testing.assert_array_equal(back.tree.labels, m.tree.labels)
    for a, b, child_ptr in zip(m.levels, back.levels, m.tree.child_ptr, strict=True):
        assert len(a.parts) == len(b.parts) == parts
        assert (a.sparse_rows(child_ptr) != b.sparse_rows(child_ptr)).nnz == 0
        for x, y in zip(a.dense_rows(), b.dense_rows(), strict=True):
            np.testing.assert_array_equal(x, y)
        assert not b.parts[0].value.flags.writeable  # a view of the file


def test_parts_written_by_their_owners_are_one_level(tmp_path: Path) -> None:
    level = model(3).levels[1]
    for i in (2, 0, 1):
        LevelWeights((level.parts[i],)).save(tmp_path / "level", part=i, parts=3)
    back = LevelWeights.load(tmp_path / "level")
    assert (back.sparse_rows(CHILD_PTR) != level.sparse_rows(CHILD_PTR)).nnz == 0
    LevelWeights((level.parts[0],)).save(tmp_path / "level", part=0, parts=2)
    with pytest.raises(ValueError, match="not all parts of one level"):
        LevelWeights.load(tmp_path / "level")


@pytest.mark.parametrize("name", ["chunk_ptr", "feature", "entry_ptr", "child", "value", "dense", "bias"])
@pytest.mark.parametrize("how", ["cut", "gone", "garbage", "shorter", "other type"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, how: str) -> None:
    model().save(tmp_path)
    path = tmp_path / "level-2" / "part-00000-of-00001" / f"{name}.npy"
    whole = np.load(path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "gone":
        path.unlink()
    elif how == "garbage":
        path.write_bytes(b"x" * 200)
    elif how == "shorter":
        np.save(path, whole[:-1])
    else:
        np.save(path, whole.astype(np.float64))
    with pytest.raises(ValueError, match=name if how in ("cut", "gone", "garbage", "other type") else "level-2"):
        LinearTree.load(tmp_path)


def test_a_folder_without_its_last_file_is_no_model(tmp_path: Path) -> None:
    model().save(tmp_path)
    for file in ("part.json", "model.json"):
        path = next(tmp_path.rglob(file))
        path.write_text("{")
        with pytest.raises(ValueError, match=file):
            LinearTree.load(tmp_path)
    model().save(tmp_path)
    head = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(head | {"num_dense": 4}))
    with pytest.raises(ValueError, match="do not belong together"):
        LinearTree.load(tmp_path)


def test_weights_must_fit_the_tree() -> None:
    m = model()
    with pytest.raises(ValueError, match="level 1"):
        LinearTree(m.tree, [m.levels[1]], 9, 3)
    with pytest.raises(ValueError, match="3 levels"):
        LinearTree(m.tree, [*m.levels, m.levels[1]], 9, 3)
    with pytest.raises(ValueError, match="starts at node"):
        LevelWeights.concat([m.levels[1], m.levels[1]])
    short = m.truncate(1)
    assert (short.tree.depth, len(short.levels)) == (1, 1)
