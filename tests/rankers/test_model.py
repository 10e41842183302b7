"""Weights as rows, as chunks, as files in one part or several; damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rankers.tiny import csr, problem
from xmcdist.rankers.model import LevelWeights, LinearTree
from xmcdist.rankers.part import WeightPart
from xmcdist.rankers.solver import SolverParams, solve_level
from xmcdist.trees.label_tree import LabelTree

ARRAYS = ["cluster_ptr", "chunk_node", "chunk_ptr", "entry_start", "feature", "value", "dense", "bias", "entry_offset"]
ARRAYS += ["child"]
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
        np.testing.assert_array_equal(w.sparse_rows().toarray(), W.toarray()[start:stop])
        part = w.parts[0]
        for a, b in pairwise(part.chunk_ptr):
            features = part.feature[a:b].astype(int)
            assert (np.diff(features) > 0).all()


def test_solved_weights_have_the_layout_of_given_ones() -> None:
    p = problem()
    solved = solve_level(p.both, p.Y, p.M, p.child_ptr, SolverParams()).parts[0]
    W = LevelWeights((solved,)).sparse_rows()
    given = LevelWeights.from_rows(W, solved.dense_rows(), solved.bias, p.child_ptr).parts[0]
    for name in ARRAYS:
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
    for a, b in zip(m.levels, back.levels, strict=True):
        assert len(a.parts) == len(b.parts) == parts
        assert (a.sparse_rows() != b.sparse_rows()).nnz == 0
        for x, y in zip(a.dense_rows(), b.dense_rows(), strict=True):
            np.testing.assert_array_equal(x, y)
        assert not b.parts[0].value.flags.writeable  # a view of the file


def test_parts_written_by_their_owners_are_one_level(tmp_path: Path) -> None:
    level = model(3).levels[1]
    for i in (2, 0, 1):
        LevelWeights((level.parts[i],)).save(tmp_path / "level", part=i, parts=3)
    back = LevelWeights.load(tmp_path / "level")
    assert (back.sparse_rows() != level.sparse_rows()).nnz == 0
    LevelWeights((level.parts[0],)).save(tmp_path / "level", part=0, parts=2)
    with pytest.raises(ValueError, match="not all parts of one level"):
        LevelWeights.load(tmp_path / "level")


def header(path: Path) -> tuple[dict[str, Any], int]:
    """What a part's file says of itself, and where its arrays begin."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


def with_header(path: Path, about: dict[str, Any]) -> None:
    text = json.dumps(about).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[header(path)[1] :])


@pytest.mark.parametrize("name", ARRAYS)
def test_a_changed_byte_is_found_when_asked_for(tmp_path: Path, name: str) -> None:
    model(3).save(tmp_path)
    path = tmp_path / "level-2" / "part-00001-of-00003.safetensors"
    about, start = header(path)
    assert LinearTree.load(tmp_path, verify=True).num_sparse == 9
    raw = bytearray(path.read_bytes())
    raw[start + about[name]["data_offsets"][1] - 1] ^= 1  # pointers: of the last, the highest byte
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"{path.name}: damaged.*{name}"):
        LinearTree.load(tmp_path, verify=True)


@pytest.mark.parametrize("how", ["cut", "longer", "gone", "empty", "garbage"])
def test_a_damaged_file_is_named(tmp_path: Path, how: str) -> None:
    model().save(tmp_path)
    path = tmp_path / "level-2" / "part-00000-of-00001.safetensors"
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[:-5], "longer": raw + b"x", "empty": b"", "garbage": b"x" * 200}.get(how, b""))
    if how == "gone":
        path.unlink()
    with pytest.raises(ValueError, match="level-2.*train" if how == "gone" else path.name):
        LinearTree.load(tmp_path)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("how", ["shorter", "other type", "left out"])
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, name: str, how: str) -> None:
    model().save(tmp_path)
    path = tmp_path / "level-2" / "part-00000-of-00001.safetensors"
    about, _ = header(path)
    mine = about[name]
    if how == "left out":
        del about[name]
    elif how == "shorter":
        size = {"I64": 8, "U32": 4, "F32": 4, "U16": 2, "U8": 1}[mine["dtype"]]
        mine["shape"][0] -= 1
        mine["data_offsets"][0] += size
        if name == "child":  # lies last in the file, whose length must still be right
            mine["data_offsets"] = [x - size for x in mine["data_offsets"]]
            path.write_bytes(path.read_bytes()[:-size])
    else:
        mine["dtype"] = {"I64": "F32", "U32": "F32", "F32": "U32", "U16": "F16", "U8": "U16"}[mine["dtype"]]
    with_header(path, about)
    with pytest.raises(ValueError, match=f"{path.name}: damaged"):
        LinearTree.load(tmp_path)


def test_a_part_is_a_file_that_others_read(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    m = model()
    m.save(tmp_path)
    read = load_file(tmp_path / "level-2" / "part-00000-of-00001.safetensors")
    for name in ARRAYS:
        np.testing.assert_array_equal(read[name], getattr(m.levels[1].parts[0], name))


def test_older_models_are_refused(tmp_path: Path) -> None:
    model().save(tmp_path)
    head = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(head | {"version": 1}))
    with pytest.raises(ValueError, match="version 1, this program reads 2"):
        LinearTree.load(tmp_path)


@pytest.mark.parametrize("sizes", [[300], [256, 0, 257], [1, 600, 3]])
def test_wide_clusters_are_several_chunks(tmp_path: Path, sizes: list[int]) -> None:
    rng = np.random.default_rng(3)
    child_ptr = np.concatenate([[0], np.cumsum(sizes)])
    n = int(child_ptr[-1])
    W, E = csr(rng.normal(size=(n, 400)) * (rng.random((n, 400)) < 0.5)), rng.normal(size=(n, 5)).astype(np.float32)
    level = LevelWeights.from_rows(W, E, E[:, 0].copy(), child_ptr)
    part = level.parts[0]
    assert np.diff(part.chunk_node).max() <= 256
    assert part.feature.size > 256  # more than one start for the entries
    level.save(tmp_path)
    pieces = [LevelWeights.load(tmp_path).cut(a, b, child_ptr) for a, b in ((0, 290), (290, 291), (291, n))]
    pieces[0].save(tmp_path / "piece")  # a piece is written without the rest
    assert LevelWeights.load(tmp_path / "piece").parts[0].bias.size <= 290
    for some in (level, LevelWeights.concat([LevelWeights.load(tmp_path / "piece"), *pieces[1:]])):
        np.testing.assert_array_equal(some.sparse_rows().toarray(), W.toarray())
        np.testing.assert_array_equal(some.dense_rows()[0], E)
        np.testing.assert_array_equal(some.dense_rows()[1], E[:, 0])
        np.testing.assert_array_equal(some.node_weights(child_ptr).sum(), W.nnz + 6 * n)
        assert some.nnz == W.nnz


def test_chunks_of_a_solver_become_the_part_that_rows_become() -> None:
    rng = np.random.default_rng(4)
    child_ptr = np.array([0, 4, 4, 604, 610])
    W = rng.normal(size=(610, 30)) * (rng.random((610, 30)) < 0.4)
    W, E, b = W.astype(np.float32), rng.normal(size=(610, 2)).astype(np.float32), rng.random(610).astype(np.float32)
    chunks = []
    for start, stop in pairwise(child_ptr):
        columns = [(f, np.flatnonzero(W[start:stop, f])) for f in range(30) if W[start:stop, f].any()]
        chunks.append(
            (
                np.array([f for f, _ in columns], np.int64),
                np.array([len(rows) for _, rows in columns], np.int64),
                np.concatenate([np.zeros(0, np.uint32), *(rows for _, rows in columns)]).astype(np.uint32),
                np.concatenate([np.zeros(0, np.float32), *(W[start + rows, f] for f, rows in columns)]),
            )
        )
    made = WeightPart.from_chunks(chunks, child_ptr, E.copy(), b, 0, 30)
    assert chunks == []
    given = WeightPart.from_rows(csr(W), E, b, child_ptr)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(made, name), getattr(given, name), err_msg=name)
        assert getattr(made, name).dtype == getattr(given, name).dtype


@pytest.mark.parametrize(("dtype", "sparse"), [("float16", np.float16), ("mixed", np.float32)])
def test_half_of_the_bytes_a_weight(tmp_path: Path, dtype: str, sparse: type) -> None:
    m = model(2)
    half = replace(m, levels=[level.astype(dtype) for level in m.levels])
    half.save(tmp_path)
    back = LinearTree.load(tmp_path, verify=True)
    for a, b in zip(m.levels, back.levels, strict=True):
        assert b.dtype == dtype
        np.testing.assert_array_equal(b.sparse_rows().toarray(), a.sparse_rows().toarray().astype(sparse))
        np.testing.assert_array_equal(b.dense_rows()[0], a.dense_rows()[0].astype(np.float16))
        np.testing.assert_array_equal(b.dense_rows()[1], a.dense_rows()[1])  # bias terms keep their precision
        for start, stop in ((0, 2), (1, 3)):
            piece = b.cut(start, stop, np.array([0, b.num_nodes]))
            assert piece.dtype == dtype
            np.testing.assert_array_equal(piece.sparse_rows().toarray(), b.sparse_rows().toarray()[start:stop])
            np.testing.assert_array_equal(piece.dense_rows()[0], b.dense_rows()[0][start:stop])
    with pytest.raises(ValueError, match=f"level 2: {dtype} weights, level 1 has float32"):
        replace(m, levels=[m.levels[0], half.levels[1]])
    large = LevelWeights.from_rows(csr(np.full((4, 1), 1e6)), None, np.zeros(4, np.float32), np.array([0, 4]))
    with pytest.raises(ValueError, match="keep float32"):
        large.astype("float16")


def test_a_folder_without_its_last_file_is_no_model(tmp_path: Path) -> None:
    model().save(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.json"):
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
