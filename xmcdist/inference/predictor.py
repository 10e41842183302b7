"""A trained model folder, ready to answer: texts in, labels with scores out, on a CPU.

Needs nothing of the training data.  The rankers are memory-mapped, so opening is quick and
processes on one machine share them; the TF-IDF vocabulary is read when the first text comes,
and torch is imported only when the model has an encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from xmcdist.checkpoint.atomic import read_json
from xmcdist.checkpoint.checksums import folder_damage
from xmcdist.config.errors import UserError
from xmcdist.data.dataset import TextStore
from xmcdist.features.tfidf import Tfidf
from xmcdist.inference.beam import beam_search, top_k_arrays
from xmcdist.inference.calibration import Calibration
from xmcdist.inference.cluster_matcher import ClusterMatcher
from xmcdist.inference.selected import score_selected
from xmcdist.rankers.model import LinearTree
from xmcdist.sparse.csr import as_csr, unit_rows
from xmcdist.sparse.features import Features, unit_vectors
from xmcdist.sparse.store import open_array

if TYPE_CHECKING:
    from xmcdist.encoders.embed import TextEmbedder

__all__ = ["MODEL_FORMAT", "Prediction", "Predictor", "answers"]

MODEL_FORMAT = 1


class Prediction(NamedTuple):
    """One label of an answer."""

    label: str  # its text
    score: float
    label_id: int
    probability: float | None = None  # that it is right; None unless the model is calibrated


def answers(
    scores: sp.csr_matrix, k: int, label_texts: TextStore, calibration: Calibration | None = None
) -> list[list[Prediction]]:
    """The best ``k`` entries of every row of ``scores [n, L]`` with their texts, best first."""
    best, labels = top_k_arrays(scores, k)
    said = None if calibration is None else calibration.apply(best)
    return [
        [
            Prediction(label_texts[label], score, label, None if said is None else float(said[i, j]))
            for j, (score, label) in enumerate(zip(row, ids, strict=True))
            if label >= 0
        ]
        for i, (row, ids) in enumerate(zip(best.tolist(), labels.tolist(), strict=True))
    ]


class Predictor:
    """What `xmcdist.load` returns."""

    def __init__(
        self,
        rankers: LinearTree,
        label_texts: TextStore,
        label_frequency: NDArray[np.int64] | None,
        meta: dict[str, Any],
        tfidf: Path | None,
        embedder: TextEmbedder | None,
        *,
        matcher: ClusterMatcher | None = None,
        calibration: Calibration | None = None,
        is_part: bool = False,
    ) -> None:
        self.rankers, self.label_texts, self.label_frequency = rankers, label_texts, label_frequency
        self.meta, self.embedder = meta, embedder
        self._tfidf_folder, self.matcher = tfidf, matcher
        self.calibration, self.is_part = calibration, is_part

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        trust_remote_code: bool = False,
        part: tuple[int, int] = (0, 1),
        verify: bool = False,
    ) -> Predictor:
        """Open a model folder; runs no code from it unless it is trusted.

        Args:
            path: the folder.
            trust_remote_code: let its encoder run code of its own.
            part: (rank, number of ranks) to hold only this rank's labels; `predict` and
                `scores` are then collective, each rank asks for documents of its own (perhaps
                none), and all must ask equally often.
            verify: first read every file and compare it with its checksum, as one does with a
                model that was copied; else sizes and types of the rankers are looked at.

        Raises:
            UserError: no model there, a newer format, or a damaged file.
        """
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no model folder: it has no config.json (a run keeps its model in RUN/model)")
        meta = read_json(folder / "config.json")
        if meta.get("format") != MODEL_FORMAT:
            raise UserError(f"{folder} has model format {meta.get('format')}; this version reads {MODEL_FORMAT}")
        damage = folder_damage(folder, contents=True) if verify else None
        if damage is not None:
            raise UserError(f"{damage}: copy the model again, or delete {folder} and start its training command again")
        embedder = None
        if meta["encoder"]:
            from xmcdist.encoders.embed import TextEmbedder

            embedder = TextEmbedder.load(folder / "encoder", trust_remote_code=trust_remote_code)
        matcher = None
        try:
            rankers = LinearTree.load(folder / "rankers", verify=verify)
            rankers = rankers.part(*part) if part[1] > 1 else rankers
            if meta.get("clusters_by", "rankers") == "matcher":
                matcher = ClusterMatcher.load(folder / "matcher", verify=verify)
                matcher = matcher.part(*part) if part[1] > 1 else matcher
        except ValueError as error:
            raise UserError(str(error)) from error
        return cls(
            rankers,
            TextStore(folder, "label_texts"),
            open_array(folder / "label_frequency.npy", "int64") if meta["num_train"] is not None else None,
            meta,
            folder / "tfidf" if meta["tfidf"] else None,
            embedder,
            matcher=matcher,
            calibration=Calibration.load(folder),
            is_part=part[1] > 1,
        )

    @cached_property
    def tfidf(self) -> Tfidf | None:
        """The vocabulary, read when the first text comes.

        Raises:
            UserError: a file of it is missing or damaged.
        """
        return None if self._tfidf_folder is None else Tfidf.load(self._tfidf_folder)

    @property
    def num_labels(self) -> int:
        return self.rankers.tree.num_labels

    @property
    def num_train(self) -> int | None:
        """Documents the model was trained on; None, as `label_frequency`, where it was not told."""
        given: int | None = self.meta["num_train"]
        return given

    @property
    def names_labels(self) -> bool:
        """The label texts are those of the labels, not numbers for want of any."""
        return bool(self.meta.get("names_labels", True))

    @property
    def wants_features(self) -> bool:
        """The sparse features came with the data, so they must be given here too."""
        return self.rankers.num_sparse > 0 and self._tfidf_folder is None

    @property
    def wants_text(self) -> bool:
        return self._tfidf_folder is not None or self.embedder is not None

    def predict(
        self,
        texts: Sequence[str] | None,
        k: int = 5,
        *,
        features: sp.csr_matrix | None = None,
        beam: int | None = None,
    ) -> list[list[Prediction]]:
        """The best ``k`` labels of each text, best first.

        Args:
            texts: documents; one without known words is answered from what is common.  None
                for a model that reads features alone.
            k: labels a document; fewer come back when the beam holds fewer.
            features: ``[n, D]`` for a model trained on given features.
            beam: clusters kept a level; more is slower and finds more.

        Raises:
            UserError: a lone string instead of a list, or features missing or of another width.
        """
        return answers(self.scores(texts, features=features, k=k, beam=beam), k, self.label_texts, self.calibration)

    def scores(
        self,
        texts: Sequence[str] | None,
        *,
        features: sp.csr_matrix | None = None,
        k: int = 10,
        beam: int | None = None,
        selected: sp.csr_matrix | None = None,
        seen: dict[str, sp.csr_matrix] | None = None,
    ) -> sp.csr_matrix:
        """Scores of the best ``k`` labels as CSR ``[n, L]``; see `predict`.

        Args:
            selected: ``[n, L]``; its stored labels are scored, and they alone, however poorly
                their clusters do.  ``k`` and ``beam`` are then nothing.
            seen: TF-IDF of these texts by vocabulary, looked up and added to: models that are
                asked about the same texts and have the same vocabulary count words once.
        """
        read, E = self._features(texts, features, {} if seen is None else seen)
        start = None
        if selected is not None:
            if self.matcher is not None and E is not None:
                start = self.matcher.scores_above(E, self.rankers, selected)
            return score_selected(self.rankers, read, selected, start=start)
        beam = beam or self.meta["beam"]
        if self.matcher is not None and E is not None:
            start = self.matcher.clusters(E, beam)
        search = beam_search
        if self.is_part:
            from xmcdist.inference.sharded import beam_search_sharded

            search = beam_search_sharded
        return search(
            self.rankers,
            read,
            beam=beam,
            topk=k,
            post_processor=self.rankers.post_processor,
            last_post_processor=self.rankers.last_post_processor,
            start=start,
        )

    def _features(
        self, texts: Sequence[str] | None, given: sp.csr_matrix | None, seen: dict[str, sp.csr_matrix]
    ) -> tuple[Features, NDArray[np.float32] | None]:
        """What the rankers read, and the embeddings ``[n, d]`` as the encoder gives them, where it does."""
        if isinstance(texts, str):
            raise UserError("predict takes a list of texts; write predict([text])")
        if self.wants_text and texts is None:
            raise UserError("this model reads texts; give them")
        count = len(texts or [])
        if given is not None and self.wants_features and (count or self.wants_text) and count != given.shape[0]:
            raise UserError(f"{count} texts and {given.shape[0]} rows of features")
        sparse = E = None
        if self.tfidf is not None and self.rankers.num_sparse:
            if self.tfidf.fingerprint not in seen:
                seen[self.tfidf.fingerprint] = self.tfidf.transform(texts or [])
            sparse = seen[self.tfidf.fingerprint]
        elif self.wants_features:
            sparse = self._given(given)
        width = self.rankers.num_dense if self.matcher is None else self.matcher.head.num_dense
        if self.embedder is not None and width:
            E = self.embedder(list(texts)) if texts else np.zeros((0, width), np.float32)
        dense = unit_vectors(E) if E is not None and self.rankers.num_dense else None
        return Features(sparse=sparse, dense=dense), E

    def _given(self, features: sp.csr_matrix | None) -> sp.csr_matrix:
        """Given features as the rankers were trained on them."""
        width = self.rankers.num_sparse
        if features is None:
            raise UserError(f"this model was trained on given features: pass features=[n, {width}]")
        sparse = as_csr(features, "features")
        if sparse.shape[1] != width:
            raise UserError(f"features have {sparse.shape[1]} columns; the model has {width}")
        return unit_rows(sparse) if self.meta.get("unit_features", True) else sparse
