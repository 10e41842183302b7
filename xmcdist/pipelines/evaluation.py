"""Measuring rankers on test documents, each rank its own, sums exact over ranks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from xmcdist.checkpoint.atomic import write_json
from xmcdist.config.errors import UserError
from xmcdist.config.schema import EvaluateConfig, EvaluationConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.data.prepare import prepare
from xmcdist.evaluation.metrics import MetricSums
from xmcdist.inference.beam import top_k_arrays
from xmcdist.inference.predictor import Predictor
from xmcdist.observability.log import RunLog
from xmcdist.parallel.collectives import broadcast_object
from xmcdist.parallel.launch import World
from xmcdist.parallel.shards import row_range
from xmcdist.pipelines.together import errors_together, model_part, share_cores
from xmcdist.sparse.csr import unit_rows

__all__ = ["TABLE_KEYS", "evaluate_model", "label_frequency", "measure"]

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
        _, labels = top_k_arrays(predict(first, last), max(cfg.ks))
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
    """``xmcdist evaluate``: a model folder against the test split of a data set; collective.

    Label frequencies (for propensities and bands) are those of the model's training data.
    Labels are matched by their text where the data set orders them otherwise.

    Raises:
        UserError: no test split, or the data set names labels that the model does not know.
    """
    share_cores(world)
    with errors_together():
        if cfg.batch < 1:
            raise UserError(f"batch={cfg.batch} must be at least 1")
        predictor = Predictor.load(cfg.model, part=model_part(cfg.parallel, world))
    scratch = tempfile.mkdtemp(prefix="xmcdist-") if world.is_main and not cfg.dataset.prepared else None
    try:
        folder = Path(broadcast_object(cfg.dataset.prepared or str(Path(str(scratch), "prepared"))))
        with errors_together():
            if world.is_main:
                prepare(cfg.dataset, folder)
        metrics = _evaluate(cfg, predictor, folder, world)
        world.barrier()
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    if cfg.output and world.is_main:
        write_json(Path(cfg.output), {"metrics": metrics, "model": cfg.model, "dataset": cfg.dataset.path})
    return metrics


def _evaluate(cfg: EvaluateConfig, predictor: Predictor, folder: Path, world: World) -> dict[str, float]:
    with errors_together():
        data = PreparedDataset.open(folder)
        if not data.has_test:
            raise UserError(f"{cfg.dataset.path} has no test documents")
        X = data.X("tst") if predictor.wants_features else None
        if predictor.wants_features and X is None:
            raise UserError(f"the model was trained on given features, and {cfg.dataset.path} has no X.tst")
        if predictor.wants_text and not data.has_text:
            raise UserError(f"the model reads texts, and {cfg.dataset.path} has none")
        Y = _in_model_order(data, predictor)

    def predict(start: int, stop: int) -> sp.csr_matrix:
        texts = list(data.texts("tst").iterate(start, stop)) if predictor.wants_text else None
        given = unit_rows(X[start:stop]) if X is not None else None
        return predictor.scores(texts, features=given, k=max(cfg.evaluation.ks), beam=cfg.beam)

    with RunLog(None, world).progress("evaluate", Y.shape[0]) as tick:
        return measure(
            predict,
            Y,
            predictor.label_frequency,
            predictor.num_train,
            cfg.evaluation,
            (cfg.dataset.propensity_a, cfg.dataset.propensity_b),
            world,
            cfg.batch,
            tick,
        )


def _in_model_order(data: PreparedDataset, predictor: Predictor) -> sp.csr_matrix:
    """Y of the test documents with the columns of the model's labels."""
    Y, texts = data.Y("tst"), data.label_texts()
    if len(texts) == predictor.num_labels and all(texts[i] == predictor.label_texts[i] for i in range(len(texts))):
        return Y
    known = {predictor.label_texts[i]: i for i in range(predictor.num_labels)}
    used = np.unique(Y.indices)
    unknown = [texts[int(i)] for i in used if texts[int(i)] not in known]
    if unknown:
        raise UserError(f"the model does not know {len(unknown)} labels of the test documents, such as {unknown[0]!r}")
    columns = np.zeros(Y.shape[1], dtype=np.int64)
    columns[used] = [known[texts[int(i)]] for i in used]
    return sp.csr_matrix((Y.data, columns[Y.indices], Y.indptr), shape=(Y.shape[0], predictor.num_labels))
