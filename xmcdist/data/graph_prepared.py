"""A graph as a prepared data set: nodes are documents, and their neighbours are labels.

Beside what every prepared data set has: ``nodes.<split>.npy``, the node of each document;
``known.tst/``, of test documents: the neighbours that were trained on, and the node itself; ``node_ids`` where the
source names nodes.  ``label_texts`` are the texts of all nodes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.config.commands import GraphConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.data.errors import DataError
from xmcdist.data.graph import Cleaned, document_nodes, held_out_edges, rewired, undirected
from xmcdist.data.graph_files import GraphFiles, locate_graph, node_order, node_texts, read_edges
from xmcdist.data.prepare import make_prepared
from xmcdist.data.source import FORMAT_VERSION
from xmcdist.data.texts import TextStore, TextWriter
from xmcdist.data.written import Written
from xmcdist.sparse.csr import as_csr
from xmcdist.sparse.store import save_csr

__all__ = ["prepare_graph"]

_UNSORTED = "unsorted"


def prepare_graph(cfg: GraphConfig, name: str, seed: int, folder: Path) -> PreparedDataset:
    """Write the graph's prepared form to ``folder``, or open it if it is there for the same files and settings.

    Training documents are the nodes that have a neighbour and fewer than ``max_degree`` of
    them; every node is a label.  With ``holdout``, the documents of the test split are the
    nodes with a held-out edge and fewer than ``max_degree`` others, and their labels the
    neighbours at these edges.

    Args:
        name: of the data set, in its manifest.
        seed: of the held-out edges and of rewiring.

    Raises:
        DataError: a file is missing or faulty, or no edge is left to learn from.

    Cost: reads the files twice (once for their checksums); the edges are in memory, texts are not.
    """
    files = locate_graph(cfg)
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("path", "text", "edges")}
    about: dict[str, Any] = {"format": "graph", "settings": settings}
    if cfg.holdout or cfg.rewired:
        about["seed"] = seed
    sums = [_sha256(path) for path in files.all()]
    said = json.dumps({"version": FORMAT_VERSION, **about, "files": sums}, sort_keys=True)
    about |= {"fingerprint": hashlib.sha256(said.encode()).hexdigest(), "path": str(files.edges)}
    return make_prepared(Path(folder).absolute(), name, about, partial(_write, files, cfg, seed))


def _write(files: GraphFiles, cfg: GraphConfig, seed: int, folder: Path) -> Written:
    out = Written(num_labels=0, has_text=True)
    ids = _write_nodes(files, cfg, folder, out)
    texts = TextStore(folder, "label_texts")
    n = out.num_labels
    numbers = None
    # The edges of the Open Graph Benchmark number nodes, also where texts name them.
    if ids is not None and cfg.path is None:
        numbers = {name: i for i, name in enumerate(ids)}
    graph = undirected(*read_edges(files.edges, numbers, n, cfg.edge_columns), n)
    if cfg.rewired:
        graph = rewired(graph, seed)
    held = held_out_edges(graph, cfg.holdout, seed)
    A = graph.adjacency(~held)
    documents = document_nodes(A, cfg.max_degree)
    if not len(documents):
        raise DataError(
            f"{files.edges}: no node has an edge to learn from: look at the edges, or raise graph.max_degree"
        )
    _write_split(folder, "trn", documents, A, texts, out)
    if held.any():
        asked = graph.adjacency(held)
        few = np.diff(A.indptr) < cfg.max_degree
        found = np.flatnonzero((np.diff(asked.indptr) > 0) & few)
        if len(found):
            _write_split(folder, "tst", found, asked, texts, out)
            itself = sp.eye_array(n, dtype=np.float32, format="csr")
            save_csr(folder / "known.tst", as_csr(sp.csr_matrix(A + itself)[found], "known neighbours"))
            out.splits.append("tst")
    out.graph = _counts(graph, A, held, cfg.max_degree)
    out.warnings += _notes(out.graph, cfg.max_degree)
    return out


def _write_nodes(files: GraphFiles, cfg: GraphConfig, folder: Path, out: Written) -> list[str] | None:
    """Write ``label_texts`` in the order of the nodes; returns the nodes' ids if they have any."""
    order, count = node_order(files)
    ids: list[str] = []
    seen: dict[str, int] = {}  # place in the file, by id
    unsorted = order is not None
    name = _UNSORTED if unsorted else "label_texts"
    wanted = set(order) if order is not None else None
    with TextWriter(folder, name) as writer:
        for where, node, text in node_texts(files, cfg):
            if node is not None:
                if node in seen:
                    raise DataError(f"{where}: node {node!r} has a text already: keep one of them")
                if wanted is not None and node not in wanted:
                    continue
                seen[node] = writer.count
                ids.append(node)
            writer.append(text)
    written, empty = writer.count, writer.empty
    if order is not None:
        empty = _sort(folder, order, seen, out)
        written, ids = len(order), order
    if not written:
        raise DataError(f"{files.texts[0]}: no node has a text: look at graph.text")
    if count is not None and written != count:
        raise DataError(f"{files.texts[0]} has texts of {written} nodes, but {files.count} says {count}")
    if empty:
        out.warnings.append(f"{empty} of {written} nodes have no words.")
    out.num_labels = written
    if not ids:
        return None
    with TextWriter(folder, "node_ids") as names:
        for node in ids:
            names.append(node)
    return ids


def _sort(folder: Path, order: list[str], seen: dict[str, int], out: Written) -> int:
    """Put texts into the order of the nodes; a node without text gets an empty one.  Returns how many are empty."""
    found = TextStore(folder, _UNSORTED)
    with TextWriter(folder, "label_texts") as writer:
        for node in order:
            writer.append(found[seen[node]] if node in seen else "")
    missing = sum(node not in seen for node in order)
    if missing == len(order):
        raise DataError("no id of graph.text is that of a node: look at graph.id_column, or at the file")
    if missing:
        out.warnings.append(f"{missing} of {len(order)} nodes are not in the file of texts.")
    del found
    for path in folder.glob(f"{_UNSORTED}.*"):
        path.unlink()
    return writer.empty


def _write_split(
    folder: Path, split: str, nodes: NDArray[np.int64], A: sp.csr_matrix, texts: TextStore, out: Written
) -> None:
    np.save(folder / f"nodes.{split}.npy", nodes.astype(np.int64))
    save_csr(folder / f"Y.{split}", sp.csr_matrix(A[nodes]))
    with TextWriter(folder, f"texts.{split}") as writer:
        for node in nodes.tolist():
            writer.append(texts[node])
    out.empty[split] = writer.empty


def _counts(graph: Cleaned, A: sp.csr_matrix, held: NDArray[np.bool_], max_degree: int) -> dict[str, int]:
    degree = np.diff(A.indptr)
    return {
        "nodes": graph.nodes,
        "edges": len(graph.u),
        "held_out_edges": int(held.sum()),
        "self_loops": graph.self_loops,
        "repeated_edges": graph.repeated,
        "nodes_without_edges": int((degree == 0).sum()),
        "nodes_of_too_many_edges": int((degree >= max_degree).sum()),
    }


def _notes(counts: dict[str, int], max_degree: int) -> list[str]:
    said = []
    if counts["self_loops"]:
        said.append(f"{counts['self_loops']} edges from a node to itself were dropped.")
    if counts["nodes_without_edges"]:
        said.append(f"{counts['nodes_without_edges']} of {counts['nodes']} nodes have no edge: they are only embedded.")
    if counts["nodes_of_too_many_edges"]:
        said.append(
            f"{counts['nodes_of_too_many_edges']} nodes have {max_degree} neighbours or more (graph.max_degree): they "
            "are labels, but no training documents."
        )
    return said


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
