"""Edges and node texts as people have them, and the folders of the Open Graph Benchmark.

Edges: a scipy ``.npz`` adjacency, a ``.npy`` ``[2, E]``, CSV (``.csv``, ``.tsv``, ``.gz``) or Parquet.
Texts: a line a node (``.txt``), or records (jsonl, CSV, Parquet) with columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.config.commands import GraphConfig
from xmcdist.data.errors import DataError
from xmcdist.data.lines import byte_lines, decode
from xmcdist.data.matrices import read_matrix
from xmcdist.data.records import read_rows
from xmcdist.data.source import EXTENSIONS

__all__ = ["GraphFiles", "locate_graph", "node_order", "node_texts", "read_column", "read_edges"]

I64 = NDArray[np.int64]
_TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_TITLES = ("titleabs.tsv", "titleabs.tsv.gz")
_BLOCK = 1 << 24  # bytes of a table parsed at once


@dataclass(frozen=True, slots=True)
class GraphFiles:
    """Where a graph is.

    Attributes:
        texts: files of the nodes' texts, read one after the other.
        edges: the edge list.
        nodes: table of the nodes' ids by number, and
        count: the number of nodes; both of an OGB folder alone.
        titles: texts are lines of an id, a title and an abstract between tabs.
    """

    texts: tuple[Path, ...]
    edges: Path
    nodes: Path | None = None
    count: Path | None = None
    titles: bool = False

    def all(self) -> list[Path]:
        """Every file that is read."""
        return [*self.texts, self.edges, *(p for p in (self.nodes, self.count) if p is not None)]


def locate_graph(cfg: GraphConfig) -> GraphFiles:
    """Find the files that the settings name.

    Raises:
        DataError: nothing is named, a file is missing or empty, or its form is not known by its name.
    """
    given = [cfg.text] if isinstance(cfg.text, str) else list(cfg.text or [])
    texts = tuple(_there("graph.text", t) for t in given)
    if cfg.path is not None:
        files = _locate_ogb(Path(cfg.path).expanduser(), texts, cfg)
    elif not texts or not cfg.edges:
        raise DataError(
            "give graph.text=FILE and graph.edges=FILE, or graph.path=FOLDER for a folder of the Open Graph Benchmark"
        )
    else:
        files = GraphFiles(texts, _there("graph.edges", cfg.edges))
    for path in files.all():
        if not path.stat().st_size:
            raise DataError(f"{path} is empty: fill it, or name another file")
    for path in files.texts:
        if not files.titles:
            _text_format(path)
    if not files.edges.name.endswith((".npz", ".npy", *_TABLES, *EXTENSIONS["parquet"])):
        raise DataError(
            f"graph.edges={files.edges}: the form of this file is not known by its name: it must end in .npz, .npy, "
            ".csv, .tsv (.gz too) or .parquet"
        )
    return files


def _there(setting: str, name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"{setting}={name} is no file: give the place of one")
    return path


def _locate_ogb(folder: Path, texts: tuple[Path, ...], cfg: GraphConfig) -> GraphFiles:
    """``raw/edge.csv.gz``, ``raw/num-node-list.csv.gz``, ``mapping/nodeidx2*.csv.gz`` and texts."""
    if not folder.is_dir():
        raise DataError(f"graph.path={folder} is no folder")
    if cfg.edges:
        raise DataError("graph.edges has no effect with graph.path, whose raw/edge.csv.gz is read: leave one of them")
    edges, count = folder / "raw" / "edge.csv.gz", folder / "raw" / "num-node-list.csv.gz"
    for path in (edges, count):
        if not path.is_file():
            raise DataError(
                f"{path} is missing: graph.path must be the folder that the ogb package downloads, such as "
                "dataset/ogbn_arxiv; for other graphs give graph.text and graph.edges"
            )
    mapped = sorted((folder / "mapping").glob("nodeidx2*.csv.gz"))
    if texts:
        if cfg.id_column is not None and not mapped:
            raise DataError(
                f"{folder}/mapping has no nodeidx2*.csv.gz, so graph.id_column={cfg.id_column} tells nothing"
            )
        return GraphFiles(texts, edges, mapped[0] if cfg.id_column is not None else None, count)
    titles = [
        p for place in (folder, folder / "raw", folder / "mapping") for name in _TITLES if (p := place / name).is_file()
    ]
    if not titles:
        raise DataError(
            f"{folder} has no titleabs.tsv: put the file with the papers' titles and abstracts there, or give "
            "graph.text=FILE, and graph.id_column=COLUMN if it is not in the order of the nodes"
        )
    if not mapped:
        raise DataError(f"{folder}/mapping has no nodeidx2*.csv.gz, which says which paper a node is")
    return GraphFiles((titles[0],), edges, mapped[0], count, titles=True)


def _text_format(path: Path) -> str:
    for name, ends in EXTENSIONS.items():
        if path.name.endswith(ends):
            return name
    if path.name.endswith((".txt", ".txt.gz")):
        return "txt"
    raise DataError(
        f"graph.text={path}: the form of this file is not known by its name: it must end in .txt (a node a line), "
        ".jsonl, .csv (.gz too) or .parquet"
    )


def node_texts(files: GraphFiles, cfg: GraphConfig) -> Iterator[tuple[str, str | None, str]]:
    """Texts as the files have them: (where, id or None, text).

    Raises:
        DataError: a bad record, with file and line.
    """
    for path in files.texts:
        if files.titles:
            yield from _titles(path)
            continue
        form = _text_format(path)
        if form == "txt":
            if cfg.id_column is not None:
                raise DataError(f"graph.id_column={cfg.id_column}: {path} is plain text, which has no columns")
            for number, line in byte_lines(path):
                yield f"{path}, line {number}", None, decode(line, path, number)
            continue
        columns = {f"graph.text_columns[{i}]": name for i, name in enumerate(cfg.text_columns)}
        if cfg.id_column is not None:
            columns["graph.id_column"] = cfg.id_column
        for where, row in read_rows(path, form, columns):
            yield where, _id(row, where, cfg), _text(row, where, cfg)


def _text(row: dict[str, Any], where: str, cfg: GraphConfig) -> str:
    parts = []
    for name in cfg.text_columns:
        value = row[name]
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            value = " ".join(value)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: column {name!r} of graph.text_columns holds {value!r}, not a string")
        if value:
            parts.append(value)
    return " ".join(parts)


def _id(row: dict[str, Any], where: str, cfg: GraphConfig) -> str | None:
    if cfg.id_column is None:
        return None
    value = row[cfg.id_column]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: graph.id_column={cfg.id_column} holds {value!r}: an id is a string or an integer")
    return str(value)


def _titles(path: Path) -> Iterator[tuple[str, str | None, str]]:
    """Papers of titleabs.tsv: id, title, abstract.

    As published the file still has the header of a tar archive in front of its first line, and
    zeros behind its last; and some lines are no papers.
    """
    for number, line in byte_lines(path):
        cells = decode(line.rsplit(b"\0", 1)[-1], path, number).split("\t")
        if len(cells) >= 3 and cells[0].strip().isdigit():
            yield f"{path}, line {number}", cells[0].strip(), f"{cells[1].strip()} {' '.join(cells[2:]).strip()}"


def node_order(files: GraphFiles) -> tuple[list[str] | None, int | None]:
    """Ids of the nodes in order, and how many nodes there are; None where the texts alone say so.

    Raises:
        DataError: the tables do not fit each other.
    """
    count = None if files.count is None else int(read_column(files.count, 0)[0])
    if files.nodes is None:
        return None, count
    ids = [str(x) for x in read_column(files.nodes, 1, text=True)[1:]]  # below a header
    if count is not None and len(ids) != count:
        raise DataError(f"{files.nodes} names {len(ids)} nodes, but {files.count} says {count}")
    return ids, count


def read_edges(path: Path, numbers: dict[str, int] | None, nodes: int, columns: list[str] | None) -> tuple[I64, I64]:
    """Directed edges as given: source and target, int64 ``[E]``.

    Args:
        path: ``.npz`` (values do not matter), ``.npy``, CSV or Parquet.
        numbers: of nodes by id; None: edges number nodes from 0.
        nodes: n.
        columns: of CSV and Parquet: source and target; None: the first two.  A CSV's first line
            is a header if columns are named, or if neither of its first two cells is a node.

    Raises:
        DataError: a node that is not there, with its place; a file that is damaged or of another shape.

    Cost: O(E) memory.
    """
    if path.suffix == ".npz":
        A = read_matrix(path).matrix
        if A.shape != (nodes, nodes):
            raise DataError(
                f"{path} is of shape {A.shape}, but graph.text has {nodes} nodes: both must number them alike"
            )
        coo = A.tocoo()
        return coo.row.astype(np.int64), coo.col.astype(np.int64)
    if path.suffix == ".npy":
        return _from_array(path, nodes)
    if path.name.endswith(EXTENSIONS["parquet"]):
        ends, first = _parquet_ends(path, columns), 1
    else:
        ends, first = _table_ends(path, columns, numbers)
    source, target = (_numbered(x, numbers, nodes, path, first) for x in ends)
    return source, target


def _from_array(path: Path, nodes: int) -> tuple[I64, I64]:
    try:
        E = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a whole .npy file ({error}): write it again with numpy.save") from error
    if E.ndim != 2 or E.shape[0] != 2 or E.dtype.kind not in "iu":
        raise DataError(f"{path}: holds {E.dtype} of shape {list(E.shape)}: save the edges as integers [2, E]")
    ends = E.astype(np.int64)
    _refuse_unknown(ends[0], nodes, path, 0, "column")
    _refuse_unknown(ends[1], nodes, path, 0, "column")
    return ends[0], ends[1]


def _parquet_ends(path: Path, columns: list[str] | None) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        chosen = _choose(names, columns, path)
        table = pq.read_table(path, columns=chosen)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged or no Parquet file ({error}): copy or write it again") from error
    return [table[name] for name in chosen]


def _choose(names: list[str], columns: list[str] | None, path: Path) -> list[str]:
    if columns is None:
        if len(names) < 2:
            raise DataError(f"{path} has {len(names)} columns: an edge needs two")
        return names[:2]
    for name in columns:
        if name not in names:
            raise DataError(f"{path}: no column {name!r}; there are: {', '.join(names[:20])}: set graph.edge_columns")
    return columns


def _table_ends(path: Path, columns: list[str] | None, numbers: dict[str, int] | None) -> tuple[list[Any], int]:
    """The two columns of a CSV, and the number of its first line of data."""
    tab = "\t" if ".tsv" in path.name else ","
    header = [cell.strip().strip('"') for cell in _first_line(path).split(tab)]
    if len(header) < 2:
        mark = "a comma" if tab == "," else "a tab"
        raise DataError(f"{path}, line 1: {len(header)} cell: an edge needs two, with {mark} between them")

    def is_node(cell: str) -> bool:
        return cell in numbers if numbers is not None else cell.lstrip("-").isdigit()

    if columns is None:
        places, skip = [0, 1], not any(is_node(cell) for cell in header[:2])
    else:
        places, skip = [header.index(name) for name in _choose(header, columns, path)], True
    found = [read_column(path, place, text=numbers is not None, skip=int(skip), tab=tab) for place in places]
    return found, 1 + int(skip)


def _first_line(path: Path) -> str:
    for number, line in byte_lines(path):
        return decode(line, path, number)
    raise DataError(f"{path} is empty: it holds no edges")


def read_column(path: Path, place: int, *, text: bool = False, skip: int = 0, tab: str = ",") -> Any:
    """One column of a table without names, as pyarrow's chunked array (int64 or string).

    Raises:
        DataError: not a table, or a value that is no integer; pyarrow names the row.
    """
    import pyarrow as pa
    from pyarrow import csv

    options = csv.ReadOptions(autogenerate_column_names=True, skip_rows=skip, block_size=_BLOCK)
    kind = {f"f{place}": pa.string() if text else pa.int64()}
    convert = csv.ConvertOptions(column_types=kind, include_columns=list(kind))
    try:
        return csv.read_csv(path, options, csv.ParseOptions(delimiter=tab), convert)[0]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table ({error})") from error


def _numbered(column: Any, numbers: dict[str, int] | None, nodes: int, path: Path, first: int) -> I64:
    """A column of nodes by id or number, as numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.null_count:
        at = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{path}, row {at + first}: an edge without an end")
    if numbers is None:
        if not pa.types.is_integer(column.type):
            raise DataError(
                f"{path}: edges are of type {column.type}, not integers; if they name nodes set graph.id_column"
            )
        found = column.to_numpy().astype(np.int64)
        _refuse_unknown(found, nodes, path, first, "row")
        return np.asarray(found, np.int64)
    coded = pc.cast(column, pa.string()).combine_chunks().dictionary_encode()
    known = np.array([numbers.get(name, -1) for name in coded.dictionary.to_pylist()], np.int64)
    found = known[coded.indices.to_numpy()]
    if (found < 0).any():
        at = int(np.flatnonzero(found < 0)[0])
        raise DataError(
            f"{path}, row {at + first}: {column[at].as_py()!r} is no node of graph.text: add it, or drop the edge"
        )
    return np.asarray(found, np.int64)


def _refuse_unknown(ends: I64, nodes: int, path: Path, first: int, unit: str) -> None:
    bad = (ends < 0) | (ends >= nodes)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{path}, {unit} {at + first}: node {ends[at]}, but graph.text has nodes 0 to {nodes - 1}: "
            "number nodes by their line, from 0, or set graph.id_column"
        )
