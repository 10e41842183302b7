"""Reading a linear model of PECOS (libpecos 1.x): its folder in, a `LinearTree` out.

What ``XLinearModel.save`` writes, letters as there: ``param.json``; ``ranker/param.json``;
and for each level t, coarse to fine, ``ranker/<t>.model/`` with ``param.json``, ``C.npz``
(node to parent, ``[K_t, K_{t-1}]`` CSC) and ``W.npz`` (``[D, K_t]`` CSC, one row more, the
last, where there is a bias).  A PECOS model reads features as they are given; so must the
model that is made of it.

Nothing here runs code from the folder, and libpecos is not needed.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.config.checks import POST_PROCESSORS
from xmcdist.config.errors import UserError
from xmcdist.rankers.model import LinearTree
from xmcdist.rankers.weights import LevelWeights
from xmcdist.sparse.csr import as_csr
from xmcdist.trees.errors import TreeError
from xmcdist.trees.label_tree import LabelTree

__all__ = ["PecosModel", "load_matrix", "read_pecos"]

_PART = 1 << 25  # weights laid out in one go: bounds temporary memory


@dataclass(frozen=True)
class PecosModel:
    """A model of PECOS with what it says about prediction.

    Attributes:
        rankers: tree, weights and post-processors.
        beam: nodes kept a level; where PECOS's differ by level, the largest.
        topk: labels kept a document.
        labels: texts of the labels, where the folder has them.
        notes: what a person should know of the conversion, a sentence each.
    """

    rankers: LinearTree
    beam: int
    topk: int
    labels: list[str] | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Level:
    """One ``<t>.model`` folder, read and checked."""

    folder: Path
    C: sp.csr_matrix  # [K_t, K_{t-1}]
    W: sp.csr_matrix  # [K_t, D (+ 1)]
    bias: float
    post_processor: str
    topk: int


def read_pecos(folder: Path | str) -> PecosModel:
    """Read an XR-Linear model, or the one of a Text2Text model.

    Args:
        folder: of ``XLinearModel.save``, of its ``ranker``, or of ``Text2Text.save``.

    Raises:
        UserError: it is another kind of model, or a file is missing, damaged or does not
            fit the others; the message names it.

    Cost: the model twice in memory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"source={folder} is no folder: give the folder of a PECOS XR-Linear model")
    notes: list[str] = []
    labels = None
    if (folder / "xlinear_ensemble").is_dir():
        labels = _output_items(folder / "output_items.json")
        folder = _only_member(folder)
        notes.append("the Text2Text vectorizer is not converted: features must be given, from PECOS's own preprocessor")
    ranker = _ranker_folder(folder)
    about = _read_json(ranker / "param.json")
    depth, width = _whole(about, "depth", ranker), _whole(about, "nr_features", ranker)
    levels = [_read_level(ranker / f"{t}.model", width) for t in range(depth)]
    tree = _tree(levels)
    if labels is not None and len(labels) != tree.num_labels:
        raise UserError(f"{folder.parents[1] / 'output_items.json'}: {len(labels)} items for {tree.num_labels} labels")
    inner = _inner_post_processor(levels)
    beams = sorted({level.topk for level in levels[:-1]}) or [1]
    if len(beams) > 1:
        notes.append(f"beam sizes differ by level ({', '.join(map(str, beams))}): the largest is kept on every level")
    rankers = LinearTree(
        tree=tree,
        levels=[_weights(level, tree, levels, t, width) for t, level in enumerate(levels, start=1)],
        num_sparse=width,
        num_dense=0,
        post_processor=inner,
        last_post_processor=levels[-1].post_processor,
        bias=max(levels[-1].bias, 0.0),
    )
    return PecosModel(rankers, beams[-1], levels[-1].topk, labels, notes)


def _ranker_folder(folder: Path) -> Path:
    """The folder of the chain of levels; other kinds of PECOS models are refused by name."""
    about = _read_json(folder / "param.json")
    name = str(about.get("model") or str(_meta(about)).rpartition("###")[2])
    if name in ("XTransformer", "TransformerMatcher"):
        raise UserError(
            f"{folder} is a PECOS {name}: its transformer cannot be converted, train it here with encoder=hf "
            f"encoder.name=...; its linear rankers alone are in {folder / 'concat_model'} "
            "and read TF-IDF columns followed by the embedding's"
        )
    if name == "MLModel":
        raise UserError(f"{folder} is one level of a PECOS model: give the folder of the whole, with ranker/ in it")
    ranker = folder if name == "HierarchicalMLModel" else folder / "ranker"
    if name not in ("XLinearModel", "HierarchicalMLModel"):
        raise UserError(f"{folder / 'param.json'} says {name or 'nothing of its model'}: only XLinearModel can be read")
    if _read_json(ranker / "param.json").get("is_mmap"):
        raise UserError(
            f"{ranker} was compiled for memory mapping (compile_mmap_model): give the folder that it was compiled from"
        )
    return ranker


def _only_member(folder: Path) -> Path:
    members = sorted(p.parent for p in (folder / "xlinear_ensemble").glob("*/param.json"))
    if not members:
        raise UserError(f"{folder / 'xlinear_ensemble'} holds no model")
    if len(members) > 1:
        raise UserError(
            f"{folder} is an ensemble of {len(members)} models: import {members[0]} and the others one by one with "
            f"the labels of {folder / 'output_items.json'}, and predict with model=[...] ensemble=average"
        )
    return members[0]


def _read_level(folder: Path, width: int) -> _Level:
    about = _read_json(folder / "param.json")
    W, C = load_matrix(folder / "W.npz", transposed=True), load_matrix(folder / "C.npz")
    try:
        bias = float(about["bias"])
        said = about["pred_kwargs"]
        post, topk = str(said["post_processor"]), int(said["only_topk"] or C.shape[0])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'param.json'} is damaged: {error!r}") from error
    if post not in POST_PROCESSORS:
        raise UserError(f"{folder / 'param.json'}: post_processor {post!r} is none of {', '.join(POST_PROCESSORS)}")
    rows = width + (bias > 0)
    if W.shape != (C.shape[0], rows):
        raise UserError(
            f"{folder / 'W.npz'} is {W.shape[1]} x {W.shape[0]}, must be {rows} x {C.shape[0]}: {width} features"
            f"{' and the bias' if bias > 0 else ''} by the nodes of C.npz"
        )
    return _Level(folder, C, W, bias, post, topk)


def _tree(levels: list[_Level]) -> LabelTree:
    first = levels[0]
    if first.C.shape[1] != 1:
        raise UserError(
            f"{first.folder / 'C.npz'} hangs below {first.C.shape[1]} clusters and not below one root: "
            "this is the ranker half of a model (mode='ranker'); give a full model"
        )
    above = 1
    for level in levels:
        place, parents = level.folder / "C.npz", np.diff(level.C.indptr)
        if level.C.shape[1] != above:
            raise UserError(f"{place} has {level.C.shape[1]} parents; the level above has {above} nodes")
        if np.any(parents != 1):
            at = int(np.argmax(parents != 1))
            why = "; was the model pruned by set_output_constraint?" if parents[at] == 0 else ", and a tree gives one"
            raise UserError(f"{place}: row {at} has {parents[at]} parents{why}")
        above = level.C.shape[0]
    try:
        return LabelTree.from_chain([level.C for level in levels], str(first.folder.parent))
    except TreeError as error:
        raise UserError(str(error)) from error


def _weights(level: _Level, tree: LabelTree, levels: list[_Level], t: int, width: int) -> LevelWeights:
    """The weights of level t in tree order, laid out in parts of bounded size."""
    # The slots of a tree that ends at this level hold its nodes as PECOS numbers them.
    order = LabelTree.from_chain([above.C for above in levels[:t]]).labels
    by_node = sp.csr_matrix(level.W[order])
    bias = np.zeros(order.size, np.float32)
    if level.bias > 0:
        bias = by_node[:, width].toarray().ravel() * np.float32(level.bias)
        by_node = sp.csr_matrix(by_node[:, :width])
    child_ptr = tree.child_ptr[t - 1]
    ranges = [
        LevelWeights.from_rows(by_node[a:b], None, bias[a:b], child_ptr, a)
        for a, b in _cluster_ranges(by_node.indptr, child_ptr)
    ]
    return LevelWeights.concat(ranges)


def _cluster_ranges(indptr: NDArray[Any], child_ptr: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Node ranges of whole clusters with about `_PART` weights each."""
    stored = indptr[child_ptr]
    cuts = np.searchsorted(stored, np.arange(_PART, max(int(stored[-1]), _PART), _PART))
    edges = np.unique(np.concatenate([[0], child_ptr[cuts], [child_ptr[-1]]])).astype(int).tolist()
    return list(pairwise(edges))


def _inner_post_processor(levels: list[_Level]) -> str:
    names = sorted({level.post_processor for level in levels[:-1]})
    if len(names) > 1:
        raise UserError(
            f"{levels[0].folder.parent}: inner levels have different post-processors ({', '.join(names)}); "
            "here all but the last level share one"
        )
    return names[0] if names else levels[-1].post_processor


def load_matrix(path: Path, *, transposed: bool = False) -> sp.csr_matrix:
    """A matrix that scipy saved, canonical CSR float32; ``transposed`` costs nothing for one saved as CSC.

    Raises:
        UserError: the file is missing or damaged, or holds a value that is not finite.
    """
    try:
        matrix = sp.load_npz(path)
        return as_csr(matrix.T, f"{path}, transposed") if transposed else as_csr(matrix, str(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no sparse matrix as scipy.sparse.save_npz writes it ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: {path.parent} is no PECOS model, or a file of it is missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: no JSON object")
    return value


def _meta(about: dict[str, Any]) -> object:
    meta = about.get("__meta__")
    return meta.get("class_fullname", "") if isinstance(meta, dict) else ""


def _whole(about: dict[str, Any], name: str, ranker: Path) -> int:
    value = about.get(name)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{ranker / 'param.json'}: {name} is {value!r}, must be a positive whole number")
    return value


def _output_items(path: Path) -> list[str]:
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UserError(f"{path} is damaged: no list of texts")
    return items
