"""``giant classify``: how well classes of nodes are told from their embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xmcdist.checkpoint.atomic import write_json
from xmcdist.config.commands import GiantClassifyConfig
from xmcdist.config.errors import ConfigError, UserError
from xmcdist.data.graph import undirected
from xmcdist.data.graph_files import read_column, read_edges
from xmcdist.data.lines import byte_lines, decode
from xmcdist.evaluation.node_classification import MODELS, Classifier, NodeSplit, classify_nodes, drawn_split

__all__ = ["classify"]

_PARTS = ("train", "valid", "test")
_ENDS = (".csv.gz", ".csv", ".txt", ".npy")


def classify(cfg: GiantClassifyConfig) -> dict[str, Any]:
    """Train and measure a classifier with every seed; prints accuracies, writes ``cfg.output`` when asked for.

    Returns:
        ``accuracy``: of train, valid and test, percent, each with ``mean``, ``std`` (with one
        seed 0) and ``all``; ``nodes``, ``classes`` and ``split`` sizes.

    Raises:
        UserError: a setting, a file or the split does not fit.
    """
    _check(cfg)
    X = _vectors(Path(cfg.embeddings).expanduser())
    names, y = _classes(cfg, len(X))
    given = _given_split(cfg, len(X))
    edges = _edges(cfg, len(X)) if cfg.model == "sage" else None
    how = Classifier(
        cfg.model,
        cfg.hidden,
        cfg.layers,
        cfg.dropout,
        cfg.lr,
        cfg.weight_decay,
        cfg.epochs,
        cfg.patience,
        cfg.batch,
    )
    device = _device()
    runs = []
    for seed in cfg.seeds:
        split = given or drawn_split(y, cfg.train_share, cfg.valid_share, seed)
        runs.append(classify_nodes(X, y, split, how, seed, edges, device))
        shown = ", ".join(f"{part} {runs[-1][part]:.2f}" for part in _PARTS)
        print(f"seed {seed}: {shown} (epoch {runs[-1]['epoch']:.0f})", flush=True)
    found: dict[str, Any] = {
        "accuracy": {part: _summary([r[part] for r in runs]) for part in _PARTS},
        "model": cfg.model,
        "seeds": cfg.seeds,
        "embeddings": cfg.embeddings,
        "nodes": len(X),
        "width": X.shape[1],
        "classes": len(names),
        "split": {part: len(nodes) for part, nodes in zip(_PARTS, (split.train, split.valid, split.test), strict=True)},
    }
    test = found["accuracy"]["test"]
    print(f"{cfg.model} on {len(X)} nodes, {len(names)} classes: test accuracy {test['mean']:.2f} +- {test['std']:.2f}")
    if cfg.output is not None:
        write_json(Path(cfg.output), found)
    return found


def _check(cfg: GiantClassifyConfig) -> None:
    faults = [
        f"{name}={getattr(cfg, name)} must be at least 1"
        for name in ("hidden", "layers", "epochs", "patience", "batch")
        if getattr(cfg, name) < 1
    ]
    if cfg.model not in MODELS:
        faults.append(f"model={cfg.model} is none of {', '.join(MODELS)}")
    if not 0 <= cfg.dropout < 1:
        faults.append(f"dropout={cfg.dropout} must be in [0, 1)")
    if cfg.lr <= 0:
        faults.append(f"lr={cfg.lr} must be positive")
    if not (cfg.train_share > 0 and cfg.valid_share > 0 and cfg.train_share + cfg.valid_share < 1):
        faults.append(f"train_share={cfg.train_share} and valid_share={cfg.valid_share} must leave nodes for the test")
    if not cfg.seeds:
        faults.append("seeds is empty: give one at least")
    if cfg.path is None and cfg.classes is None:
        faults.append("give classes=FILE, or path=FOLDER of the Open Graph Benchmark")
    if cfg.model == "sage" and cfg.path is None and cfg.edges is None:
        faults.append("model=sage needs edges=FILE, or path=FOLDER of the Open Graph Benchmark")
    if faults:
        raise ConfigError("\n".join(faults))


def _vectors(place: Path) -> NDArray[np.float32]:
    path = place / "embeddings.npy" if place.is_dir() else place
    try:
        X = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"embeddings={place}: {path} cannot be read ({error}): give RUN/embeddings or a .npy") from None
    if not isinstance(X, np.ndarray) or X.ndim != 2 or X.dtype.kind != "f":
        raise UserError(f"{path} holds no matrix of numbers [nodes, width]: save one with numpy.save")
    bad = ~np.isfinite(X).all(axis=1)
    if bad.any():
        raise UserError(f"{path}: row {int(np.flatnonzero(bad)[0])} has a number that is not finite")
    return X.astype(np.float32)


def _classes(cfg: GiantClassifyConfig, nodes: int) -> tuple[list[str], NDArray[np.int64]]:
    """Names in sorted order (numbers by value), and the class of each node, -1: none."""
    path = Path(cfg.classes).expanduser() if cfg.classes else Path(str(cfg.path)) / "raw" / "node-label.csv.gz"
    if not path.is_file():
        raise UserError(f"{path} is no file: it shall hold a class for each node")
    if path.suffix == ".npy":
        given = [str(x) for x in np.load(path, allow_pickle=False).reshape(-1).tolist()]
    else:
        given = [decode(line, path, number).strip() for number, line in byte_lines(path)]
    if len(given) != nodes:
        raise UserError(
            f"{path} has {len(given)} lines but there are {nodes} embeddings: a class a node, in their order"
        )
    given = ["" if name in ("nan", "-1") else name for name in given]
    names = sorted({name for name in given if name}, key=lambda s: (not s.isdigit(), int(s) if s.isdigit() else 0, s))
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} class: there must be two at least")
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number.get(name, -1) for name in given], np.int64)


def _given_split(cfg: GiantClassifyConfig, nodes: int) -> NodeSplit | None:
    if cfg.split is not None:
        folder = Path(cfg.split).expanduser()
    elif cfg.path is not None:
        found = sorted(p for p in (Path(cfg.path) / "split").glob("*") if p.is_dir())
        if len(found) != 1:
            raise UserError(f"{cfg.path}/split has {len(found)} splits: give split=FOLDER with train, valid and test")
        folder = found[0]
    else:
        return None
    return NodeSplit(*(_part(folder, part, nodes) for part in _PARTS))


def _part(folder: Path, part: str, nodes: int) -> NDArray[np.int64]:
    for end in _ENDS:
        path = folder / f"{part}{end}"
        if path.is_file():
            ids = np.load(path, allow_pickle=False).reshape(-1) if end == ".npy" else read_column(path, 0).to_numpy()
            if len(ids) and not (ids.min() >= 0 and ids.max() < nodes):
                raise UserError(
                    f"{path}: nodes are numbered from 0 to {nodes - 1}, and it names {ids.min()} to {ids.max()}"
                )
            return np.asarray(ids, np.int64)
    raise UserError(f"{folder} has no {part}{_ENDS[0]} (or {', '.join(_ENDS[1:])}): the numbers of its nodes")


def _edges(cfg: GiantClassifyConfig, nodes: int) -> NDArray[np.int64]:
    path = Path(cfg.edges).expanduser() if cfg.edges else Path(str(cfg.path)) / "raw" / "edge.csv.gz"
    if not path.is_file():
        raise UserError(f"{path} is no file: it shall hold the edges")
    graph = undirected(*read_edges(path, None, nodes, None), nodes)
    return np.stack([np.concatenate([graph.u, graph.v]), np.concatenate([graph.v, graph.u])])


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _summary(values: list[float]) -> dict[str, Any]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": spread, "all": values}
