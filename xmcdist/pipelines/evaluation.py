"""Measuring rankers on test documents, each rank its own, sums exact over ranks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from xmcdist.checkpoint.atomic import write_json
from xmcdist.config.commands import EvaluateConfig
from xmcdist.config.errors import UserError
from xmcdist.config.schema import DatasetConfig, EvaluationConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.data.prepare import prepare
from xmcdist.evaluation.metrics import MetricSums
from xmcdist.inference.beam import top_k_arrays
from xmcdist.inference.ensemble import Ensemble, open_model
from xmcdist.inference.predictor import Predictor
from xmcdist.observability.log import RunLog
from xmcdist.parallel.collectives import broadcast_object
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range
from xmcdist.pipelines.together import errors_together, model_part, share_cores
from xmcdist.sparse.csr import row_slice

__all__ = [
    "TABLE_KEYS",
    "evaluate_model",
    "in_model_order",
    "label_frequency",
    "measure",
    "model_columns",
    "prepared_for_all",
    "scorer",
]

TABLE_KEYS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@5", "R@10")
"""Columns of the table a person sees; results.json has all."""

_CHUNK = 4096  # documents measured in one go


def label_frequency(Y: sp.csr_matrix) -> np.ndarray:
    """Training documents of each label, int64 ``[L]``."""
    return np.bincount(Y.indices, minlength=Y.shape[1]).astype(np.int64)


def measure(
    predict: Callable[[int, int], sp.csr_matrix],
    Y: sp.csr_matrix,
    frequency: np.ndarray,
    num_train: int,
    cfg: EvaluationConfig,
    propensity: tuple[float, float],
    world: World,
    batch: int | None = None,
    tick: Callable[[int], None] = lambda done: None,
    keep: Callable[[np.ndarray, np.ndarray], None] = lambda scores, labels: None,
) -> dict[str, float]:
    """Metrics of a predictor over all test documents; collective.

    Args:
        predict: ``(start, stop)`` of test documents to scores ``[stop - start, L]``.  With
            ``batch`` all ranks call it equally often, some for no documents, so it may be
            collective.
        Y: true labels ``[N, L]``.
        frequency: training documents of each label ``[L]``.
        num_train: number of training documents.
        propensity: constants A and B of the propensity model.
        batch: documents of a block; blocks are dealt out to the ranks in turn, so that a block
            holds the same documents whatever the number of ranks.  None: every rank takes a
            contiguous share, for predictors to which blocks mean nothing.
        tick: told how many documents all ranks have done.
        keep: handed what each block was measured by: scores float32 and labels int64, both
            ``[documents, max(ks)]``, best first, label -1 where there are no more.

    Returns:
        Percent by key, such as ``"P@1"``, ``"PSP@5"``, ``"tail/R@10"``.
    """
    sums = MetricSums(
        ks=cfg.ks,
        label_frequency=frequency,
        num_train=num_train,
        a=propensity[0],
        b=propensity[1],
        head_share=cfg.head_share,
        tail_below=cfg.tail_below,
    )
    for first, last in _shares(Y.shape[0], world, batch):
        scores, labels = top_k_arrays(predict(first, last), max(cfg.ks))
        keep(scores, labels)
        if last > first:
            sums.update(labels, Y[first:last])
        tick(min(last * world.world_size if batch is None else last, Y.shape[0]))
    sums.reduce(world)
    return sums.result()


def _shares(documents: int, world: World, batch: int | None) -> list[tuple[int, int]]:
    """Ranges of documents that this rank measures, see `measure`."""
    if batch is None:
        start, stop = row_range(documents, world.rank, world.world_size)
        return [(first, min(first + _CHUNK, stop)) for first in range(start, stop, _CHUNK)]
    turns = range(world.rank * batch, world.rank * batch + documents, world.world_size * batch)
    return [(min(first, documents), min(first + batch, documents)) for first in turns]


def evaluate_model(cfg: EvaluateConfig, world: World) -> dict[str, float]:
    """``xmcdist evaluate``: a model folder, or several, against the test split of a data set; collective.

    Label frequencies (for propensities and bands) are those of the model's training data, or
    of the data set's where an imported model does not know them.  Labels are matched by their
    text where the data set orders them otherwise.

    Raises:
        UserError: no test split, or the data set names labels that the model does not know.
    """
    share_cores(world)
    with errors_together():
        if cfg.batch < 1:
            raise UserError(f"batch={cfg.batch} must be at least 1")
        predictor = open_model(
            cfg.model, cfg.ensemble, part=model_part(cfg.parallel, world), one_encoder=cfg.one_encoder
        )
    with prepared_for_all(cfg.dataset, world) as folder:
        metrics = _evaluate(cfg, predictor, folder, world)
    if cfg.output and world.is_main:
        about = {"metrics": metrics, "model": cfg.model, "dataset": cfg.dataset.path}
        write_json(Path(cfg.output), about if cfg.ensemble is None else {**about, "ensemble": cfg.ensemble})
    return metrics


@contextmanager
def prepared_for_all(cfg: DatasetConfig, world: World) -> Iterator[Path]:
    """The prepared form of a data set, made where it is missing; in a scratch folder unless one is set; collective."""
    scratch = tempfile.mkdtemp(prefix="xmcdist-") if world.is_main and not cfg.prepared else None
    try:
        folder = Path(broadcast_object(cfg.prepared or str(Path(str(scratch), "prepared"))))
        with errors_together():
            if world.is_main:
                prepare(cfg, folder)
        yield folder
        world.barrier()
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def _evaluate(cfg: EvaluateConfig, predictor: Predictor | Ensemble, folder: Path, world: World) -> dict[str, float]:
    with errors_together():
        data = PreparedDataset.open(folder)
        score = scorer(data, predictor, "tst", cfg.dataset.path)
        columns = model_columns(data, predictor)
        Y = in_model_order(data.Y("tst"), columns, predictor.num_labels)
        unknown = np.flatnonzero(np.bincount(data.Y("tst").indices, minlength=columns.size)[columns < 0])
        if unknown.size:
            first = data.label_texts()[int(np.flatnonzero(columns < 0)[unknown[0]])]
            raise UserError(f"the model does not know {unknown.size} labels of the test documents, such as {first!r}")
        frequency, num_train = predictor.label_frequency, predictor.num_train
        if frequency is None or num_train is None:
            train = in_model_order(data.Y("trn"), columns, predictor.num_labels)
            frequency, num_train = label_frequency(train), train.shape[0]

    with RunLog(None, world).progress("evaluate", Y.shape[0]) as tick:
        return measure(
            lambda start, stop: score(start, stop, max(cfg.evaluation.ks), cfg.beam),
            Y,
            frequency,
            num_train,
            cfg.evaluation,
            (cfg.dataset.propensity_a, cfg.dataset.propensity_b),
            world,
            cfg.batch,
            tick,
        )


def scorer(
    data: PreparedDataset, predictor: Predictor | Ensemble, split: str, path: str
) -> Callable[[int, int, int, int | None], sp.csr_matrix]:
    """``(start, stop, k, beam)`` to scores ``[stop - start, L]`` of those documents of a split.

    Args:
        path: how messages call the data set.

    Raises:
        UserError: no such split, or it lacks what the model reads.
    """
    if split == "tst" and not data.has_test:
        raise UserError(f"{path} has no test documents")
    X = data.X(split) if predictor.wants_features else None
    if predictor.wants_features and X is None:
        raise UserError(f"the model was trained on given features, and {path} has no X.{split}")
    if predictor.wants_text and not data.has_text:
        raise UserError(f"the model reads texts, and {path} has none")

    def score(start: int, stop: int, k: int, beam: int | None) -> sp.csr_matrix:
        texts = list(data.texts(split).iterate(start, stop)) if predictor.wants_text else None
        given = row_slice(X, start, stop) if X is not None else None
        return predictor.scores(texts, features=given, k=k, beam=beam)

    return score


def model_columns(data: PreparedDataset, predictor: Predictor | Ensemble) -> np.ndarray:
    """The model's number of each of the data set's labels, by their texts, int64 ``[L]``; -1: it knows none such.

    Raises:
        UserError: the model's labels have no names, and there are not as many.
    """
    texts, count = data.label_texts(), predictor.num_labels
    if not predictor.names_labels:
        if len(texts) != count:
            raise UserError(f"the model has {count} labels without names, and the data set {len(texts)} labels")
        return np.arange(count)
    if len(texts) == count and all(a == b for a, b in zip(texts, predictor.label_texts, strict=True)):
        return np.arange(count)
    known = {text: i for i, text in enumerate(predictor.label_texts)}
    return np.array([known.get(text, -1) for text in texts], np.int64)


def in_model_order(Y: sp.csr_matrix, columns: np.ndarray, num_labels: int) -> sp.csr_matrix:
    """Y with the columns of the model's labels; those that it does not know are left out."""
    if len(columns) == num_labels and np.array_equal(columns, np.arange(num_labels)):
        return Y
    to = columns[Y.indices]
    known = to >= 0
    indptr = np.concatenate([[0], np.cumsum(known)])[Y.indptr]
    return sp.csr_matrix((Y.data[known], to[known], indptr), shape=(Y.shape[0], num_labels))
