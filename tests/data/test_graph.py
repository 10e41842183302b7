"""Graphs from every form, and what becomes of their edges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from tests.helpers.graphs import write_gz, write_ogb
from xmcdist.config.commands import GraphConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.data.errors import DataError
from xmcdist.data.graph import Cleaned, held_out_edges, rewired, undirected
from xmcdist.data.graph_prepared import prepare_graph

DIRECTED = [(0, 1), (1, 0), (1, 2), (3, 3), (1, 2), (4, 1), (2, 4)]  # both directions, a repetition, a loop
NEIGHBOURS = [{1}, {0, 2, 4}, {1, 4}, set(), {1, 2}, set()]
NAMES = ["zoe", "yan", "xu", "win", "val", "udo"]


def _neighbours(data: PreparedDataset, split: str = "trn") -> dict[int, set[int]]:
    Y = data.Y(split)
    return {int(node): set(Y[i].indices.tolist()) for i, node in enumerate(data.nodes(split))}


def _texts(folder: Path) -> str:
    (folder / "texts.txt").write_text("".join(f"text {name}\n" for name in NAMES))
    return str(folder / "texts.txt")


def _npz(folder: Path, form: str) -> dict[str, Any]:
    u, v = np.array(DIRECTED).T
    sp.save_npz(folder / "A.npz", sp.coo_array((np.full(len(u), 2.5), (u, v)), shape=(6, 6)).asformat(form))
    return {"text": _texts(folder), "edges": str(folder / "A.npz")}


def _npy(folder: Path) -> dict[str, Any]:
    np.save(folder / "E.npy", np.array(DIRECTED, np.int32).T)
    return {"text": _texts(folder), "edges": str(folder / "E.npy")}


def _csv(folder: Path, header: str, name: str = "E.csv", mark: str = ",") -> dict[str, Any]:
    text = header + "".join(f"{a}{mark}{b}\n" for a, b in DIRECTED)
    if name.endswith(".gz"):
        write_gz(folder / name, text)
    else:
        (folder / name).write_text(text)
    return {"text": _texts(folder), "edges": str(folder / name)}


def _named(folder: Path) -> dict[str, Any]:
    rows = [{"who": name, "title": "text", "body": name} for name in NAMES]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = "weight,to,from\n" + "".join(f"1,{NAMES[b]},{NAMES[a]}\n" for a, b in DIRECTED)
    (folder / "E.csv").write_text(ends)
    return {
        "text": str(folder / "texts.jsonl"),
        "edges": str(folder / "E.csv"),
        "id_column": "who",
        "text_columns": ["title", "body"],
        "edge_columns": ["from", "to"],
    }


def _parquet(folder: Path) -> dict[str, Any]:
    half = len(NAMES) // 2
    for i, part in enumerate((NAMES[:half], NAMES[half:])):
        table = pa.table({"text": [f"text {n}" for n in part], "id": [7 + 3 * i + k for k in range(len(part))]})
        pq.write_table(table, folder / f"part{i}.parquet")
    u, v = np.array(DIRECTED).T + 7
    pq.write_table(pa.table({"a": u, "b": v}), folder / "E.parquet")
    texts = [str(folder / f"part{i}.parquet") for i in (0, 1)]
    return {"text": texts, "edges": str(folder / "E.parquet"), "id_column": "id"}


FORMS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "npz csr": lambda folder: _npz(folder, "csr"),
    "npz coo": lambda folder: _npz(folder, "coo"),
    "npy": _npy,
    "csv": lambda folder: _csv(folder, ""),
    "csv with header": lambda folder: _csv(folder, "source,target\n"),
    "tsv.gz": lambda folder: _csv(folder, "", "E.tsv.gz", "\t"),
    "named nodes": _named,
    "parquet in parts": _parquet,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_graph(form: str, tmp_path: Path) -> None:
    data = prepare_graph(GraphConfig(**FORMS[form](tmp_path)), "g", 0, tmp_path / "prepared")
    assert _neighbours(data) == {i: near for i, near in enumerate(NEIGHBOURS) if near}
    assert list(data.label_texts()) == [f"text {name}" for name in NAMES]
    assert list(data.texts("trn")) == [f"text {NAMES[i]}" for i in (0, 1, 2, 4)]
    graph = data.graph
    assert graph is not None
    assert (graph["nodes"], graph["edges"], graph["self_loops"], graph["nodes_without_edges"]) == (6, 4, 1, 2)
    ids, numbers = data.node_ids(), [str(i) for i in range(7, 13)]
    assert (None if ids is None else list(ids)) == {"named nodes": NAMES, "parquet in parts": numbers}.get(form)
    data.verify()
    again = prepare_graph(GraphConfig(**FORMS[form](tmp_path)), "g", 0, tmp_path / "prepared")
    assert again.fingerprint == data.fingerprint


def test_nodes_of_too_many_neighbours_stay_labels_only(tmp_path: Path) -> None:
    data = prepare_graph(GraphConfig(**_npy(tmp_path), max_degree=3), "g", 0, tmp_path / "prepared")
    assert _neighbours(data) == {0: {1}, 2: {1, 4}, 4: {1, 2}}
    assert any("graph.max_degree" in said for said in data.warnings)


def _random_graph(nodes: int = 400, edges: int = 3000) -> Cleaned:
    rng = np.random.default_rng(3)
    weights = rng.pareto(1.5, nodes) + 0.1  # a few nodes have most of the edges
    u, v = rng.choice(nodes, (2, edges), p=weights / weights.sum())
    return undirected(u, v, nodes)


def test_held_out_edges_do_not_depend_on_order_or_direction() -> None:
    graph = _random_graph()
    held = held_out_edges(graph, 0.2, 5)
    assert 0.16 < held.mean() < 0.24
    turned = undirected(graph.v[::-1], graph.u[::-1], graph.nodes)
    np.testing.assert_array_equal(held_out_edges(turned, 0.2, 5), held)
    less = undirected(graph.u[::2], graph.v[::2], graph.nodes)
    np.testing.assert_array_equal(held_out_edges(less, 0.2, 5), held[::2])
    assert (held_out_edges(graph, 0.2, 6) & held).mean() < 0.08


def test_a_held_out_edge_is_nowhere_in_training(tmp_path: Path) -> None:
    graph = _random_graph()
    (tmp_path / "texts.txt").write_text("".join(f"word{i}\n" for i in range(graph.nodes)))
    np.save(tmp_path / "E.npy", np.stack([graph.u, graph.v]))
    cfg = GraphConfig(text=str(tmp_path / "texts.txt"), edges=str(tmp_path / "E.npy"), holdout=0.2, max_degree=60)
    data = prepare_graph(cfg, "g", 5, tmp_path / "prepared")
    held = held_out_edges(graph, 0.2, 5)
    seen, asked = _neighbours(data), _neighbours(data, "tst")
    for u, v, out in zip(graph.u.tolist(), graph.v.tolist(), held.tolist(), strict=True):
        for a, b in ((u, v), (v, u)):
            assert (b in seen.get(a, ())) == (not out and a in seen)
            assert (b in asked.get(a, ())) == (out and a in asked)
    degree = np.bincount(np.concatenate([graph.u[~held], graph.v[~held]]), minlength=graph.nodes)
    assert degree.max() >= 60
    assert sorted(seen) == np.flatnonzero((degree > 0) & (degree < 60)).tolist()
    assert max(degree[node] for node in asked) < 60
    known = data.known("tst")
    assert known is not None
    for i, node in enumerate(data.nodes("tst").tolist()):
        assert set(known[i].indices.tolist()) == seen.get(node, set()) | {node}
    assert data.fingerprint != prepare_graph(cfg, "g", 6, tmp_path / "other").fingerprint


def test_a_rewired_graph_has_the_same_degrees_and_other_edges() -> None:
    graph = _random_graph()
    other = rewired(graph, 0)
    np.testing.assert_array_equal(np.diff(other.adjacency().indptr), np.diff(graph.adjacency().indptr))
    assert not (other.u == other.v).any()
    kept = np.intersect1d(graph.u * 400 + graph.v, other.u * 400 + other.v)
    assert len(kept) < 0.35 * len(graph.u)
    assert len(np.intersect1d(rewired(graph, 1).u * 400 + rewired(graph, 1).v, other.u * 400 + other.v)) < len(graph.u)


@pytest.mark.parametrize("tar_header", [False, True])
def test_a_folder_of_the_open_graph_benchmark(tar_header: bool, tmp_path: Path) -> None:
    folder = write_ogb(tmp_path / "ogbn_arxiv", tar_header)
    data = prepare_graph(GraphConfig(path=str(folder)), "g", 0, tmp_path / "prepared")
    ids = data.node_ids()
    assert ids is not None
    assert list(ids) == ["901", "15", "77", "300", "42", "8"]
    assert data.label_texts()[4] == 'Title of "42" Abstract, of 42.'
    assert all(data.label_texts())
    assert _neighbours(data) == {0: {1, 2}, 1: {0, 2}, 2: {0, 1}, 3: {4}, 4: {3}}
    assert not list((tmp_path / "prepared").glob("unsorted*"))


def test_texts_from_elsewhere_for_such_a_folder(tmp_path: Path) -> None:
    """As for ogbn-products, whose texts are those of Amazon-3M, by product id."""
    folder = write_ogb(tmp_path / "ogbn_products")
    rows = [{"uid": "42", "title": "a", "content": "b"}, {"uid": "x", "title": "c", "content": ""}]
    write_gz(tmp_path / "trn.json.gz", "".join(json.dumps(r) + "\n" for r in rows))
    write_gz(tmp_path / "tst.json.gz", json.dumps({"uid": "901", "title": "d", "content": "e"}) + "\n")
    cfg = GraphConfig(
        path=str(folder),
        text=[str(tmp_path / "trn.json.gz"), str(tmp_path / "tst.json.gz")],
        id_column="uid",
        text_columns=["title", "content"],
    )
    data = prepare_graph(cfg, "g", 0, tmp_path / "prepared")
    assert list(data.label_texts()) == ["d e", "", "", "", "a b", ""]
    assert "4 of 6 nodes are not in the file of texts." in data.warnings


@pytest.mark.parametrize(
    ("text", "edges", "settings", "said"),
    [
        ("a\nb\n", "0,1\n1,2\n", {}, r"E\.csv, row 2: node 2, but graph\.text has nodes 0 to 1"),
        ("a\nb\n", "0,1\n1,x\n", {}, r"E\.csv: cannot be read as a table .*x"),
        ("a\nb\n", "0\n", {}, r"E\.csv, line 1: 1 cell: an edge needs two"),
        ("a\nb\n", "0,0\n", {}, r"no node has an edge to learn from"),
        ("a\nb\n", "0,1\n", {"id_column": "id"}, r"texts\.txt is plain text, which has no columns"),
        ("a\nb\n", "0,1\n", {"edge_columns": ["u", "v"]}, r"no column 'u'; there are: 0, 1: set graph\.edge_columns"),
        ("a\nb\n", "", {}, r"E\.csv is empty"),
    ],
)
def test_faults_are_named(text: str, edges: str, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text(text)
    (tmp_path / "E.csv").write_text(edges)
    cfg = GraphConfig(text=str(tmp_path / "texts.txt"), edges=str(tmp_path / "E.csv"), **settings)
    with pytest.raises(DataError, match=said):
        prepare_graph(cfg, "g", 0, tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_an_edge_to_an_unknown_name_and_a_name_twice(tmp_path: Path) -> None:
    settings = _named(tmp_path)
    with open(tmp_path / "E.csv", "a") as f:
        f.write("1,zoe,nobody\n")
    with pytest.raises(DataError, match=r"E\.csv, row 9: 'nobody' is no node of graph\.text"):
        prepare_graph(GraphConfig(**settings), "g", 0, tmp_path / "prepared")
    with open(tmp_path / "texts.jsonl", "a") as f:
        f.write(json.dumps({"who": "zoe", "title": "", "body": ""}) + "\n")
    with pytest.raises(DataError, match=r"texts\.jsonl, line 7: node 'zoe' has a text already"):
        prepare_graph(GraphConfig(**settings), "g", 0, tmp_path / "prepared")


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    for cfg, said in (
        (GraphConfig(), r"give graph\.text=FILE and graph\.edges=FILE"),
        (GraphConfig(text=str(tmp_path / "none"), edges="x"), r"graph\.text=.*none is no file"),
        (GraphConfig(path=str(tmp_path)), r"edge\.csv\.gz is missing: graph\.path must be the folder"),
    ):
        with pytest.raises(DataError, match=said):
            prepare_graph(cfg, "g", 0, tmp_path / "prepared")
