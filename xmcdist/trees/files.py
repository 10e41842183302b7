"""Trees and label embeddings that come from files: checked, and refused with the file's name."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.sparse.csr import as_csr, unit_rows
from xmcdist.sparse.features import Features
from xmcdist.trees.errors import TreeError
from xmcdist.trees.label_tree import LabelTree

__all__ = ["read_label_features", "read_text_weight", "read_tree"]


def read_tree(path: Path | str, num_labels: int) -> LabelTree:
    """A given label tree.

    Args:
        path: a folder of a saved `LabelTree`; or of ``C_1.npz`` .. ``C_T.npz``, coarse to
            fine; or of ``C0.npz`` .. as PECOS saves a cluster chain; or of ``C.npz`` alone,
            or that file: labels by clusters ``[L, K]``.
        num_labels: L of the data set.

    Raises:
        TreeError: nothing of the kind there, a file is damaged, the matrices make no tree,
            or it is a tree of other labels.
    """
    path = Path(path)
    if (path / "tree.json").exists():
        tree = LabelTree.load(path)
    else:
        tree = LabelTree.from_chain([_load_sparse(file) for file in _chain_files(path)], f"tree.path ({path})")
    if tree.num_labels != num_labels:
        raise TreeError(f"tree.path ({path}) is a tree of {tree.num_labels} labels; the data set has {num_labels}")
    return tree


def read_label_features(path: Path | str, num_labels: int) -> Features:
    """Given label embeddings, scaled to unit rows.

    Args:
        path: ``.npz`` of a scipy sparse matrix or ``.npy`` of a dense one, ``[L, any]``.
        num_labels: L.

    Raises:
        TreeError: the file is missing, damaged or of another kind, has another number of
            rows, or holds a value that is not finite.
    """
    path = Path(path)
    what = f"tree.label_features ({path})"
    if path.suffix == ".npz":
        try:
            Z = Features(sparse=unit_rows(as_csr(_load_sparse(path), what)))
        except TreeError:
            raise
        except ValueError as error:
            raise TreeError(str(error)) from error
    elif path.suffix == ".npy":
        Z = Features(dense=_load_dense(path, what))
    else:
        raise TreeError(f"{what} must end in .npz (sparse) or .npy (dense)")
    if Z.num_rows != num_labels:
        raise TreeError(f"{what} has {Z.num_rows} rows; the data set has {num_labels} labels")
    return Z


def read_text_weight(value: float | str, num_labels: int) -> NDArray[np.float64]:
    """The share of the text in the embedding of each label, float64 ``[L]``.

    Args:
        value: one number for all, or a ``.npy`` of one a label.
        num_labels: L.

    Raises:
        TreeError: the file is missing, damaged or of another length, or a share is not in [0, 1].
    """
    if isinstance(value, str):
        what = f"tree.text_weight ({value})"
        try:
            weight = np.load(value, allow_pickle=False)
        except FileNotFoundError:
            raise TreeError(f"{what} does not exist") from None
        except (ValueError, OSError, EOFError) as error:
            raise TreeError(f"{what} is no array as numpy.save writes it ({error})") from error
        if weight.shape != (num_labels,) or weight.dtype.kind not in "buif":
            raise TreeError(
                f"{what} is {weight.dtype} of shape {list(weight.shape)}; the data set has {num_labels} labels, so it "
                f"must be real numbers of shape [{num_labels}]"
            )
    else:
        what, weight = "tree.text_weight", np.full(num_labels, value)
    shares: NDArray[np.float64] = weight.astype(np.float64)
    bad = np.flatnonzero(~((shares >= 0) & (shares <= 1)))  # NaN too
    if len(bad):
        raise TreeError(f"{what}: {shares[bad[0]]} for label {bad[0]}; a share of the text must be in [0, 1]")
    return shares


def _chain_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "C.npz").exists():
        return [path / "C.npz"]
    if (path / "config.json").exists():
        try:
            count = int(json.loads((path / "config.json").read_text())["len"])
        except (ValueError, KeyError, TypeError) as error:
            raise TreeError(f"{path / 'config.json'} is damaged: {error}") from error
        return [path / f"C{i}.npz" for i in range(count)]
    files: list[Path] = []
    while (path / f"C_{len(files) + 1}.npz").exists():
        files.append(path / f"C_{len(files) + 1}.npz")
    extra = sorted({p.name for p in path.glob("C_*.npz")} - {f.name for f in files})
    if extra:
        raise TreeError(f"tree.path ({path}) has {', '.join(extra)} but no C_{len(files) + 1}.npz")
    if not files:
        raise TreeError(f"tree.path ({path}) has no label tree: give a folder with tree.json, C_1.npz, C0.npz or C.npz")
    return files


def _load_sparse(path: Path) -> Any:
    try:
        return sp.load_npz(path)
    except FileNotFoundError:
        raise TreeError(f"{path} does not exist") from None
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise TreeError(f"{path} is no sparse matrix as scipy.sparse.save_npz writes it ({error})") from error


def _load_dense(path: Path, what: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise TreeError(f"{path} does not exist") from None
    except (ValueError, OSError, EOFError) as error:
        raise TreeError(f"{path} is no array as numpy.save writes it ({error})") from error
    if array.ndim != 2 or array.dtype.kind not in "buif":
        raise TreeError(f"{what} is {array.ndim}-D {array.dtype}; give a 2-D array of real numbers")
    values = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise TreeError(f"{what}: row {bad[0]} holds a value that is not finite")
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    unit: np.ndarray = np.divide(values, norm, out=np.zeros_like(values), where=norm > 0)
    return unit.astype(np.float32)
