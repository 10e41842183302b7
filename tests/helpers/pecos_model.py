"""A linear model in the files of libpecos 1.2.8, written with scipy and json alone, and its answers by loops."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

WIDTH = 12


@dataclass
class Chain:
    """Three levels, 3 > 7 > 20; children of a node lie scattered, one node has none; documents of any length."""

    bias: float = 1.0
    post: tuple[str, str, str] = ("l3-hinge", "l3-hinge", "l3-hinge")
    topk: tuple[int, int, int] = (2, 3, 6)
    seed: int = 0
    parents: list[np.ndarray] = field(init=False)
    W: list[np.ndarray] = field(init=False)
    X: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.parents = [np.zeros(3, int), np.array([2, 0, 2, 1, 0, 2, 1]), rng.permutation(np.arange(20) % 6)]
        rows = WIDTH + (self.bias > 0)
        self.W = [
            (0.3 * rng.normal(size=(rows, p.size)) * (rng.random((rows, p.size)) < 0.6)).astype(np.float32)
            for p in self.parents
        ]
        self.X = (3 * rng.random((9, WIDTH)) * (rng.random((9, WIDTH)) < 0.5)).astype(np.float32)

    def write(self, folder: Path) -> Path:
        """The folder of ``XLinearModel.save``."""
        _json(folder / "param.json", {"__meta__": {"class_fullname": "pecos.xmc.xlinear.model###XLinearModel"}})
        about = {"model": "HierarchicalMLModel", "depth": 3, "nr_features": WIDTH, "nr_codes": 7, "nr_labels": 20}
        _json(folder / "ranker" / "param.json", about)
        above = 1
        for t, (p, W) in enumerate(zip(self.parents, self.W, strict=True)):
            level = folder / "ranker" / f"{t}.model"
            said = {"only_topk": self.topk[t], "post_processor": self.post[t]}
            _json(level / "param.json", {"model": "MLModel", "bias": self.bias, "pred_kwargs": said})
            C = sp.csc_matrix((np.ones(p.size, np.float32), (np.arange(p.size), p)), shape=(p.size, above))
            sp.save_npz(level / "C.npz", C, compressed=False)
            sp.save_npz(level / "W.npz", sp.csc_matrix(W), compressed=False)
            above = p.size
        return folder

    def scores(self, beam: int) -> list[dict[int, float]]:
        """Every document's labels below the nodes that a beam keeps, by plain loops."""
        answers = []
        for x in self.X.astype(float):
            x = np.append(x, self.bias) if self.bias > 0 else x
            kept: dict[int, float | None] = {0: None}
            for t, p in enumerate(self.parents):
                v = x @ self.W[t].astype(float)
                found = {i: _score(self.post[t], float(v[i]), kept[p[i]]) for i in range(p.size) if p[i] in kept}
                best = sorted(found, key=lambda i: (-found[i], i))
                kept = {i: found[i] for i in (best[:beam] if t < 2 else best)}
            answers.append({i: s for i, s in kept.items() if s is not None})
        return answers


def _score(post: str, v: float, parent: float | None) -> float:
    if post == "noop":
        return v
    log = -math.log1p(math.exp(-v)) if post.endswith("sigmoid") else -(max(0.0, 1 - v) ** int(post[-7]))
    if post.startswith("log-"):
        return log + (parent or 0.0)
    return math.exp(log) * (1.0 if parent is None else parent)


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
