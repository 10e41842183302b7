"""Several models with the same labels, answering as one.

Each model brings its best k labels of a document; a label that a model does not bring
counts 0 from it.  The score of a label in the ensemble of m models:

===============  ==============================================================================
``average``      mean of the models' scores
``rank``         mean of k - position, positions from 0, best first
``sigmoid``      mean of 1 / (1 + exp(-score))
``softmax``      mean of the softmax over the k scores that a model brings
``round_robin``  the first model's best, the second's best, ..., the first's second, ...
===============  ==============================================================================

Source: ``CsrEnsembler`` of amzn/pecos, whose numbers these are, with two differences that
do not reach its usual results: where it counts from the longest row of all its matrices, k
is what was asked for, so that a document's answer does not depend on the others; and a
label whose scores add up to exactly 0 stays.
"""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.checkpoint.checksums import folder_damage
from xmcdist.config.checks import ENSEMBLES
from xmcdist.config.errors import UserError
from xmcdist.data.dataset import TextStore
from xmcdist.inference.ensemble_folder import EnsembleFolder
from xmcdist.inference.predictor import Prediction, Predictor, answers

if TYPE_CHECKING:
    from xmcdist.encoders.embed import TextEmbedder

__all__ = ["METHODS", "EncoderOnDisk", "Ensemble", "combine", "open_model"]

METHODS = ENSEMBLES
_BLOCK = 4096  # documents that all models answer before the next: bounds their matrices

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def combine(predictions: Sequence[sp.csr_matrix], method: str, k: int, *, depth: int | None = None) -> sp.csr_matrix:
    """The best labels of several models' best labels.

    Args:
        predictions: of each model ``[N, L]``; stored entries, 0 included, are what it brings.
        method: one of `METHODS`.
        k: most labels a document of the result.
        depth: what positions count down from (``rank``, ``round_robin``); at least the
            longest row.  Default: the longest row.

    Returns:
        ``[N, L]`` float32 CSR, ids ascending in a row; ties go to the smaller id.

    Raises:
        ValueError: shapes differ, there is no model, or the method is unknown.

    Cost: a sort of all entries; computed in float64.
    """
    if method not in METHODS:
        raise ValueError(f"ensemble {method!r} is none of {', '.join(METHODS)}")
    if not predictions or any(P.shape != predictions[0].shape for P in predictions):
        raise ValueError(f"an ensemble needs matrices of one shape, not {[P.shape for P in predictions]}")
    rows, columns = predictions[0].shape
    longest = max(int(np.diff(P.indptr).max(initial=0)) for P in predictions)
    depth = longest if depth is None else max(depth, longest)
    keys, values = [], []
    for i, P in enumerate(predictions):
        row = np.repeat(np.arange(rows, dtype=np.int64), np.diff(P.indptr))
        keys.append(row * columns + P.indices)
        values.append(_vote(P, row, method, depth, i, len(predictions)))
    key, value = np.concatenate(keys), np.concatenate(values)
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    if first.size:
        value = (np.maximum if method == "round_robin" else np.add).reduceat(value, first) / len(predictions)
    return _best(key[first], value.astype(np.float32), rows, columns, k)


def _vote(P: sp.csr_matrix, row: I64, method: str, depth: int, model: int, models: int) -> F64:
    """What each entry of one model's matrix counts."""
    s = P.data.astype(np.float64)
    if method == "average":
        return s
    if method == "sigmoid":
        return np.exp(-np.logaddexp(0.0, -s))
    if method == "softmax":
        filled = np.flatnonzero(np.diff(P.indptr))
        start = P.indptr[filled]
        if not start.size:
            return s
        length = np.diff(P.indptr)[filled]
        e = np.exp(s - np.repeat(np.maximum.reduceat(s, start), length))
        return np.asarray(e / np.repeat(np.add.reduceat(e, start), length))
    relevance = depth - _positions(P, row).astype(np.float64)
    return relevance + (models - model) / (models + 1.0) if method == "round_robin" else relevance


def _positions(P: sp.csr_matrix, row: I64) -> I64:
    """Place of each entry in its row, by score, ties by id; the best is 0."""
    order = np.lexsort((P.indices, -P.data, row))
    out = np.empty(row.size, np.int64)
    out[order] = np.arange(row.size) - P.indptr[row]
    return out


def _best(key: I64, value: NDArray[np.float32], rows: int, columns: int, k: int) -> sp.csr_matrix:
    """The k best entries of each row, ids ascending."""
    row = key // max(columns, 1)
    lengths = np.bincount(row, minlength=rows)
    start = np.concatenate([[0], np.cumsum(lengths)])
    order = np.lexsort((key, -value, row))
    kept = np.sort(order[np.arange(order.size) - start[row] < k])
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row[kept], minlength=rows))])
    return sp.csr_matrix((value[kept], (key[kept] - row[kept] * columns).astype(np.int32), indptr), (rows, columns))


class Ensemble:
    """Several `Predictor`s behind the interface of one; it holds no probabilities."""

    def __init__(self, members: Sequence[Predictor], method: str = "average") -> None:
        if method not in METHODS:
            raise UserError(f"ensemble={method} is none of {', '.join(METHODS)}")
        if not members:
            raise UserError("an ensemble needs at least one model")
        self.members, self.method = list(members), method

    @classmethod
    def load(
        cls,
        paths: Sequence[str | Path],
        method: str = "average",
        *,
        trust_remote_code: bool = False,
        part: tuple[int, int] = (0, 1),
        verify: bool = False,
        one_encoder: bool = False,
    ) -> Ensemble:
        """Open model folders, memory-mapped; see `Predictor.load`.

        Args:
            paths: a folder a member.
            method: one of `METHODS`.
            trust_remote_code: as of `Predictor.load`, with ``part`` and ``verify``.
            part: see there.
            verify: see there.
            one_encoder: never hold more than one of the members' encoders in memory: each is
                read anew for every block of documents.  The answers are the same.

        Raises:
            UserError: a folder is no model, or two of them do not have the same labels in the
                same order; the message names the folders and the first label that differs.
        """
        members = []
        for path in paths:
            if EnsembleFolder.read(path) is not None:
                raise UserError(f"{path} is an ensemble itself: name the folders of its members")
            member = Predictor.load(path, trust_remote_code=trust_remote_code, part=part, verify=verify)
            if one_encoder and len(paths) > 1 and member.embedder is not None:
                # it was read, so what is wrong with it is told before the first document
                member.embedder = cast("TextEmbedder", EncoderOnDisk(Path(path) / "encoder", trust_remote_code))
            members.append(member)
        for path, member in zip(paths[1:], members[1:], strict=True):
            _check_labels(Path(paths[0]), members[0], Path(path), member)
        return cls(members, method)

    @property
    def num_labels(self) -> int:
        return self.members[0].num_labels

    @property
    def label_texts(self) -> TextStore:
        return self.members[0].label_texts

    @property
    def names_labels(self) -> bool:
        return self.members[0].names_labels

    @property
    def label_frequency(self) -> NDArray[np.int64] | None:
        """Of the first model that knows it."""
        return next((m.label_frequency for m in self.members if m.label_frequency is not None), None)

    @property
    def num_train(self) -> int | None:
        """Of the model whose label frequencies are taken."""
        return next((m.num_train for m in self.members if m.label_frequency is not None), None)

    @property
    def wants_features(self) -> bool:
        return any(m.wants_features for m in self.members)

    @property
    def wants_text(self) -> bool:
        return any(m.wants_text for m in self.members)

    def predict(
        self,
        texts: Sequence[str] | None,
        k: int = 5,
        *,
        features: sp.csr_matrix | None = None,
        beam: int | None = None,
    ) -> list[list[Prediction]]:
        """As `Predictor.predict`, with the ensemble's scores."""
        return answers(self.scores(texts, features=features, k=k, beam=beam), k, self.label_texts)

    def scores(
        self,
        texts: Sequence[str] | None,
        *,
        features: sp.csr_matrix | None = None,
        k: int = 10,
        beam: int | None = None,
    ) -> sp.csr_matrix:
        """The ensemble's scores of the best ``k`` labels as CSR ``[n, L]``.

        All models answer a block of documents before the next is begun; equal TF-IDF
        vocabularies are asked once.  With the labels shared out over ranks the caller's
        documents are one block, since every block is collective.
        """
        n = len(texts) if texts is not None else 0 if features is None else int(features.shape[0])
        size = max(n, 1) if self.members[0].is_part else _BLOCK
        blocks = []
        for start in range(0, max(n, 1), size):
            own_texts = None if texts is None else texts[start : start + size]
            own = None if features is None else features[start : start + size]
            blocks.append(self._block(own_texts, own, k, beam))
        return blocks[0] if len(blocks) == 1 else sp.csr_matrix(sp.vstack(blocks, format="csr"))

    def _block(
        self, texts: Sequence[str] | None, features: sp.csr_matrix | None, k: int, beam: int | None
    ) -> sp.csr_matrix:
        seen: dict[str, sp.csr_matrix] = {}
        found = []
        on_disk = [m.embedder for m in self.members if isinstance(m.embedder, EncoderOnDisk)]
        for member in self.members:
            found.append(member.scores(texts, features=features, k=k, beam=beam, seen=seen))
            if isinstance(member.embedder, EncoderOnDisk) and len(on_disk) > 1:
                member.embedder.let_go()
        return combine(found, self.method, k, depth=min(k, self.num_labels))


class EncoderOnDisk:
    """An encoder that is in memory only from the first text until it is let go."""

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        self._folder, self._trust = folder, trust_remote_code
        self._open: TextEmbedder | None = None

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """As `xmcdist.encoders.embed.TextEmbedder`."""
        if self._open is None:
            from xmcdist.encoders.embed import TextEmbedder

            self._open = TextEmbedder.load(self._folder, trust_remote_code=self._trust)
        return self._open(texts)

    def let_go(self) -> None:
        """Give its memory back."""
        self._open = None


def open_model(
    model: str | Path | Sequence[str],
    ensemble: str | None = None,
    *,
    trust_remote_code: bool = False,
    part: tuple[int, int] = (0, 1),
    verify: bool = False,
    one_encoder: bool = False,
) -> Predictor | Ensemble:
    """One model folder, several as an ensemble (by default ``average``), or the folder of an ensemble.

    Args:
        model: a folder, or a list of folders.
        ensemble: how several models' answers are joined; for the folder of an ensemble in
            place of its own way.
        trust_remote_code: with ``part``, ``verify`` and ``one_encoder`` as of `Ensemble.load`.
        part: see there.
        verify: see there.
        one_encoder: see there.

    Raises:
        UserError: as `Predictor.load` and `Ensemble.load`; or a method without several models.
    """
    if isinstance(model, (str, Path)):
        found = EnsembleFolder.read(model)
        if found is None:
            if ensemble is not None:
                raise UserError(f"ensemble={ensemble} needs several models: model=[FOLDER,FOLDER]")
            return Predictor.load(model, trust_remote_code=trust_remote_code, part=part, verify=verify)
        damage = folder_damage(Path(model), contents=True) if verify else None
        if damage is not None:
            raise UserError(f"{damage}: copy the model again, or start its training command again")
        paths: Sequence[str | Path] = list(found.folders.values())
        ensemble = ensemble or found.method
    elif not isinstance(model, Sequence) or not model or not all(isinstance(path, (str, Path)) for path in model):
        raise UserError(f"model={model} is neither a folder nor a list of folders, model=[FOLDER,FOLDER]")
    else:
        paths = model
    return Ensemble.load(
        paths,
        ensemble or METHODS[0],
        trust_remote_code=trust_remote_code,
        part=part,
        verify=verify,
        one_encoder=one_encoder,
    )


def _check_labels(first: Path, a: Predictor, second: Path, b: Predictor) -> None:
    if a.num_labels != b.num_labels:
        raise UserError(
            f"models of one ensemble need the same labels: {first} has {a.num_labels}, {second} has {b.num_labels}"
        )
    names = ("label_texts.bin", "label_texts.offsets.npy")
    if all(filecmp.cmp(first / name, second / name, shallow=False) for name in names):
        return
    pairs = zip_longest(a.label_texts.iterate(), b.label_texts.iterate())
    number, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise UserError(
        f"models of one ensemble need the same labels in the same order: label {number} is {one!r} in {first} "
        f"and {other!r} in {second}"
    )
