"""A model that answers parts of several requests at once, each as if it had been asked alone."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.config.errors import UserError
from xmcdist.inference.ensemble import Ensemble, open_model
from xmcdist.inference.predictor import Prediction, Predictor, answers
from xmcdist.serving.folders import folders_of, name_of

__all__ = ["DEFAULT_K", "Ask", "Part", "ServedModel"]

DEFAULT_K = 5
_WARM_DOCS = 20  # as many as take the other of the search's two ways through its features


class Ask(NamedTuple):
    """How a request wants its documents answered."""

    k: int
    beam: int | None = None
    labels: tuple[int, ...] | None = None


class Part(NamedTuple):
    """Some documents of one request."""

    texts: Sequence[str]
    ask: Ask


class _OneByOne:
    """An encoder that reads every document alone.

    A matrix product rounds otherwise when it has other rows beside it, so a document's
    vector would depend on who else asked at that moment.
    """

    def __init__(self, embedder: Any) -> None:
        self._embedder = embedder

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        return np.concatenate([self._embedder([text]) for text in texts])


class ServedModel:
    """An open model, warm.  All calls come from one thread, the one that opened it.

    Args:
        model: a folder, or a list of folders that answer as an ensemble.
        ensemble: as of `open_model`.
        threads: for the compiled loops and torch.
        exact: let an encoder read documents one at a time, so that answers have the bits of
            a document asked alone; else its rounding depends on the batch.

    Raises:
        UserError: no model, a damaged one, or one that wants features, which no request has.
    """

    def __init__(self, model: Any, ensemble: str | None, threads: int | None, exact: bool) -> None:
        folders = folders_of(model)
        self.predictor: Predictor | Ensemble = open_model(folders[0] if len(folders) == 1 else folders, ensemble)
        if self.predictor.wants_features:
            raise UserError(
                f"model={model} was trained on given features, and a request has texts alone: serve a model "
                "of texts, or predict with features=X.npz"
            )
        self.members = self.predictor.members if isinstance(self.predictor, Ensemble) else [self.predictor]
        self._model, self._ensemble = model, ensemble
        _use_threads(threads)
        if exact:
            for member in self.members:
                if member.embedder is not None:
                    member.embedder = _OneByOne(member.embedder)  # type: ignore[assignment]
        self._warm()

    @property
    def scores_labels(self) -> bool:
        """Whether it scores given labels; an ensemble does not."""
        return isinstance(self.predictor, Predictor)

    def answer(self, parts: Sequence[Part]) -> list[list[str] | Exception]:
        """The answers to every part: a JSON array of labels for each document, or what went wrong.

        Parts that ask for the same go together.  A part that cannot be answered spoils none
        of those it went with: they are asked again, one by one.
        """
        groups: dict[Any, list[int]] = {}
        for i, part in enumerate(parts):
            key = (part.ask.k, part.ask.beam) if part.ask.labels is None else None
            groups.setdefault(key, []).append(i)
        out: list[list[str] | Exception] = [[] for _ in parts]
        for places in groups.values():
            for i, answer in zip(places, self._together([parts[i] for i in places]), strict=True):
                out[i] = answer
        return out

    def _together(self, parts: list[Part]) -> list[list[str] | Exception]:
        texts = [text for part in parts for text in part.texts]
        try:
            found = self._selected(parts, texts) if parts[0].ask.labels is not None else self._best(parts[0].ask, texts)
            lines = [_json(row) for row in found]
        except Exception as error:
            if len(parts) == 1:
                return [error]
            return [self._together([part])[0] for part in parts]
        ends = np.cumsum([len(part.texts) for part in parts]).tolist()
        return [lines[end - len(part.texts) : end] for part, end in zip(parts, ends, strict=True)]

    def _best(self, ask: Ask, texts: list[str]) -> list[list[Prediction]]:
        return self.predictor.predict(texts, ask.k, beam=ask.beam)

    def _selected(self, parts: list[Part], texts: list[str]) -> list[list[Prediction]]:
        assert isinstance(self.predictor, Predictor)
        rows = [np.unique(part.ask.labels or ()) for part in parts for _ in part.texts]
        ends = np.concatenate([[0], np.cumsum([row.size for row in rows])])
        shape = (len(texts), self.predictor.num_labels)
        wanted = sp.csr_matrix((np.ones(ends[-1], np.float32), np.concatenate(rows), ends), shape)
        scores = self.predictor.scores(texts, selected=wanted)
        most = max(part.ask.k for part in parts)
        found = answers(scores, most, self.predictor.label_texts, self.predictor.calibration)
        wants = [part.ask.k for part in parts for _ in part.texts]
        return [row[:k] for row, k in zip(found, wants, strict=True)]

    def _warm(self) -> None:
        """Read the vocabulary, and have every compiled loop that a request can come to."""
        for count in (1, _WARM_DOCS):
            self._best(Ask(DEFAULT_K), ["warm up"] * count)
        if self.scores_labels:
            self._selected([Part(["warm up"], Ask(1, None, (0,)))], ["warm up"])

    def info(self) -> dict[str, Any]:
        """What `xmcdist.serving.messages.Info` describes, without the limits."""
        import xmcdist

        first = self.members[0]
        tree = first.rankers.tree
        calibration = None if isinstance(self.predictor, Ensemble) else first.calibration
        versions = {"xmcdist": xmcdist.__version__, "python": sys.version.split()[0], "numpy": np.__version__}
        trained = first.meta.get("versions", {}).get("xmcdist")
        return {
            "model": name_of(self._model),
            "models": [name_of(path) for path in folders_of(self._model)],
            "ensemble": (self.predictor.method if isinstance(self.predictor, Ensemble) else None),
            "labels": self.predictor.num_labels,
            "names_labels": self.predictor.names_labels,
            "levels": [tree.level_size(t) for t in range(1, tree.depth + 1)],
            "beam": int(first.meta["beam"]),
            "encoder": any(member.embedder is not None for member in self.members),
            "trained_on": self.predictor.num_train,
            "calibration": None if calibration is None else calibration.method,
            "versions": versions if trained is None else {**versions, "trained_with": str(trained)},
        }


def _json(row: Sequence[Prediction]) -> str:
    """One document's answer; scores in full, so that they are the bits of `Predictor.predict`."""
    out = []
    for answer in row:
        if not math.isfinite(answer.score):
            raise ValueError(f"label {answer.label_id} has the score {answer.score}, which JSON cannot say")
        entry = {"label": answer.label, "id": answer.label_id, "score": answer.score}
        out.append(entry if answer.probability is None else {**entry, "probability": answer.probability})
    return json.dumps(out, ensure_ascii=False)


def _use_threads(threads: int | None) -> None:
    """For the calling thread, which is the one that predicts."""
    import numba

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    many = threads or cores
    numba.set_num_threads(min(many, numba.get_num_threads()))
    if "torch" in sys.modules:  # only where the model has an encoder
        import torch

        torch.set_num_threads(many)
